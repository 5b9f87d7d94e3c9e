"""One-shot patch: train what was fine-tuned on one refusal, or on up to eight (ICLR 2026, arXiv 2601.01887).

After the user stage, its weights (the adapter, or all weights) are trained further with cross-entropy on
`shots` rows, in one batch: 10 epochs, which are 10 optimizer steps, at learning rate 2e-5. The rows are drawn
with the seed from the alignment rows. They should be refusals: answers that are only safe teach no refusal.

A run trains it as a step of its own, with checkpoints, on top of the adapters that the user's was trained on.

The paper's text and code were not read: the settings come from notes. They do not say which row the paper
takes (its abstract says that one is enough), nor whether it trains an adapter or all weights, for which 2e-5
is usual; an adapter may need a larger learning rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.errors import DataError
from holdfast.machine.seeds import derive_seed
from holdfast.training.trainer import MethodConfig

MOST = 8
"""The largest number of rows: with more, it is plain training on alignment rows."""


@dataclass
class OneShotConfig(MethodConfig):
    """One row is the paper's setting."""

    shots: int = field(default=1, metadata={"help": "Alignment rows to train on, from 1 to 8."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.shots <= MOST:
            raise ValueError(f"shots must be from 1 to {MOST}, found {self.shots}")


def mix(
    rows: Sequence[Mapping[str, Any]], alignment_rows: Any, *, seed: int, folder: Any = None, shots: int = 1
) -> list[Mapping[str, Any]]:
    """Return `shots` of the rows, drawn with the seed, in their order.

    Raises:
        DataError: there are fewer.
    """
    if len(rows) < shots:
        raise DataError(
            f"The one-shot patch needs shots={shots} alignment rows, found {len(rows)}. Give more, or lower "
            "shots."
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "one_shot"))
    return [rows[i] for i in sorted(torch.randperm(len(rows), generator=generator)[:shots].tolist())]


DEFENSE = Defense(
    name="one_shot",
    label="One-shot patch",
    stages=("post_hoc",),
    paper="ICLR 2026, arXiv 2601.01887",
    needs=("alignment_dataset",),
    config=OneShotConfig,
    trainer=SFTTrainer,
    mix=mix,
    plan=({"shots": "alignment rows: {value}"},),
    facts={"rows": "alignment rows that it was trained on"},
    headline="trained on alignment rows: {rows}",
    protocols={
        "lisa-code": {"post_hoc": {"shots": 1}},
        # At 2e-5, ten steps change the tiny model's adapter too little.
        "world": {"post_hoc": {"shots": 1, "training": {"learning_rate": 1e-3}}},
    },
)
