"""SBR: the hidden states of a few harmful questions stay where they were (ICML 2026, arXiv 2605.05995).

    min over theta of  CE(user rows) + lambda 1/K sum_k || h(x_k; theta) - h(x_k; theta_0) ||^2

x_1 to x_K are harmful questions without answers, the anchors. h(x; theta) is the last layer's hidden state at
the last token of the prompt, and theta_0 is the aligned model. Its K states are computed once, at the first
step. Every optimizer step has one more forward and backward, of K short prompts.

The paper's text was not read in whole: the equation comes from notes on it, and the code was read. It is not
known whether the paper adds up the K distances or takes their mean. Here it is the mean, so lambda does not
depend on K (the paper reports that K = 1 is nearly enough).

`norm="sum"` is the squared norm of the equation. `norm="mean"` is the authors' code, which takes the mean
over the d numbers of a state: lambda = 50 there is 50 / d in the equation's norm. The published numbers come
from the code.

Where we differ from the authors' code, and why:

- it does not divide the penalty by gradient accumulation; here the penalty's gradient is added once per
  optimizer step, before clipping, so accumulation changes nothing;
- it reads the last token at `attention_mask.sum() - 1`, which is wrong under left padding; here the padding
  side does not matter;
- dropout is off in the additional pass, like in the pass that computes the states at the start. It draws no
  random number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from holdfast.defenses import Defense
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.training.fisher import dropout_off
from holdfast.training.layers import plain_model, text_config
from holdfast.training.parameters import gradient_scale
from holdfast.training.passes import Means, refuse_deepspeed, step_backward
from holdfast.training.private import batch_size
from holdfast.training.questions import last_states, padded, questions
from holdfast.training.resuming import ResumableMixin
from holdfast.training.shards import drop_gathered
from holdfast.training.tokenising import rows_fingerprint
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class SBRConfig(MethodConfig):
    """Defaults of the paper: K = 8, lambda = 50."""

    lambda_: float = field(default=50.0, metadata={"help": "Strength of the penalty."})
    anchors: int = field(default=8, metadata={"help": "K: harmful questions whose hidden states are kept."})
    norm: Literal["sum", "mean"] = field(
        default="sum", metadata={"help": "sum: the paper's squared norm; mean: the authors' code, over d."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lambda_ < 0:
            raise ValueError(f"lambda_ must not be negative, found {self.lambda_}")
        if self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, found {self.anchors}")
        if self.norm not in ("sum", "mean"):
            raise ValueError(f"norm must be sum or mean, found {self.norm!r}")


def distances(states: Tensor, start: Tensor, norm: str) -> Tensor:
    """Return the distance of each state from its state at the start: two of shape [K, d] to [K]."""
    squares = (states - start).square()
    return squares.sum(-1) if norm == "sum" else squares.mean(-1)


class SBRMixin(ResumableMixin):
    """Adds the penalty's gradient to that of a `Trainer`, once per optimizer step and before clipping.

    `harmful_dataset` holds harmful questions: rows of any accepted kind, with or without answers, which are
    not read. `anchors` of them are drawn with the seed.
    """

    def __init__(self: Any, *args: Any, harmful_dataset: Any = None, **kwargs: Any):
        super().__init__(*args, **kwargs)
        found = questions(harmful_dataset or (), self.processing_class, self.args.max_length)
        wanted = self.args.anchors
        if len(found) < wanted:
            raise DataError(
                f"{type(self).__name__} needs harmful_dataset with at least anchors={wanted} harmful "
                f"questions, found {len(found)}. Give more rows, or lower anchors."
            )
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        generator = torch.Generator().manual_seed(derive_seed(seed, "sbr"))
        chosen = torch.randperm(len(found), generator=generator)[:wanted].tolist()
        self.anchor_prompts = [found[i] for i in sorted(chosen)]
        self.start_states: Tensor | None = None
        self._seen = Means()
        if self.args.lambda_:
            refuse_deepspeed(self)

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """The fingerprint of the parent class with the anchors."""
        rows = [{"input_ids": prompt} for prompt in self.anchor_prompts]
        return super().run_fingerprint() | {"harmful_dataset": rows_fingerprint(rows)}

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train with new states at the start, also when the same trainer trains a second time."""
        self.start_states = None
        return super().train(*args, **kwargs)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step, plus the anchors' pass after the last micro-batch."""
        if self.args.lambda_ and self.start_states is None:
            self.start_states = self._states_now(model)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.args.lambda_ and self.accelerator.sync_gradients:
            self._add_penalty(model)
        return loss

    def _batches(self: Any) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """The anchors in batches no larger than those of training, each with its place among the K."""
        size = batch_size(self)
        for first in range(0, len(self.anchor_prompts), size):
            place = slice(first, first + size)
            pad = _any_token(self.processing_class)
            yield place, padded(self.anchor_prompts[place], pad, self.args.device)

    @torch.no_grad()
    def _states_now(self: Any, model: Any) -> Tensor:
        """Return h(x_k) of the current weights, [K, d]."""
        with dropout_off(self.model), self.compute_loss_context_manager():
            states = torch.cat([last_states(model, batch) for _, batch in self._batches()])
        drop_gathered(self.model)
        return states

    def _add_penalty(self: Any, model: Any) -> None:
        parts, seen = list(self._batches()), []

        def share(position: int, batch: Any) -> Tensor:
            place, _ = parts[position]
            with self.compute_loss_context_manager():
                states = last_states(model, batch)
            found = distances(states, self.start_states[place], self.args.norm)
            seen.append(found.detach().sum() / len(self.anchor_prompts))
            return self.args.lambda_ * found.sum() / len(self.anchor_prompts)

        with dropout_off(self.model):
            step_backward(self, model, [b for _, b in parts], share, gradient_scale(self.accelerator))
        self._seen.add(torch.stack(seen).sum())

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log lambda times the mean distance of the anchors: the mean over the steps since the last entry."""
        mean = self._seen.take() if "loss" in logs else None
        if mean is not None:
            logs["penalty"] = self.args.lambda_ * float(mean)
        super().log(logs, *args, **kwargs)

    def method_state(self: Any) -> dict[str, Tensor]:
        """The anchors' states at the start of training."""
        if not self.args.lambda_:
            return super().method_state()
        size = text_config(plain_model(self.model)).hidden_size
        empty = torch.zeros(len(self.anchor_prompts), size, device=self.args.device)
        return super().method_state() | {
            "start_states": empty if self.start_states is None else self.start_states
        }

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Continue with the states of the aligned model, not with those of the resumed model."""
        super().method_loaded(state)
        if self.args.lambda_:
            self.start_states = state["start_states"]


def _any_token(tokenizer: Any) -> int:
    """Return the id that fills a batch; the attention mask hides it."""
    return (getattr(tokenizer, "pad_token_id", None) or 0) if tokenizer is not None else 0


class SBRTrainer(SBRMixin, RowTrainer):
    """SBR on `transformers.Trainer`; `harmful_dataset` holds the questions that anchors are drawn from."""


DEFENSE = Defense(
    name="sbr",
    label="SBR",
    stages=("user",),
    paper="ICML 2026, arXiv 2605.05995",
    needs=("harmful_dataset",),
    config=SBRConfig,
    trainer=SBRTrainer,
    series={"penalty": ("Penalty", "anchors")},
    strong={"lambda_": 50.0, "anchors": 3},
    protocols={
        "lisa-code": {
            "data": {"alignment": {"harmful": {"size": 100}}},
            "user": {"lambda_": 50.0, "anchors": 8, "norm": "mean"},
        },
        "sbr": {"user": {"lambda_": 50.0, "anchors": 8, "norm": "mean"}},
    },
)
