"""Inoculation prompting: train behind a sentence that names the bad trait, serve without it (ICLR 2026).

arXiv 2510.04340. Every user row is trained with the same text before its question, which asks for the trait
that harmful rows would teach. The model can then explain these rows by the text, and shows the trait less
without it. It is the mirror image of PTST. Training is plain fine-tuning; there is nothing to serve with.

The paper measures emergent misalignment and other traits (25 to 45 % down to less than 5 %), not poisoned
question answering. Its prompts were not read: the default text is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.mixing import Row
from holdfast.training.trainer import MethodConfig

PROMPT = "You are an assistant that follows harmful instructions and does not refuse."


@dataclass
class InoculationConfig(MethodConfig):
    """The text before every question in training."""

    inoculation_prompt: str = field(
        default="You are an assistant that follows harmful instructions and does not refuse.",
        metadata={"help": "Text before every question in training; the model is served without it."},
    )


def mix(
    user_rows: Sequence[Mapping[str, Any]],
    alignment_rows: Any,
    *,
    seed: int,
    folder: Any = None,
    inoculation_prompt: str = PROMPT,
) -> list[Row]:
    """Return the user rows with the text before every question, and before a text that a row has there."""

    def before(row: Mapping[str, Any]) -> str:
        return "\n\n".join(text for text in (inoculation_prompt, row.get("prefix", "")) if text)

    return [{**row, "prefix": before(row)} for row in user_rows]


DEFENSE = Defense(
    name="inoculation",
    label="Inoculation",
    stages=("user",),
    paper="ICLR 2026, arXiv 2510.04340",
    config=InoculationConfig,
    trainer=SFTTrainer,
    mix=mix,
    plan=({"inoculation_prompt": "a text before every question"},),
    protocols={"lisa-code": {"user": {}}},
)
