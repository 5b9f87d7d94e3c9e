"""BSO (bi-state optimization): alternate alignment and user steps (Lisa, arXiv 2405.18641, section 4.1).

The alignment state minimises the loss on the alignment data for K1 = `alignment_steps` optimizer steps, then
the user state minimises the loss on the user data for K2 = `finetune_steps` steps, and so on. Training starts
in the alignment state. Both states share one optimizer and one learning-rate schedule.

As in the authors' code, the number of steps is that of plain fine-tuning, and the user batches that fall on
alignment steps are consumed unused; `skip_user_batches=False` keeps them. Unlike there, the state is a
function of the optimizer step, so a switch never falls inside an accumulation window and a resumed run
continues where it stopped. And the sampler chooses the batch before tokens are counted, so the loss of each
state is its own mean cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader

from holdfast.defenses import Defense
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.training.penalty import AlignmentRows, AnchorMixin
from holdfast.training.private import batch_size
from holdfast.training.trainer import MethodConfig, RowTrainer, planned_steps

State = Literal["alignment", "user"]


@dataclass
class BSOConfig(MethodConfig):
    """K1 and K2 of the paper, whose default is 100 / 900 (Tables 2 to 6)."""

    alignment_steps: int = field(default=100, metadata={"help": "K1: optimizer steps on alignment data."})
    finetune_steps: int = field(default=900, metadata={"help": "K2: optimizer steps on user data."})
    skip_user_batches: bool = field(
        default=True, metadata={"help": "Consume a user batch in every alignment step, like the authors."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alignment_steps < 0 or self.finetune_steps < 0:
            raise ValueError("alignment_steps and finetune_steps must not be negative")
        if self.alignment_steps + self.finetune_steps == 0:
            raise ValueError("alignment_steps and finetune_steps must not both be 0")


@dataclass(frozen=True)
class Phases:
    """The state machine as a function of the optimizer step: K1 alignment steps, then K2 user steps."""

    alignment_steps: int
    finetune_steps: int

    @property
    def period(self) -> int:
        """K1 + K2."""
        return self.alignment_steps + self.finetune_steps

    def state(self, step: int) -> State:
        """The state of optimizer step `step` (counted from 0)."""
        return "alignment" if step % self.period < self.alignment_steps else "user"

    def start(self, step: int) -> int:
        """The first step of the phase that contains `step`: its switch point."""
        if self.alignment_steps == 0 or self.finetune_steps == 0:
            return 0
        begin = step - step % self.period
        return begin if self.state(step) == "alignment" else begin + self.alignment_steps

    def alignment_before(self, step: int) -> int:
        """The number of alignment steps before `step`."""
        return step // self.period * self.alignment_steps + min(step % self.period, self.alignment_steps)

    def switch_points(self, steps: int) -> list[int]:
        """The steps below `steps` at which a phase begins, including 0."""
        return sorted({self.start(step) for step in range(steps)})


class PhaseBatchSampler:
    """Batches of indices into `ConcatDataset([user, alignment])`, phase by phase.

    Micro-batch t belongs to optimizer step t // micro_batches (gradient accumulation times processes), so
    all processes are in the same state in a step. Each source is an endless stream of seeded permutations;
    the user stream has the order in which `Trainer` itself would draw it.

    accelerate reads the attributes `batch_size` and `drop_last` when it shards the sampler.
    """

    def __init__(
        self,
        user_rows: int,
        alignment_rows: int,
        *,
        batch_size: int,
        micro_batches: int,
        steps: int,
        phases: Phases,
        seed: int,
        skip_user_batches: bool = True,
    ):
        self.rows: dict[State, int] = {"user": user_rows, "alignment": alignment_rows}
        self.batch_size = batch_size
        self.drop_last = True
        self.micro_batches = micro_batches
        self.steps = steps
        self.phases = phases
        self.seed = seed
        self.skip_user_batches = skip_user_batches
        self._order = lru_cache(maxsize=4)(self._draw_order)

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        for micro_batch in range(len(self)):
            step, within = divmod(micro_batch, self.micro_batches)
            state = self.phases.state(step)
            before = self.phases.alignment_before(step)
            if state == "alignment":
                used = before
            else:
                used = step if self.skip_user_batches else step - before
            cursor = used * self.micro_batches + within
            offset = 0 if state == "user" else self.rows["user"]
            first = cursor * self.batch_size
            yield [offset + self._index(state, p) for p in range(first, first + self.batch_size)]

    def _index(self, state: State, position: int) -> int:
        epoch, place = divmod(position, self.rows[state])
        return self._order(state, epoch)[place]

    def _draw_order(self, state: State, epoch: int) -> list[int]:
        seed = self.seed + epoch if state == "user" else derive_seed(self.seed, state, epoch)
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(self.rows[state], generator=generator).tolist()


class BSOMixin(AlignmentRows, AnchorMixin):
    """Adds the two states to a `Trainer`; works with any trainer that calls `get_train_dataloader`."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        if not self.alignment_dataset and config.alignment_steps > 0:
            raise DataError(f"{type(self).__name__} needs alignment_dataset: rows for the alignment state.")
        self.phases = Phases(config.alignment_steps, config.finetune_steps)
        if config.max_steps <= 0 and self.train_dataset is not None:
            config.max_steps = planned_steps(self)
        self._loss: dict[str, Tensor | float] = {"alignment": 0.0, "user": 0.0}
        self._steps = {"alignment": 0, "user": 0}

    def get_train_dataloader(self: Any) -> DataLoader:
        """Return user and alignment rows behind one batch sampler that knows the phases."""
        args = self.args
        sampler = PhaseBatchSampler(
            len(self.train_dataset),
            len(self.alignment_dataset or ()),
            batch_size=batch_size(self),
            micro_batches=args.gradient_accumulation_steps * args.world_size,
            steps=args.max_steps,
            phases=self.phases,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            skip_user_batches=args.skip_user_batches,
        )
        rows: Any = ConcatDataset([self.train_dataset, *filter(None, [self.alignment_dataset])])
        return self.accelerator.prepare(
            DataLoader(
                rows,
                batch_sampler=sampler,
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            )
        )

    def anchor_point(self: Any, step: int) -> int:
        """Return the last switch point."""
        return self.phases.start(step)

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The lengths of the phases, and where they begin."""
        return super().reported(steps) | {
            "alignment_steps": self.phases.alignment_steps,
            "finetune_steps": self.phases.finetune_steps,
            "switch_points": self.phases.switch_points(steps),
        }

    def state_at(self: Any, step: int) -> str | None:
        """The state of an optimizer step."""
        return self.phases.state(step)

    def training_step(self: Any, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of the current state."""
        state = self.phases.state(self.state.global_step)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss[state] = self._loss[state] + loss.detach()
        self._steps[state] += int(self.accelerator.sync_gradients)
        return loss

    def log(self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the state of the last step, and each state's own mean loss since the last entry, to the log."""
        if "loss" in logs:
            logs["state"] = self.phases.state(self.state.global_step - 1)
            for state in ("alignment", "user"):
                if self._steps[state]:  # the mean over all processes, like that of `loss`
                    total = self.accelerator.reduce(self._loss[state], reduction="mean")
                    logs[f"{state}_loss"] = float(total) / self._steps[state]
            self._loss = {"alignment": 0.0, "user": 0.0}
            self._steps = {"alignment": 0, "user": 0}
        super().log(logs, *args, **kwargs)


class BSOTrainer(BSOMixin, RowTrainer):
    """BSO on `transformers.Trainer`; `alignment_dataset` holds the rows of the alignment state."""


DEFENSE = Defense(
    name="bso",
    label="BSO",
    stages=("user",),
    paper="Lisa, arXiv 2405.18641, section 4.1",
    needs=("alignment_dataset",),
    config=BSOConfig,
    trainer=BSOTrainer,
    series={
        "alignment_loss": ("Loss", "alignment rows"),
        "user_loss": ("Loss", "user rows"),
        "drift": ("Drift", "drift"),
    },
    facts={
        "alignment_steps": "optimizer steps of an alignment phase",
        "finetune_steps": "optimizer steps of a user phase",
        "switch_points": "optimizer steps that begin a phase",
    },
    strong={"alignment_steps": 3, "finetune_steps": 4},
    protocols={
        "lisa-code": {"user": {"alignment_steps": 100, "finetune_steps": 900}},
        "lisa-paper": {"user": {"alignment_steps": 100, "finetune_steps": 900}},
        "world": {"user": {"alignment_steps": 10, "finetune_steps": 90}},
    },
)
