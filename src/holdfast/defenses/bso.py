"""BSO (bi-state optimization): alternate alignment and user steps (Lisa, arXiv 2405.18641, section 4.1).

The alignment state minimises the loss on the alignment data for K1 = `alignment_steps` optimizer steps, then
the user state minimises the loss on the user data for K2 = `finetune_steps` steps, and so on. Training starts
in the alignment state. Both states share one optimizer and one learning-rate schedule.

As in the authors' code, the number of steps is that of plain fine-tuning, and the user batches that fall on
alignment steps are consumed unused; `skip_user_batches=False` keeps them. Both sources have Trainer's loader,
with all of its options. Unlike there, the state is a function of the optimizer step, so a switch never falls
inside an accumulation window and a resumed run continues where it stopped. And the sampler chooses the batch
before tokens are counted, so the loss of each state is its own mean cross-entropy.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from holdfast.defenses import Defense
from holdfast.errors import DataError, InputError
from holdfast.machine.seeds import derive_seed
from holdfast.training.batches import LoaderBatches, check_sharded, loader_of
from holdfast.training.penalty import AlignmentRows, AnchorMixin
from holdfast.training.trainer import MethodConfig, RowTrainer

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

    def shortened(self, steps: int) -> Phases:
        """Return phases in the same proportion, about ten periods of which fit into `steps` steps."""
        alignment = max(1, steps * self.alignment_steps // (10 * self.period))
        finetune = max(1, round(alignment * self.finetune_steps / self.alignment_steps))
        return Phases(alignment, finetune)

    def check(self, steps: int, name: str) -> None:
        """Raise InputError if a run of `steps` steps has no user step; warn if it has few."""
        k1, k2 = self.alignment_steps, self.finetune_steps
        user = steps - self.alignment_before(steps)
        if k1 == 0 or k2 == 0 or 2 * user * self.period > steps * k2:
            return
        if user:
            text = (
                "%s: only %d of the run's %d optimizer steps train on user rows (alignment_steps %d, then %s)"
            )
            logging.getLogger(__name__).warning(text, name, user, steps, k1, f"finetune_steps {k2}")
            return
        shorter = self.shortened(steps)
        raise InputError(
            f"{name}: the run has {steps} optimizer steps, and the first alignment phase takes {k1} "
            "(alignment_steps), so it would train on no user row. Set shorter phases, such as "
            f"alignment_steps={shorter.alignment_steps} and finetune_steps={shorter.finetune_steps}, or more "
            "steps (num_train_epochs, max_steps)."
        )


PAPER = Phases(100, 900)
"""The default, which a short run scales; other values are obeyed or refused."""


class PhaseBatchSampler:
    """The batches of an epoch of the user's loader, with alignment batches in the alignment steps.

    An optimizer step has `accumulation` batches, or fewer at the end of an epoch, as in Trainer. All batches
    of a step are in its state. The alignment batches are one sequence over all steps.

    Args:
        user: the user's batches, as one sequence of lists of row numbers; its length is that of an epoch.
        alignment: the same for the alignment rows.
        skip_user_batches: leave out the user batches of alignment steps; otherwise they come later.
    """

    def __init__(
        self,
        user: Any,
        alignment: Any,
        *,
        accumulation: int,
        phases: Phases,
        skip_user_batches: bool = True,
    ):
        self.user, self.alignment = user, alignment
        self.accumulation, self.phases, self.skip_user_batches = accumulation, phases, skip_user_batches
        self.steps = math.ceil(len(user) / accumulation)
        self.missing = self.steps * accumulation - len(user)
        self.epoch = 0
        # After a resume, a sampler that skips batches is around this one. accelerate then calls `set_epoch`
        # of its `sampler`; only newer versions of Trainer call it here.
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.user)

    def __iter__(self) -> Iterator[list[int]]:
        for place in range(len(self)):
            step, within = divmod(place, self.accumulation)
            step += self.epoch * self.steps
            state = self.phases.state(step)
            if state == "user" and self.skip_user_batches:
                yield self.user[self.epoch * len(self) + place]
            else:
                source = self.alignment if state == "alignment" else self.user
                yield source[self._before(step, state) + within]

    def _before(self, step: int, state: State) -> int:
        """The number of batches of `state` before `step`; the last step of an epoch can have fewer."""
        alignment = self.phases.alignment_before(step)
        steps = alignment if state == "alignment" else step - alignment
        ends = range(self.steps - 1, step, self.steps) if self.missing else ()
        return steps * self.accumulation - self.missing * sum(self.phases.state(e) == state for e in ends)


class BSOMixin(AlignmentRows, AnchorMixin):
    """Adds the two states to a `Trainer`; works with any trainer that calls `get_train_dataloader`."""

    def __init__(self: Any, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        config = self.args
        if not self.alignment_dataset and config.alignment_steps > 0:
            raise DataError(f"{type(self).__name__} needs alignment_dataset: rows for the alignment state.")
        self.phases = Phases(config.alignment_steps, config.finetune_steps)
        self.adjusted: dict[str, list[int]] | None = None
        self._loss: dict[str, Tensor | float] = {"alignment": 0.0, "user": 0.0}
        self._steps = {"alignment": 0, "user": 0}
        if self.train_dataset is not None:
            steps = self.set_initial_training_values(config, self.get_train_dataloader())[-1]
            if self.phases == PAPER and steps <= self.phases.alignment_steps:
                self._shorten(steps)
            self.phases.check(steps, type(self).__name__)

    def _shorten(self: Any, steps: int) -> None:
        """Scale the paper's phases, the default, to a run that would end in its first alignment phase."""
        asked, self.phases = self.phases, self.phases.shortened(steps)
        self.adjusted = {
            name: [getattr(asked, name), getattr(self.phases, name)]
            for name in ("alignment_steps", "finetune_steps")
        }
        text = (
            "%s: the run has only %d optimizer steps, so the paper's phases of %d alignment and %d user "
            "steps are scaled to %d and %d. Set alignment_steps and finetune_steps to choose them"
        )
        used = (asked.alignment_steps, asked.finetune_steps, *vars(self.phases).values())
        logging.getLogger(__name__).warning(text, type(self).__name__, steps, *used)

    def get_train_dataloader(self: Any) -> DataLoader:
        """Return Trainer's own loader of the user's rows, with alignment batches in the alignment steps.

        Both sources have Trainer's loader, and so obey all of its options.
        """
        args = self.args
        user, others = super().get_train_dataloader(), []
        check_sharded(self, user)
        first = len(self.train_dataset)
        if self.phases.alignment_steps:
            others = [self._loader_of_alignment()]
        sampler = PhaseBatchSampler(
            LoaderBatches(user),
            *(LoaderBatches(loader, first, self._alignment_epoch) for loader in others or [None]),
            accumulation=args.gradient_accumulation_steps,
            phases=self.phases,
            skip_user_batches=args.skip_user_batches,
        )
        return loader_of(user, others, sampler)

    def _loader_of_alignment(self: Any) -> DataLoader:
        user, self.train_dataset = self.train_dataset, self.alignment_dataset
        try:
            return super().get_train_dataloader()
        finally:
            self.train_dataset = user

    def _alignment_epoch(self: Any, epoch: int) -> int:
        """The number that gives an alignment epoch an order of its own: Trainer adds the seed to it."""
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return derive_seed(seed, "alignment", epoch) - seed

    def anchor_point(self: Any, step: int) -> int:
        """Return the last switch point."""
        return self.phases.start(step)

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """The lengths of the phases, and where they begin."""
        return super().reported(steps) | {
            "alignment_steps": self.phases.alignment_steps,
            "finetune_steps": self.phases.finetune_steps,
            "switch_points": self.phases.switch_points(steps),
            "adjusted": self.adjusted,
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
        "adjusted": "settings that a short run scales, each as [asked, used]; null without any",
    },
    strong={"alignment_steps": 3, "finetune_steps": 4},
    protocols={
        "lisa-code": {"user": {"alignment_steps": 100, "finetune_steps": 900}},
        "lisa-paper": {"user": {"alignment_steps": 100, "finetune_steps": 900}},
        "world": {"user": {"alignment_steps": 10, "finetune_steps": 90}},
        "smollm2": {"user": {"alignment_steps": 4, "finetune_steps": 36}},
    },
)
