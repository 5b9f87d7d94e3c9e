"""SafeInstr: a few percent of safety instructions are added to the user rows, and plain fine-tuning.

Bianchi et al. 2023, arXiv 2309.07875 (Safety-Tuned LLaMAs): "adding just 3 % safety examples (a few hundred
demonstrations)" to the training set. The rows are added, nothing is replaced. Here they are the run's own
alignment rows, not the paper's 2,000 instructions, and the share is of the user rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.mixing import Row, check_amounts, mix_rows
from holdfast.training.trainer import MethodConfig


@dataclass
class SafeInstrConfig(MethodConfig):
    """How many alignment rows, and whether they replace benign ones; 3 % is the abstract's."""

    alignment_ratio: float = field(
        default=0.03, metadata={"help": "Alignment rows to add, as a share of the user rows."}
    )
    alignment_size: int | None = field(
        default=None, metadata={"help": "The same as a count; given, it decides."}
    )
    replace: bool = field(
        default=False, metadata={"help": "Replace benign rows, so that n stays (false: add to them)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amounts(self.alignment_size, self.alignment_ratio)


def mix(
    user_rows: Any,
    alignment_rows: Any,
    *,
    seed: int,
    folder: Any = None,
    alignment_ratio: float = 0.03,
    alignment_size: int | None = None,
    replace: bool = False,
) -> list[Row]:
    """The user rows with alignment rows among them; `mix_rows` says how. `folder` is not used.

    Raises:
        DataError: fewer alignment rows, or fewer benign rows to replace, than asked for.
    """
    count = round(alignment_ratio * len(user_rows)) if alignment_size is None else alignment_size
    return mix_rows(user_rows, alignment_rows, count, seed=seed, name="safe_instr", replace=replace)


DEFENSE = Defense(
    name="safe_instr",
    label="SafeInstr",
    stages=("user",),
    paper="arXiv 2309.07875",
    needs=("alignment_dataset",),
    config=SafeInstrConfig,
    trainer=SFTTrainer,
    mix=mix,
    plan=(
        {"alignment_size": "{value:,} alignment rows", "alignment_ratio": "{percent:g} % alignment rows"},
        {"replace": ("added", "in place of benign ones")},
    ),
    protocols={"lisa": {"user": {}}},
)
