"""Questions without answers: the prompts of rows as token ids, and the hidden states at their ends."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.chat.limits import apply_template
from holdfast.errors import DataError
from holdfast.training.layers import plain_model
from holdfast.training.tokenising import IGNORED, as_sequence


def questions(rows: Any, tokenizer: Any, max_length: int | None) -> list[list[int]]:
    """Return the prompt of each row as token ids; answers are left out.

    Accepted rows, in this order: `input_ids` + `labels` (the ids before the first label); `messages` or a
    `prompt` that is a list of messages (rendered up to the last question, with the generation prompt);
    `prompt` as text. A prompt of more than `max_length` tokens loses its beginning, so that its end stays.

    Raises:
        DataError: a row has no prompt.
    """
    rows = as_sequence(rows)
    found = [_question(rows[i], tokenizer, i) for i in range(len(rows))]
    return [ids if max_length is None else ids[-max_length:] for ids in found]


def _question(row: Mapping[str, Any], tokenizer: Any, position: int) -> list[int]:
    if "input_ids" in row:
        labels = list(row.get("labels") or [IGNORED] * len(row["input_ids"]))
        asked = next((i for i, label in enumerate(labels) if label != IGNORED), len(labels))
        ids = list(row["input_ids"])[:asked]
    elif tokenizer is None:
        raise DataError("Rows of text need a tokenizer: give `processing_class=tokenizer`.")
    else:
        ids = tokenizer(_text(row, tokenizer, position), add_special_tokens=False)["input_ids"]
    if not ids:
        raise DataError(f"Row {position} has no question: no token comes before its answer.")
    return ids


def _text(row: Mapping[str, Any], tokenizer: Any, position: int) -> str:
    messages = row.get("messages", row.get("prompt"))
    if isinstance(messages, str):
        return messages
    if messages is None:
        raise DataError(
            f"Row {position} has the columns {', '.join(sorted(row))}; expected prompt, messages, or "
            "input_ids and labels."
        )
    asked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    if not asked:
        raise DataError(f"Row {position} holds messages, but none of the role user.")
    if not tokenizer.chat_template:
        raise DataError(
            f"Row {position} holds messages, but the tokenizer has no chat template. Set "
            "tokenizer.chat_template, or give the prompt as text."
        )
    until = list(messages)[: asked[-1] + 1]
    return apply_template(tokenizer, until, add_generation_prompt=True)


def padded(prompts: Sequence[Sequence[int]], pad: int, device: Any) -> dict[str, Tensor]:
    """Return prompts as a batch: `input_ids` and `attention_mask` of shape [K, L], padded on the right."""
    length = max(map(len, prompts))
    ids = [[*prompt, *[pad] * (length - len(prompt))] for prompt in prompts]
    mask = [[1] * len(prompt) + [0] * (length - len(prompt)) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def last_states(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the last layer's hidden state at the last token of each prompt, float32 of shape [K, d].

    It is the input of the head: transformers applies the final norm first. The forward goes through `model`
    and its wrappers (DDP, FSDP2, PEFT), and the head is part of the graph, so that DDP finds every weight.

    Args:
        batch: `input_ids` and `attention_mask` [K, L], padded on either side.
    """
    mask = batch["attention_mask"]
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
    accepts = inspect.signature(plain_model(model).forward).parameters
    few = {"logits_to_keep": 1} if "logits_to_keep" in accepts else {}
    out = model(**batch, use_cache=False, output_hidden_states=True, **few)
    states = out.hidden_states[-1][torch.arange(len(last), device=last.device), last].float()
    return states + 0 * out.logits[:, -1:, :1].float().sum()
