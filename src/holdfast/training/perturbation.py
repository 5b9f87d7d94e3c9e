"""Perturbed activations: the two passes of Vaccine (arXiv 2402.01109, Algorithm 1) on any module's output.

Pass 1 computes g = d loss / d activation at the output of chosen modules. Pass 2 adds

    epsilon = rho g / ||g||

to the same outputs and trains. The norm is taken over all chosen modules and over the whole batch of an
optimizer step, so it depends neither on micro-batches nor on processes.

Pass 1 adds to each output a zero that is a leaf of the graph, so that `torch.autograd.grad` finds g there. It
changes no `.grad`, and starts at the lowest chosen module if everything below it is frozen. The hooks of pass
2 stay until backward has ended, because checkpointing computes the outputs again during backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from torch import Tensor, nn

from holdfast.errors import InputError, ModelError
from holdfast.training.gradient_checkpointing import checkpoints_reentrantly, free_inputs
from holdfast.training.layers import mixers
from holdfast.training.parameters import gradient_scale, squared_norm
from holdfast.training.passes import counts_the_step
from holdfast.training.resuming import ResumableMixin

REENTRANT = (
    "Reentrant gradient checkpointing hides the activations that the method perturbs. "
    'Use gradient_checkpointing_kwargs={"use_reentrant": False}.'
)


def activation_gradients(
    modules: Sequence[nn.Module], loss: Callable[[], Tensor]
) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the loss and its gradient at the output of each module, by position, with the output's shape.

    A module that `loss` does not call has no gradient (OPT can skip whole layers). No `.grad` is changed.
    """
    leaves: dict[int, Tensor] = {}

    def add_zero(i: int, output: Tensor) -> Tensor:
        # One number stands for the whole tensor. Only the first call counts; checkpointing makes a second.
        zero = leaves.setdefault(i, output.new_zeros(()).expand(output.shape).requires_grad_())
        return output + zero

    with outputs_changed(modules, add_zero):
        value = loss()
        found = torch.autograd.grad(value, list(leaves.values()))
    return value.detach(), dict(zip(leaves, found, strict=True))


def squared_gradient_norms(modules: Sequence[nn.Module], loss: Callable[[], Tensor]) -> Tensor:
    """||d loss / d output||^2 of each module, shape (modules,), float32; keeps one gradient at a time."""
    leaves: dict[int, Tensor] = {}
    squares: dict[int, Tensor] = {}

    def watch(i: int, output: Tensor) -> Tensor:
        first = i not in leaves
        output = output + leaves.setdefault(i, output.new_zeros(()).requires_grad_())
        if first:
            output.register_hook(lambda g: squares.__setitem__(i, squared_norm([g])))
        return output

    with outputs_changed(modules, watch):
        value = loss()
        torch.autograd.grad(value, list(leaves.values()))
    nothing = torch.zeros((), device=value.device)
    return torch.stack([squares.get(i, nothing).to(value.device) for i in range(len(modules))])


@contextmanager
def perturbed(modules: Sequence[nn.Module], gradients: Mapping[int, Tensor], scale: float) -> Iterator[None]:
    """Add scale * g to each module's output in every forward. Keep the block open until backward ends."""

    def add(i: int, output: Tensor) -> Tensor:
        if i not in gradients:
            return output
        return torch.add(output, gradients[i].to(output.device), alpha=scale)

    with outputs_changed(modules, add):
        yield


