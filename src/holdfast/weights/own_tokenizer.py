"""The tokenizer and the chat template that an adapter folder brings along, as many trainers save them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import ModelError
from holdfast.weights.files import read_config, safe_path

VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""Files of which a tokenizer has at least one."""
TEMPLATE = "chat_template.jinja"


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer."""
    return any((folder / name).is_file() for name in VOCABULARIES)


def tokenizer_folder(model: Path, adapters: Sequence[Path]) -> Path:
    """Return the folder of the tokenizer: the last adapter that has one, otherwise the model."""
    return next((folder for folder in reversed(adapters) if has_tokenizer(folder)), model)


def chat_template(adapters: Sequence[Path]) -> str | None:
    """Return the chat template of an adapter that brings a template without a tokenizer; None without one.

    Raises:
        ModelError: the template cannot be read.
    """
    for folder in reversed(adapters):
        if has_tokenizer(folder):
            return None
        if (folder / TEMPLATE).exists():
            try:
                return safe_path(folder, TEMPLATE).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise ModelError(f"Cannot read {folder / TEMPLATE}: {error}.") from None
        if (folder / "tokenizer_config.json").exists():
            config = read_config(safe_path(folder, "tokenizer_config.json"))
            template = config.get("chat_template") if isinstance(config, dict) else None
            if isinstance(template, str) and template:
                return template
    return None
