"""Shared by penalised methods: an anchor in memory, the penalty's gradient in the step, and its log entries.

`AnchorMixin` keeps the weights at the last switch point (one copy, saved with the checkpoint) and logs the
drift from them. `PenaltyMixin` adds strength * D(w, anchor) to the loss, as a gradient:

- once per optimizer step, after the last micro-batch's backward and before clipping. The numbers are those
  of a term in every micro-batch's loss, but without a graph, without a strength that grows with gradient
  accumulation, and without a change to `eval_loss`;
- under DeepSpeed, whose optimizer steps inside backward, by a hook on each parameter that adds the share of
  every micro-batch. Shown to be equal on a CPU, with a backward that steps like DeepSpeed's; not tested
  beyond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import TrainerCallback

from holdfast.errors import DataError, InputError
from holdfast.training.fisher import mean_1, trainer_fisher
from holdfast.training.parameters import gradient_scale, squared_norm, trainable_parameters
from holdfast.training.proximal import L2, DeltaW, Term, Weighted, add_gradient, difference, lora_factors
from holdfast.training.resuming import ResumableMixin
from holdfast.training.shards import drop_gathered
from holdfast.training.tokenising import rows_fingerprint


class AlignmentRows(ResumableMixin):
    """Accepts `alignment_dataset`, rows of any accepted kind, and prepares them like the trainer's own."""

    def __init__(self: Any, *args: Any, alignment_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.alignment_dataset = self.prepare_extra_rows(alignment_dataset)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with the alignment rows."""
        return super().run_fingerprint() | {
            "alignment_dataset": rows_fingerprint(self.alignment_dataset or ())
        }


class _StepBegin(TrainerCallback):
    """Calls the trainer when a step begins, outside the `no_sync` that all but the last micro-batch use."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Called before the first micro-batch of an optimizer step."""
        self.trainer.keep_anchor()


class AnchorMixin(ResumableMixin):
    """Keeps the weights at the last switch point; by default, the weights at the start."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.weights: list[Tensor] = []
        self.anchor: list[Tensor] | None = None
        self.anchor_step = -1
        self.add_callback(_StepBegin(self))

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with new anchors, also when the same trainer trains a second time."""
        self.weights, self.anchor, self.anchor_step = [], None, -1
        return super().train(*args, **kwargs)

    def anchor_point(self: Any, step: int) -> int:
        """Return the optimizer step before which the anchor of `step` is taken."""
        return 0

    def keep_anchor(self: Any) -> None:
        """Keep the weights at a switch point, before anything else in the step."""
        point = self.anchor_point(self.state.global_step)
        if point != self.anchor_step and not zero_3(self.accelerator):
            drop_gathered(self.model)  # an evaluation, or another forward without backward, gathers weights
            self.weights = list(trainable_parameters(self.model).values())
            self.anchor = [w.detach().clone() for w in self.weights]
            self.anchor_step = point
            self.anchor_taken()

    def anchor_taken(self: Any) -> None:
        """Called after the anchor is taken."""

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the drift ||w - anchor|| of the current weights to the log."""
        if "loss" in logs and self.anchor is not None:
            logs["drift"] = float(squared_norm(difference(self.weights, self.anchor)).sqrt())
        super().log(logs, *args, **kwargs)

    def method_state(self: Any) -> dict[str, Tensor]:
        """The anchor and the step at which it was taken."""
        state = super().method_state() | {"anchor_step": torch.tensor(self.anchor_step)}
        if zero_3(self.accelerator):
            return state
        parameters = trainable_parameters(self.model)
        anchor = self.anchor or [torch.zeros_like(p.detach()) for p in parameters.values()]
        return state | {f"anchor.{name}": t for name, t in zip(parameters, anchor, strict=True)}

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Continue with the saved anchor."""
        super().method_loaded(state)
        self.anchor_step = int(state["anchor_step"])
        if not zero_3(self.accelerator):
            self.weights = list(trainable_parameters(self.model).values())
            self.anchor = [t for name, t in state.items() if name.startswith("anchor.")]


class PenaltyMixin(AnchorMixin):
    """Adds penalty_strength(step) * D(w, anchor) to the loss.

    A subclass defines the term D, its strength, and how F is computed. It must also be an `AlignmentRows`.
    """

    fisher_has_mean_1 = False
    """Whether F is divided by its mean over all trainable weights; F = 1 is then the same as `l2`."""

    @staticmethod
    def penalty_term(config: Any) -> str:
        """`l2`, `fisher` or `delta_w` (see `proximal.py`)."""
        raise NotImplementedError

    def penalty_strength(self: Any, step: int) -> float:
        """rho or lambda at optimizer step `step` (from 0); 0 if the term is left out."""
        raise NotImplementedError

    @staticmethod
    def penalised(config: Any) -> bool:
        """Whether the term has any effect."""
        raise NotImplementedError

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.term: Term = L2()
        self.fisher: list[Tensor] | None = None
        self._hooks: list[Any] = []
        if self.penalised(self.args):
            self._refuse_what_cannot_be()

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Refuse `delta_w` if anything other than plain LoRA is trainable."""
        super().check_model(config, model)
        if cls.penalised(config) and cls.penalty_term(config) == "delta_w":
            lora_factors(model, trainable_parameters(model))

    def _refuse_what_cannot_be(self: Any) -> None:
        term, name = self.penalty_term(self.args), type(self).__name__
        if term == "fisher" and not self.alignment_dataset:
            raise DataError(f"{name} needs alignment_dataset: the rows for its Fisher information.")
        self.check_model(self.args, self.model)
        if not self._deepspeed():
            return
        if term != "l2":
            raise InputError(f"{name}: under DeepSpeed only the 'l2' penalty is supported, found '{term}'.")
        if zero_3(self.accelerator):
            raise InputError(
                f"{name} cannot run under DeepSpeed ZeRO-3, which partitions the weights: the penalty would "
                "not see them. Use ZeRO-2 or FSDP2."
            )
        if self.args.fp16:
            raise InputError(
                f"{name} cannot run in fp16 under DeepSpeed, which scales the loss itself. Use bf16."
            )

    def _deepspeed(self: Any) -> bool:
        return self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train as the parent class does, and remove the hooks at the end."""
        try:
            return super().train(*args, **kwargs)
        finally:
            while self._hooks:
                self._hooks.pop().remove()

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step, plus the penalty's gradient after the last micro-batch and before clipping."""
        strength = self.penalty_strength(self.state.global_step)
        if self._deepspeed() and self.penalised(self.args) and not self._hooks:
            for i, weight in enumerate(trainable_parameters(self.model).values()):
                self._hooks.append(weight.register_hook(self._adds_its_share(i)))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if strength and self.accelerator.sync_gradients and not self._deepspeed():
            gradient = self.term.gradient(self.weights, self.anchor)
            add_gradient(self.weights, gradient, strength * gradient_scale(self.accelerator))
        return loss

    def _adds_its_share(self: Any, i: int) -> Callable[[Tensor], Tensor]:
        def hook(gradient: Tensor) -> Tensor:
            share = self.penalty_strength(self.state.global_step) / self.current_gradient_accumulation_steps
            drift = difference([self.weights[i]], [self.anchor[i]])[0]
            return gradient + share * drift if share else gradient

        return hook

    def anchor_taken(self: Any) -> None:
        """Build the term, with F computed at these weights."""
        if self.penalty_term(self.args) == "fisher" and self.penalised(self.args):
            self.fisher = trainer_fisher(self, self.model_wrapped, self.args.fisher_rows, self.anchor_step)
            if self.fisher_has_mean_1:
                mean_1(self.fisher)
        self._build_term()

    def _build_term(self: Any) -> None:
        if not self.penalised(self.args):
            return
        if self.penalty_term(self.args) == "fisher":
            self.term = Weighted(self.fisher)
        elif self.penalty_term(self.args) == "delta_w":
            self.term = DeltaW(lora_factors(self.model, trainable_parameters(self.model)))

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the penalty at the current weights to the log; it is not part of the logged loss."""
        if "loss" in logs and self.anchor is not None:
            strength = self.penalty_strength(self.state.global_step - 1)
            value = float(self.term.value(self.weights, self.anchor)) if strength else 0.0
            logs["penalty"] = strength * value
        super().log(logs, *args, **kwargs)

    def method_state(self: Any) -> dict[str, Tensor]:
        """The anchor, and F if it is used."""
        state = super().method_state()
        if self.penalty_term(self.args) != "fisher" or not self.penalised(self.args):
            return state
        parameters = trainable_parameters(self.model)
        fisher = self.fisher or [
            torch.zeros_like(p.detach(), dtype=torch.float32) for p in parameters.values()
        ]
        return state | {f"fisher.{name}": f for name, f in zip(parameters, fisher, strict=True)}

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Continue with the saved anchor and F."""
        super().method_loaded(state)
        self.fisher = [t for name, t in state.items() if name.startswith("fisher.")] or None
        self._build_term()


def zero_3(accelerator: Any) -> bool:
    """Whether DeepSpeed partitions the parameters, so that no process sees the whole weights."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3
