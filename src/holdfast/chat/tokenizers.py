"""The tokenizer of a processor, and the token that fills up the shorter rows of a batch."""

from __future__ import annotations

import logging
from typing import Any


def text_tokenizer(processing: Any) -> Any:
    """Return the tokenizer of a multimodal processor; anything else is returned as it is."""
    if callable(getattr(processing, "convert_ids_to_tokens", None)):
        return processing
    return getattr(processing, "tokenizer", processing)


def embedding_rows(model: Any) -> int | None:
    """Return how many token ids the model's embeddings have; None if that is not known."""
    try:
        embeddings = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    rows = getattr(embeddings, "num_embeddings", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def padding_id(tokenizer: Any, rows: int | None) -> int:
    """Return an id to pad with that the embeddings have: the pad token's, else the end token's, else 0.

    Padding is never attended to, so any id of the model gives the same result. Some tokenizers have an added
    pad token beyond the embeddings (id 32000 of 32000 rows in tokenizers of LLaMA and Vicuna).
    """
    for found in (getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)):
        if found is not None and (rows is None or found < rows):
            return int(found)
    return 0


def with_padding(tokenizer: Any, rows: int | None = None) -> Any:
    """Return the tokenizer with a pad token that the model has; a token that it lacks is replaced.

    transformers copies the pad token's id into the model's configuration, so it must be valid there too.
    """
    usable = padding_id(tokenizer, rows)
    if tokenizer.pad_token_id != usable:
        if tokenizer.pad_token_id is not None:
            logging.getLogger(__name__).warning(
                "The pad token %s has id %d, but the model has %s embeddings: %s pads instead.",
                tokenizer.pad_token, tokenizer.pad_token_id, rows, tokenizer.convert_ids_to_tokens(usable),
            )  # fmt: skip
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable)
    return tokenizer
