"""Every private name of torch, transformers and TRL that Holdfast uses, and why; no other file uses one.

`PINNED` lists the names by owner. `tests/training/test_private_names.py` fails if a library renames one of
them, or if another file of the package uses a private name that is not its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

PINNED = {
    "torch": (
        "_foreach_add_", "_foreach_div", "_foreach_mul", "_foreach_mul_", "_foreach_norm", "_foreach_sqrt",
        "_foreach_sub",
    ),
    "torch.nn.Module": ("_forward_hooks",),
    "torch.compile": ("_orig_mod",),
    "torch checkpoint wrapper": ("_checkpoint_wrapped_module",),
    "transformers layer": ("_gradient_checkpointing_func",),
    "transformers.Trainer": (
        "_get_train_sampler", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
        "_save_optimizer_and_scheduler", "_train_batch_size",
    ),
    "trl.SFTTrainer": ("_formatting_func", "_metrics", "_prepare_dataset", "_total_train_tokens"),
}  # fmt: skip
"""`_get_train_sampler` is not called: `PhaseBatchSampler` draws the same order, which a test compares."""

# One kernel for a list of tensors; on hundreds of small tensors (an adapter), ten times as fast as a loop.
foreach_add_ = torch._foreach_add_
foreach_div = torch._foreach_div
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_norm = torch._foreach_norm
foreach_sqrt = torch._foreach_sqrt
foreach_sub = torch._foreach_sub

WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts that activation checkpointing and torch.compile add to the names of parameters."""

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Attributes that `trl.SFTTrainer` updates with every loss that it computes."""


class CheckpointSlots:
    """Public methods that are called when `transformers.Trainer` writes and reads a checkpoint.

    `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` are the only symmetric pair that all
    ranks call on every backend, during the checkpoint and before old checkpoints are removed.
    `_load_from_checkpoint` reads the weights.
    """

    def before_optimizer_is_saved(self) -> None:
        """Called by all ranks before the optimizer is written."""

    def save_to(self, checkpoint: Path) -> None:
        """Called by all ranks after the optimizer was written into the folder `checkpoint`."""

    def load_from(self, checkpoint: Path) -> None:
        """Called by all ranks after the optimizer was read from the folder `checkpoint`."""

    def loading_weights(self, checkpoint: Path, model: nn.Module) -> AbstractContextManager[None]:
        """Open while the weights of `model` are read from the folder `checkpoint`."""
        return nullcontext()

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        self.before_optimizer_is_saved()
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        self.save_to(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.load_from(Path(checkpoint))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self.loading_weights(Path(resume_from_checkpoint), self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]


def batch_size(trainer: Any) -> int:
    """Return the rows of a process's micro-batch, even if `auto_find_batch_size` lowered the number."""
    return trainer._train_batch_size


def is_sft(trainer: Any) -> bool:
    """Whether the trainer prepares rows as `trl.SFTTrainer` does."""
    return hasattr(trainer, "_prepare_dataset")


def sft_rows(trainer: Any, rows: Any) -> Any:
    """Prepare more rows as `trl.SFTTrainer` prepares its training rows: template, truncation, packing."""
    args = trainer.args
    return trainer._prepare_dataset(
        rows, trainer.processing_class, args, args.packing, trainer._formatting_func, "alignment"
    )


@contextmanager
def metrics_kept(trainer: Any) -> Iterator[None]:
    """Exclude the losses computed inside from the metrics of `trl.SFTTrainer`."""
    kept = {name: deepcopy(vars(trainer)[name]) for name in TRL_METRICS if name in vars(trainer)}
    try:
        yield
    finally:
        vars(trainer).update(kept)


def is_reentrant(layer: Any) -> bool:
    """Whether a layer that checkpoints uses torch's reentrant checkpointing."""
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False


def remove_input_hooks(module: nn.Module) -> int:
    """Remove a module's hooks that make its output require gradients; returns how many there were.

    They are called `make_inputs_require_grads` in transformers and `make_inputs_require_grad` in PEFT.
    Each `enable` adds one, and the libraries keep the handle of the last one only.
    """
    found = [
        key
        for key, hook in module._forward_hooks.items()
        if getattr(hook, "__name__", "").startswith("make_inputs_require_grad")
    ]
    for key in found:
        del module._forward_hooks[key]
    return len(found)
