"""The batches of Trainer's own loader as row numbers: by epoch, reproducible, from one or two data sets.

Everything here keeps what `TrainingArguments` say about the loader: sampling strategy, `drop_last`, workers,
sharding over processes. Nothing is a random draw of its own, so that a resumed run has the same batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from accelerate.data_loader import DataLoaderShard, prepare_data_loader
from torch.utils.data import ConcatDataset, DataLoader, Sampler

from holdfast.errors import DataError, InputError

LOADER_OPTIONS = (
    "collate_fn", "num_workers", "pin_memory", "persistent_workers", "multiprocessing_context",
    "prefetch_factor", "in_order", "worker_init_fn", "timeout",
)  # fmt: skip
"""Arguments of a DataLoader that do not choose rows."""


class SeededSampler(Sampler[int]):
    """A sampler that draws from a generator of its own, with a new seed for each epoch.

    transformers' LengthGroupedSampler draws from torch's global generator, whose state a resumed run does not
    have at the same place.
    """

    def __init__(self, sampler: Any, seed: int):
        self.sampler, self.seed, self.epoch = sampler, seed, 0
        sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        yield from self.sampler


def knows_epoch(loader: Any) -> Any:
    """Make `set_epoch` reach the loader's sampler, also after a resume in several processes.

    accelerate looks for the sampler at most two objects deep, and a resume adds a third. Returns `loader`.
    """
    inner = loader.batch_sampler
    while not hasattr(inner, "set_epoch"):
        deeper = getattr(inner, "batch_sampler", None) or getattr(inner, "sampler", None)
        if deeper is None:
            return loader
        inner = deeper
    if inner is not loader.batch_sampler:
        loader.batch_sampler.sampler = inner
    return loader


class LoaderBatches:
    """The batches of a loader as one endless sequence of lists of row numbers, epoch after epoch.

    Args:
        loader: a loader that accelerate has prepared; its batches are those of this process.
        first: the number of the loader's first row, in a data set that holds other rows before it.
        epoch_of: the epoch that the loader is set to for the sequence's epoch 0, 1, ...
    """

    def __init__(self, loader: Any, first: int = 0, epoch_of: Callable[[int], int] = lambda epoch: epoch):
        self.loader, self.first, self.epoch_of = loader, first, epoch_of
        self.epoch = lru_cache(maxsize=2)(self._read)

    def __len__(self) -> int:
        """The number of batches in an epoch."""
        return len(self.loader)

    def __getitem__(self, place: int) -> list[int]:
        epoch, within = divmod(place, len(self))
        return self.epoch(epoch)[within]

    def _read(self, epoch: int) -> list[list[int]]:
        self.loader.set_epoch(self.epoch_of(epoch))
        return [[self.first + row for row in batch] for batch in self.loader.batch_sampler]


class UserFirst(ConcatDataset):
    """Several data sets behind each other, with the length of the first, which Trainer counts epochs by."""

    def __len__(self) -> int:
        return self.cumulative_sizes[0]


def loader_of(loader: Any, others: list[Any], batch_sampler: Any) -> Any:
    """Return a loader like `loader`, over its rows and those of the loaders `others`.

    Args:
        batch_sampler: yields the row numbers of each batch of this process.
    """
    rows: Any = UserFirst([one.dataset for one in (loader, *others)])
    options = {name: getattr(loader, name) for name in LOADER_OPTIONS}
    return prepare_data_loader(
        DataLoader(rows, batch_sampler=batch_sampler, **options),
        device=loader.device,
        num_processes=1,  # the batches are already those of this process
        process_index=0,
        put_on_device=loader.device is not None,
    )


def check_sharded(trainer: Any, loader: Any) -> None:
    """Raise InputError if a process's loader does not list its own row numbers, in every epoch again."""
    options, name = trainer.args.accelerator_config, type(trainer).__name__
    if not isinstance(loader, DataLoaderShard) or loader.batch_sampler is None:
        wrong = "dispatch_batches=True, or rows without a length (IterableDataset)"
    elif not options.use_seedable_sampler:
        wrong = "use_seedable_sampler=False"
    elif not options.even_batches:
        wrong = "even_batches=False"
    elif trainer.args.ignore_data_skip:
        wrong = "ignore_data_skip=True"
    else:
        return
    raise InputError(
        f"{name} chooses the rows of each batch by its optimizer step, which is not possible with {wrong}. "
        "Leave it out (of TrainingArguments, or of their accelerator_config), and give rows with a length."
    )


def refuse_no_rows(rows: Any) -> None:
    """Raise DataError if `train_dataset` is there, but has no row."""
    if rows is not None and hasattr(rows, "__len__") and len(rows) == 0:
        raise DataError("train_dataset has no rows; expected at least one. Check the file, filter or split.")


def not_empty(trainer: Any, loader: Any) -> Any:
    """Return `loader`; raise DataError if its rows do not give one batch."""
    try:
        batches = len(loader)
    except TypeError:  # rows without a length
        return loader
    if batches == 0:
        args = trainer.args
        raise DataError(
            f"{type(trainer).__name__}: {len(trainer.train_dataset)} rows do not fill one batch of "
            f"{args.train_batch_size} in {args.world_size} processes, and dataloader_drop_last removes what "
            "is left. Lower per_device_train_batch_size, give more rows, or set dataloader_drop_last=False."
        )
    return loader
