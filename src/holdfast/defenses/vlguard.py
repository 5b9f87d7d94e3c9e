"""VLGuard: plain fine-tuning after replacing benign user rows by alignment rows.

Zong et al. 2024, arXiv 2402.02207 (mixed safety fine-tuning, there for vision-language models), as the
baseline of Lisa (arXiv 2405.18641, section 5): 1000 alignment rows are mixed into the user data. As in the
code of Lisa's authors they replace benign rows, so that n, and with it the number of steps, stays the same.

Unlike that code, which takes the first rows of each file, rows are drawn with the seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.mixing import Row, check_amounts, mix_rows, share_of
from holdfast.training.trainer import MethodConfig


@dataclass
class VLGuardConfig(MethodConfig):
    """Number of alignment rows, and whether they replace benign rows; defaults of Lisa, section 5."""

    alignment_size: int = field(default=1000, metadata={"help": "Alignment rows to mix in."})
    alignment_ratio: float | None = field(
        default=None, metadata={"help": "The same as a share of the user rows; if given, it is used instead."}
    )
    replace: bool = field(
        default=True, metadata={"help": "Replace benign rows, so that n stays the same (false: add rows)."}
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
    alignment_size: int = 1000,
    alignment_ratio: float | None = None,
    replace: bool = True,
) -> list[Row]:
    """Mix alignment rows into the user rows; see `mix_rows`. `folder` is not used.

    Raises:
        DataError: fewer alignment rows, or fewer benign rows to replace, than requested; or a share of
            less than one row.
    """
    count = alignment_size
    if alignment_ratio is not None:
        count = share_of(alignment_ratio, user_rows, "vlguard")
    return mix_rows(user_rows, alignment_rows, count, seed=seed, name="vlguard", replace=replace)


DEFENSE = Defense(
    name="vlguard",
    label="VLGuard",
    stages=("user",),
    paper="arXiv 2402.02207",
    needs=("alignment_dataset",),
    config=VLGuardConfig,
    trainer=SFTTrainer,
    mix=mix,
    plan=(
        {"alignment_ratio": "{percent:g} % alignment rows", "alignment_size": "{value:,} alignment rows"},
        {"replace": ("added", "in place of benign ones")},
    ),
    # A fifth of the rows, as the 1000 of 5000 in the Lisa paper.
    protocols={
        "lisa-code": {"user": {"alignment_size": 1000}},
        "world": {"user": {"alignment_size": 200}},
        "smollm2": {"user": {"alignment_size": 200}},
    },
)
