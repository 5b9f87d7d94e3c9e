"""PTST (pure tuning, safe testing): fine-tune without a safety prompt, serve with one.

Lyu et al., NeurIPS 2024, arXiv 2402.18540. Training is plain fine-tuning; only the text before every question
changes afterwards. The method is for models that were aligned with a safety prompt.

The default is the shorter of the two Llama-2 system prompts of the authors' code (`llama-short`). Use
`safety_prompt` for the long one or your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.defenses import Defense
from holdfast.defenses.sft import SFTTrainer
from holdfast.training.trainer import MethodConfig


@dataclass
class PTSTConfig(MethodConfig):
    """The prompt to serve the model with."""

    safety_prompt: str = field(
        default="You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
        "while being safe.",
        metadata={"help": "Text before every question when the model is served."},
    )


def prefix(folder: str | Path, *, safety_prompt: str, **parameters: Any) -> str:
    """Return the text before every question: the safety prompt. `folder` is not used."""
    return safety_prompt


DEFENSE = Defense(
    name="ptst",
    label="PTST",
    stages=("user",),
    paper="arXiv 2402.18540",
    config=PTSTConfig,
    trainer=SFTTrainer,
    prefix=prefix,
    serving="Serve this model with the `safety_prompt` above before every question (its system message).",
    protocols={"lisa-code": {"user": {}}},
)
