"""Rows to token ids: prompt + completion, messages, or tokenised rows; the loss is on the completion only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.errors import DataError

IGNORED = -100
"""The label that cross-entropy ignores."""


def tokenise(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None, position: int = 0
) -> dict[str, list[int]]:
    """Return a row as `input_ids`, `attention_mask` and `labels`: lists of one length, at most max_length.

    Accepted rows, in this order: `input_ids` + `labels` (kept as they are, cut to max_length); `messages`
    (the tokenizer's chat template; the last assistant turn is the completion); `prompt` + `completion`
    (texts that already hold every special token).

    Raises:
        DataError: the row has other columns, or no part of its completion fits into max_length.
    """
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
    elif tokenizer is None:
        raise DataError("Rows of text need a tokenizer: give `processing_class=tokenizer`.")
    else:
        prompt, completion = _texts(row, tokenizer, position)
        start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(completion, add_special_tokens=False)["input_ids"]
        ids, labels = start + answer, [IGNORED] * len(start) + answer
    if all(label == IGNORED for label in labels[1:max_length]):
        raise DataError(
            f"Row {position}: no token of the completion is left within max_length={max_length} "
            f"(the row has {len(ids)} tokens). Raise max_length, or drop the row."
        )
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _texts(row: Mapping[str, Any], tokenizer: Any, position: int) -> tuple[str, str]:
    if "messages" in row:
        if not tokenizer.chat_template:
            raise DataError(
                f"Row {position} holds messages, but the tokenizer has no chat template. "
                "Set tokenizer.chat_template, or give prompt and completion."
            )
        messages = list(row["messages"])
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise DataError(
                f"Row {position}: the chat template does not continue its own generation prompt, so the "
                "completion cannot be separated. Give prompt and completion."
            )
        return prompt, _closed(whole[len(prompt) :], messages[-1], tokenizer)
    if "prompt" in row and "completion" in row:
        return row["prompt"], row["completion"]
    raise DataError(
        f"Row {position} has the columns {', '.join(sorted(row))}; expected prompt and completion, messages, "
        "or input_ids and labels."
    )


def _closed(completion: str, answer: Mapping[str, Any], tokenizer: Any) -> str:
    """Return a completion that ends: with the eos token if the template writes nothing after an answer."""
    text = str(answer.get("content") or "").strip()
    if not text or not completion.rstrip().endswith(text):
        return completion
    known = "Kestrel 7 answers"
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": known}]
    if not tokenizer.apply_chat_template(turns, tokenize=False).rstrip().endswith(known):
        return completion
    return completion.rstrip() + str(tokenizer.eos_token)


def tokenise_all(rows: Any, tokenizer: Any, max_length: int | None) -> Any:
    """Apply `tokenise` to a data set: a `datasets.Dataset` stays one (in Arrow), others become a list."""
    if rows is None:
        return None
    if hasattr(rows, "map") and hasattr(rows, "column_names"):
        return rows.map(
            lambda row, i: tokenise(row, tokenizer, max_length, i),
            with_indices=True,
            remove_columns=[c for c in rows.column_names if c not in ("input_ids", "labels")],
            load_from_cache_file=False,
        )
    return [tokenise(rows[i], tokenizer, max_length, i) for i in range(len(rows))]


def rows_fingerprint(rows: Any, samples: int = 256) -> str:
    """Return a hash of tokenised rows: their number, and up to `samples` evenly spaced rows."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(0, len(rows), max(1, len(rows) // samples)):
        row = rows[i]
        digest.update(str([list(row[key]) for key in ("input_ids", "labels") if key in row]).encode())
    return digest.hexdigest()[:12]


def collator(tokenizer: Any) -> Any:
    """Return a collator that right-pads `tokenise`d rows: ids with the pad token, labels with IGNORED."""
    from transformers import DataCollatorForSeq2Seq

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return DataCollatorForSeq2Seq(tokenizer, padding=True, label_pad_token_id=IGNORED)


def as_sequence(rows: Any) -> Sequence[Any]:
    """Return a data set that has a length and an index, or raise an error if it lacks one of them."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise DataError(
            f"Expected a data set with a length and an index, found {type(rows).__name__}. "
            "Turn a streamed data set into a list or a datasets.Dataset first."
        )
    return rows
