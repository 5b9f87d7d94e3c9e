"""Supervised fine-tuning: the alignment stage's plain baseline, and the attack at the user stage.

At the alignment stage it trains on safe answers; at the user stage, on rows of which some may be harmful,
it is harmful fine-tuning itself (Lisa, arXiv 2405.18641, section 3). Cross-entropy on the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.defenses import Defense
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class SFTConfig(MethodConfig):
    """No parameter of its own."""


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
        "lisa": {"user": {}},
        "refusal": {"alignment": {}},
        "anchoring": {"user": {}},
        "filter": {"user": {}},
    },
)
