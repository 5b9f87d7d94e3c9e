"""The tokenizer and the chat template that an adapter folder brings along, as many trainers save them."""

from __future__ import annotations

import shutil
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
FAMILY = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "chat_template.json", TEMPLATE,
)  # fmt: skip
"""All files of a tokenizer."""


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


def copy_tokenizer(adapters: Sequence[Path], folder: Path) -> None:
    """Write the tokenizer or the chat template of a chain into a new folder, in place of the one there.

    Raises:
        ModelError: a file cannot be read.
    """
    source = next((adapter for adapter in reversed(adapters) if has_tokenizer(adapter)), None)
    if source is None:
        template = chat_template(adapters)
        if template is not None:
            (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="")
        return
    for name in FAMILY:
        (folder / name).unlink(missing_ok=True)
        if (source / name).exists():
            shutil.copyfile(safe_path(source, name), folder / name)


def check_tokens(adapters: Sequence[Path], rows: int) -> None:
    """Check that a model with `rows` embeddings has one for each token that an adapter's tokenizer added.

    Raises:
        ModelError: a token has none.
    """
    source = next((adapter for adapter in reversed(adapters) if has_tokenizer(adapter)), None)
    if source is None or not (source / "tokenizer.json").exists():
        return
    found = read_config(safe_path(source, "tokenizer.json"))
    added = found.get("added_tokens") if isinstance(found, dict) else None
    beyond = [
        str(token.get("content"))
        for token in (added if isinstance(added, list) else ())
        if isinstance(token, dict) and isinstance(token.get("id"), int) and token["id"] >= rows
    ]
    if beyond:
        raise ModelError(
            f"The tokenizer in {source} has tokens beyond the {rows:,} embeddings of the model: "
            f"{', '.join(beyond[:3])}. Use the adapter instead, or merge it with PEFT."
        )
