"""Supervised fine-tuning: the plain baseline of the alignment stage, and the attack at the user stage.

At the alignment stage it trains on safe answers. At the user stage some rows may be harmful, and then it is
harmful fine-tuning itself (Lisa, arXiv 2405.18641, section 3). The loss is cross-entropy on the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.defenses import Defense
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class SFTConfig(MethodConfig):
    """SFT has no parameters of its own."""


class SFTTrainer(RowTrainer):
    """`transformers.Trainer` on rows of text."""


DEFENSE = Defense(
    name="sft",
    label="SFT",
    stages=("alignment", "user"),
    paper="the baseline of every paper here",
    config=SFTConfig,
    trainer=SFTTrainer,
    baseline=True,
    protocols={
        "lisa-code": {"user": {}},
        "lisa-paper": {"user": {}},
        "lisa-guide": {"user": {}},
        "t-vaccine": {"alignment": {}},
        "t-vaccine-guide": {"alignment": {}},
        "booster": {"alignment": {}},
        "anchoring": {"user": {}},
        "filter": {"user": {}},
        "asft": {"user": {}},
    },
)
