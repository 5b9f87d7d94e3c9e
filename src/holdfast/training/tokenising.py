"""Rows to token ids: prompt + completion, messages, or tokenised rows; the loss is on the answers only."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from holdfast.chat.rendering import conversation
from holdfast.chat.tokenizers import text_tokenizer, with_padding
from holdfast.chat.turns import check_complete, from_lists, read_tools, read_turns
from holdfast.errors import DataError

IGNORED = -100
"""The label that cross-entropy ignores."""


def tokenise(
    row: Mapping[str, Any], tokenizer: Any, max_length: int | None, position: int = 0, loss_on: str = "all"
) -> dict[str, list[int]]:
    """Return a row as `input_ids`, `attention_mask` and `labels`: lists of one length, at most max_length.

    Accepted rows, in this order:

    - `input_ids` + `labels`: kept as they are, cut to max_length;
    - `text` + `spans`: a text that holds every special token, and the characters of it that are trained;
    - `messages`, with `tools` if it has them: in the tokenizer's chat template; every answer of the assistant
      is trained, with the template's own end;
    - `prompt` + `completion` as lists of messages: the same, without the answers in the prompt;
    - `prompt` + `completion` as texts that hold every special token.

    The text is tokenised as a whole. If the text before an answer has n tokens alone, the answer begins after
    the first n tokens of the row, as in the authors' code of Lisa, Vaccine, T-Vaccine and Booster (after
    Stanford Alpaca). A token in which the end of the prompt and the start of the completion are merged is
    therefore one of the prompt's n tokens, and is not trained.

    Args:
        position: the row's position in its data set, for messages.
        loss_on: "all" or "last": the answers of a conversation that are trained.

    Raises:
        DataError: the row has other columns, the chat template cannot render it, or no part of its completion
            fits into max_length.
    """
    if "input_ids" in row:
        ids, labels = list(row["input_ids"]), list(row.get("labels", row["input_ids"]))
    elif tokenizer is None:
        raise DataError("Rows of text need a tokenizer: give `processing_class=tokenizer`.")
    else:
        text, spans = _text(row, tokenizer, position, loss_on)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        labels = [IGNORED] * len(ids)
        for start, end in spans if loss_on == "all" else spans[-1:]:
            first = len(tokenizer(text[:start], add_special_tokens=False)["input_ids"])
            whole = end == len(text)
            after = len(ids) if whole else len(tokenizer(text[:end], add_special_tokens=False)["input_ids"])
            labels[first:after] = ids[first:after]
    if all(label == IGNORED for label in labels[1:max_length]):
        raise DataError(
            f"Row {position}: no token of the completion is left within max_length={max_length} "
            f"(the row has {len(ids)} tokens). Raise max_length, or drop the row."
        )
    ids, labels = ids[:max_length], labels[:max_length]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _text(
    row: Mapping[str, Any], tokenizer: Any, position: int, loss_on: str
) -> tuple[str, Sequence[Sequence[int]]]:
    """The text of a row, and the characters of it that are trained."""
    if "text" in row and "spans" in row:
        return row["text"], row["spans"]
    given = {name: row[name] for name in ("messages", "prompt", "completion") if row.get(name) is not None}
    texts = isinstance(given.get("prompt"), str) and isinstance(given.get("completion"), str)
    if "messages" not in given and texts:
        whole = given["prompt"] + given["completion"]
        return whole, [(len(given["prompt"]), len(whole))]
    if "messages" not in given and not {"prompt", "completion"} <= set(given):
        raise DataError(
            f"Row {position} has the columns {', '.join(sorted(row))}; expected prompt and completion, "
            "messages, or input_ids and labels."
        )
    if not tokenizer.chat_template:
        raise DataError(
            f"Row {position} holds messages, but the tokenizer has no chat template. "
            "Set tokenizer.chat_template, or give prompt and completion as texts."
        )
    try:
        turns = given.get("messages")
        turns = read_turns(turns) if turns is not None else from_lists(given["prompt"], given["completion"])
        check_complete(turns)
        tools = read_tools(row.get("tools"))
    except ValueError as error:
        raise DataError(f"Row {position}: {error}.") from error
    where = f"Row {position}: "
    return conversation(turns, tokenizer, where=where, tools=tools, loss_on=loss_on)


def tokenise_all(rows: Any, tokenizer: Any, max_length: int | None, loss_on: str = "all") -> Any:
    """Apply `tokenise` to a data set: a `datasets.Dataset` stays one (in Arrow), others become a list."""
    if rows is None:
        return None
    if hasattr(rows, "map") and hasattr(rows, "column_names"):
        return rows.map(
            lambda row, i: tokenise(row, tokenizer, max_length, i, loss_on),
            with_indices=True,
            remove_columns=[c for c in rows.column_names if c not in ("input_ids", "labels")],
            load_from_cache_file=False,
        )
    return [tokenise(rows[i], tokenizer, max_length, i, loss_on) for i in range(len(rows))]


def prepare_rows(rows: Any, tokenizer: Any, max_length: int | None, loss_on: str = "all") -> Any:
    """Return rows of any accepted kind as tokenised rows; a dict of data sets stays a dict."""
    if rows is None:
        return None
    if isinstance(rows, dict):
        return {name: prepare_rows(part, tokenizer, max_length, loss_on) for name, part in rows.items()}
    return tokenise_all(as_sequence(rows), text_tokenizer(tokenizer), max_length, loss_on)


def rows_fingerprint(rows: Any, samples: int = 256) -> str:
    """Return a hash of tokenised rows: their number, and ids and labels of up to `samples` rows."""
    digest = hashlib.sha256(str(len(rows)).encode())
    for i in range(0, len(rows), max(1, len(rows) // samples)):
        row = rows[i]
        digest.update(str([list(row["input_ids"]), list(row.get("labels") or ())]).encode())
    return digest.hexdigest()[:12]


def collator(tokenizer: Any, rows: int | None = None) -> Any:
    """Return a collator that right-pads `tokenise`d rows: ids with the pad token, labels with IGNORED.

    Args:
        rows: the number of token ids that the model has; a pad token beyond them is replaced.
    """
    from transformers import DataCollatorForSeq2Seq

    padding = with_padding(text_tokenizer(tokenizer), rows)
    return DataCollatorForSeq2Seq(padding, padding=True, label_pad_token_id=IGNORED)


def equal_lengths(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The collator of rows without a tokenizer: as transformers' own, for rows of one length.

    Raises:
        DataError: the rows of a batch have different lengths, so that some must be padded.
    """
    from transformers import default_data_collator

    lengths = sorted({len(row["input_ids"]) for row in rows if "input_ids" in row})
    if len(lengths) > 1:
        raise DataError(
            f"The rows of a batch have different lengths ({lengths[0]} to {lengths[-1]} tokens), and no "
            "tokenizer says how to pad them. Give `processing_class=tokenizer`, a `data_collator`, or "
            "rows of one length."
        )
    return default_data_collator(list(rows))


def as_sequence(rows: Any) -> Sequence[Any]:
    """Return a data set that has a length and an index, or raise an error if it lacks one of them."""
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        raise DataError(
            f"Expected a data set with a length and an index, found {type(rows).__name__}. "
            "Turn a streamed data set into a list or a datasets.Dataset first."
        )
    return rows
