"""SafeInstr: plain fine-tuning after adding a few percent of safety instructions to the user rows.

Bianchi et al. 2023, arXiv 2309.07875 (Safety-Tuned LLaMAs): "adding just 3 % safety examples (a few hundred
demonstrations)" to the training set. The rows are added and replace nothing. Here they are the run's own
alignment rows, not the paper's 2,000 instructions, and the share is relative to the user rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.mixing import Row, check_amounts, mix_rows, share_of
from holdfast.training.trainer import MethodConfig


@dataclass
class SafeInstrConfig(MethodConfig):
    """Number of alignment rows, and whether they replace benign rows; 3 % is from the abstract."""

    alignment_ratio: float = field(
        default=0.03, metadata={"help": "Alignment rows to add, as a share of the user rows."}
    )
    alignment_size: int | None = field(
        default=None, metadata={"help": "The same as a count; if given, it is used instead."}
    )
    replace: bool = field(
        default=False, metadata={"help": "Replace benign rows, so that n stays the same (false: add rows)."}
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
    """Mix alignment rows into the user rows; see `mix_rows`. `folder` is not used.

    Raises:
        DataError: fewer alignment rows, or fewer benign rows to replace, than requested; or a share of
            less than one row.
    """
    count = alignment_size
    if count is None:
        count = share_of(alignment_ratio, user_rows, "safe_instr")
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
    protocols={"lisa-code": {"user": {}}},
)
