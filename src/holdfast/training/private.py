"""Every private name of torch, transformers and TRL that Holdfast uses, and why; no other file uses one.

`PINNED` lists the names by owner. `tests/training/test_private_names.py` fails if a library renames one of
them, or if another file of the package uses a private name that is not its own.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from pickle import Unpickler
from typing import Any

import torch
from torch import nn
from transformers.trainer_pt_utils import LengthGroupedSampler

from holdfast.errors import ModelError, first_line
from holdfast.training.batches import SeededSampler

PINNED = {
    "torch": (
        "_dynamo", "_foreach_add_", "_foreach_div", "_foreach_mul", "_foreach_mul_", "_foreach_norm",
        "_foreach_sqrt", "_foreach_sub",
    ),
    "torch.nn.Module": ("_forward_hooks",),
    "torch.compile": ("_orig_mod",),
    "torch checkpoint wrapper": ("_checkpoint_wrapped_module",),
    "transformers layer": ("_gradient_checkpointing_func",),
    "transformers.Trainer": (
        "_get_train_sampler", "_load_best_model", "_load_from_checkpoint", "_load_optimizer_and_scheduler",
        "_save_optimizer_and_scheduler", "_train_batch_size",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.serialization": ("_get_layout",),
    "trl.SFTTrainer": ("_formatting_func", "_metrics", "_prepare_dataset", "_total_train_tokens"),
}  # fmt: skip

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

BY_LAYER = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
"""accelerate's environment variable that compiles the layers of a model instead of the whole model."""

BACKEND = "ACCELERATE_DYNAMO_BACKEND"
"""accelerate's environment variable that compiles every model (`accelerate launch --dynamo_backend`)."""

WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""torch's environment variable that makes every `torch.load` read with `weights_only=True`."""

TRL_METRICS = ("_metrics", "_total_train_tokens")
"""Attributes that `trl.SFTTrainer` updates with every loss that it computes."""


class CheckpointSlots:
    """Public methods that are called when `transformers.Trainer` writes and reads a checkpoint.

    Also makes the sampler that groups by length depend on seed and epoch alone.

    `_save_optimizer_and_scheduler` and `_load_optimizer_and_scheduler` are the only symmetric pair that all
    ranks call on every backend, during the checkpoint and before old checkpoints are removed.
    `_load_from_checkpoint` reads the weights.
    """

    def before_optimizer_is_saved(self) -> None:
        """Called by all ranks before the optimizer is written."""

    def save_to(self, checkpoint: Path) -> None:
        """Called by all ranks after the optimizer was written into the folder `checkpoint`."""

    def before_optimizer_is_read(self, checkpoint: Path) -> None:
        """Called by all ranks before the optimizer is read from the folder `checkpoint`."""

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
        if checkpoint is not None:
            self.before_optimizer_is_read(Path(checkpoint))
        with only_tensors(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None:
            self.load_from(Path(checkpoint))

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        with self.loading_weights(folder, self.model if model is None else model), only_tensors(folder):
            super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]

    def _get_train_sampler(self: Any, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        args = self.args
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        return SeededSampler(sampler, args.seed if args.data_seed is None else args.data_seed)

    def _load_best_model(self: Any) -> None:
        with only_tensors(self.state.best_model_checkpoint):
            super()._load_best_model()  # type: ignore[misc]


PLAIN = frozenset(
    [("torch.distributed.checkpoint.metadata", name) for name in (
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    )]
    + [("torch", name) for name in (
        "Size", "bfloat16", "bool", "float16", "float32", "float64", "int16", "int32", "int64", "int8",
        "uint8", "float8_e4m3fn", "float8_e5m2", "contiguous_format",
    )]
    + [("torch.distributed.checkpoint.filesystem", "_StorageInfo"), ("torch.serialization", "_get_layout")]
    + [("collections", "OrderedDict")]
    + [(module, "PosixPath") for module in ("pathlib", "pathlib._local")]
)  # fmt: skip
"""The classes and functions that `.metadata` of `torch.distributed.checkpoint` may name, by module."""


class _Plain(Unpickler):
    """Reads a pickle that names nothing outside `PLAIN`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise ValueError(f"it names {module}.{name}")
        return super().find_class(module, name)


@contextmanager
def only_tensors(checkpoint: str | Path | None) -> Iterator[None]:
    """Refuse pickles that could run code while files of the folder `checkpoint` are read.

    `torch.distributed.checkpoint` unpickles its `.metadata`, which is checked here first, and reads values
    that are not tensors with `weights_only=False`, which torch's environment variable overrules.

    Raises:
        ModelError: a `.metadata` is damaged or could run code, or tensors are missing.
    """
    for path in sorted(Path(checkpoint).glob("*/.metadata")) if checkpoint else []:
        try:
            with path.open("rb") as file:
                _Plain(file).load()
        except Exception as error:
            raise ModelError(
                f"{path} is damaged or unsafe: {first_line(error)}. It was not loaded."
            ) from None
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        yield
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "CheckpointException":  # torch's, which is no Exception
            raise
        raise ModelError(f"{checkpoint} cannot be loaded: {first_line(error)}.") from error
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def compiles(args: Any) -> bool:
    """Whether the training arguments, or accelerate's environment, ask for `torch.compile`."""
    return args.torch_compile or os.environ.get(BACKEND, "no").lower() != "no"


@contextmanager
def compiling_layers(args: Any) -> Iterator[None]:
    """Let an Accelerator that is created inside compile layers, and let compiled code notice hooks.

    By default, torch does not check whether hooks were added since it compiled a module. A method that adds
    some would silently train as plain SFT if the process had compiled the same layers without them. The
    tracing of a whole model fails on hooks with tensors inside checkpointed layers; that of one layer works.
    The environment variable, or accelerate's configuration file, can still ask for the whole model.
    """
    if compiles(args) or "torch._dynamo" in sys.modules:  # else nothing was compiled, and nothing will be
        torch._dynamo.config.skip_nnmodule_hook_guards = False
    before = os.environ.get(BY_LAYER)
    os.environ.setdefault(BY_LAYER, "true")
    try:
        yield
    finally:
        if before is None:
            del os.environ[BY_LAYER]


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