@contextmanager
def outputs_changed(modules: Sequence[nn.Module], change: Callable[[int, Tensor], Tensor]) -> Iterator[None]:
    """Replace each module's output (the first output of a tuple) by `change(position, output)`."""

    def hook_of(i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, arguments: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return change(i, output[0]), *output[1:]
            return change(i, output)

        return hook

    handles = [module.register_forward_hook(hook_of(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PerturbationMixin(ResumableMixin):
    """Makes each step of a `Trainer` the two passes, with args.rho; rho = 0 leaves the plain step.

    At the first micro-batch of a step, pass 1 runs over all micro-batches and keeps their g (rows x tokens x
    hidden for each perturbed layer, in the activations' dtype; on the CPU if a step has several
    micro-batches). Both passes of a micro-batch draw the same random numbers. So the gradient is that of the
    loss that is then perturbed, including dropout, and later draws are those of plain fine-tuning. If the
    norm is not finite (fp16 at the start), the step is plain.
    """

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._refuse_what_cannot_be()
        self.attention: list[nn.Module] = []
        self._step_batches: list[Any] = []
        self._step_items: Any = None
        self._gradients: list[dict[int, Tensor]] | None = None
        self._scale = 0.0
        self._clean = torch.zeros(2, device=self.args.device)  # loss of pass 1 and steps since the last log

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Check that every layer has an attention module."""
        super().check_model(config, model)
        mixers(model)

    def _refuse_what_cannot_be(self: Any) -> None:
        name = type(self).__name__
        # PEFT's preparation for 4 bits leaves a model so; Trainer corrects it if checkpointing is enabled.
        if checkpoints_reentrantly(self.model) and not asked_checkpointing(self.args)[0]:
            raise ModelError(REENTRANT)
        if self.args.n_gpu > 1:
            raise InputError(
                f"{name} cannot share one process among {self.args.n_gpu} GPUs (DataParallel): it does not "
                "see the copies of the model. Start one process per GPU: accelerate launch or torchrun."
            )
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            raise InputError(f"{name} has not been tested under DeepSpeed. Use FSDP2 or DDP.")
        self.check_model(self.args, self.model)

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train; modules are looked up again for every training."""
        self.attention, self._gradients = [], None
        return super().train(*args, **kwargs)

    def perturbed_layers(self: Any) -> list[int]:
        """Return the positions of the layers to perturb in this step."""
        return list(range(len(self.attention)))

    def training_begins(self: Any) -> None:
        """Called before the first step: the model is wrapped, and its checkpointing is set."""
        if checkpoints_reentrantly(self.model):
            raise ModelError(REENTRANT)
        free_inputs(self.model)
        self.attention = mixers(self.model)

    def step_begins(self: Any) -> None:
        """Called before anything else in an optimizer step."""

    def get_batch_samples(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the plain micro-batches of a step and keep them, because pass 1 needs all of them."""
        self._step_batches, self._step_items = super().get_batch_samples(*args, **kwargs)
        self._gradients = None
        return self._step_batches, self._step_items

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The plain step of a micro-batch with perturbed activations."""
        if self._gradients is None:
            if not self.attention:
                self.training_begins()
            self.step_begins()
            self._gradients = self._first_pass() if self.args.rho else []
        if not self._gradients:
            return super().training_step(model, inputs, num_items_in_batch)
        chosen = [self.attention[i] for i in self.perturbed_layers()]
        with perturbed(chosen, self._gradients.pop(0), self._scale):
            return super().training_step(model, inputs, num_items_in_batch)

    def _first_pass(self: Any) -> list[dict[int, Tensor]]:
        """Return g of each micro-batch and set `_scale` to rho / ||g||; an empty list if it is not finite."""
        batches, device, scale = self._step_batches, self.args.device, gradient_scale(self.accelerator)
        chosen = [self.attention[i] for i in self.perturbed_layers()]
        kept, clean = [], torch.zeros((), device=device)
        total = torch.zeros((), device=device)
        self.model.train()
        with same_random_numbers(device), self.unrecorded():
            for batch in batches:
                loss_of = partial(self.loss_of, batch, self._step_items, scale)
                loss, found = activation_gradients(chosen, loss_of)
                clean = clean + loss
                total = total + squared_norm(list(found.values())).to(device)
                kept.append({i: g.cpu() for i, g in found.items()} if len(batches) > 1 else found)
        share = scale * (1 if counts_the_step(self, self._step_items) else len(batches))
        self._clean += torch.stack([clean / share, torch.ones_like(clean)]).float()
        norm = float(self.accelerator.reduce(total, reduction="sum").sqrt())
        if not math.isfinite(norm) or norm == 0:
            return []
        self._scale = self.args.rho / norm
        return kept

    def loss_of(self: Any, batch: Any, items: Any, scale: float) -> Tensor:
        """scale * the training loss of a micro-batch, computed by the model without DDP's wrapper."""
        with self.compute_loss_context_manager():
            inputs = send_to_device(dict(batch), self.args.device)
            loss = self.compute_loss(self.model, inputs, num_items_in_batch=items)
        return loss * scale

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the plain cross-entropy of pass 1 to the log; the loss is that of perturbed activations."""
        if "loss" in logs and self.args.rho:
            total, steps = self.accelerator.reduce(self._clean, reduction="mean").tolist()
            logs["cross_entropy"] = total / max(steps, 1)
            self._clean.zero_()
        super().log(logs, *args, **kwargs)


@contextmanager
def same_random_numbers(device: torch.device) -> Iterator[None]:
    """Restore the random state at the end, so that the draws inside are repeated afterwards."""
    if device.type == "cpu":
        with torch.random.fork_rng(devices=[]):
            yield
    else:
        with torch.random.fork_rng(devices=[device], device_type=device.type):
            yield


def refuse_reentrant(config: Any) -> None:
    """Raise ValueError if a `TrainingArguments` asks for reentrant checkpointing."""
    on, options = asked_checkpointing(config)
    if on and options.get("use_reentrant"):
        raise ValueError(REENTRANT)


def asked_checkpointing(config: Any) -> tuple[bool, Mapping[str, Any]]:
    """Whether a `TrainingArguments` asks for activation checkpointing, and its options.

    The arguments are called `gradient_checkpointing` and `gradient_checkpointing_kwargs` in transformers 5.20
    and older, which axolotl, ms-swift, LLaMA-Factory and Unsloth use.
    """
    kind = "activation" if hasattr(config, "activation_checkpointing") else "gradient"
    options = getattr(config, f"{kind}_checkpointing_kwargs")
    return bool(getattr(config, f"{kind}_checkpointing")), options or {}
