"""Scores of training rows that look harmless: how much a row undoes safety, by what a model makes of it.

A judge reads the text of a row and finds nothing in rows that look harmless. These scores ask the model that
is fine-tuned afterwards. A high score is suspicious.

`datashield` (arXiv 2606.00160): with h the hidden state of a layer,

    s(z) = (mean of h over the answer's tokens - h at the last token of the prompt) . v,
    v = mean of that shift over rows that comply - mean of it over rows that refuse, scaled to length 1.

The equation is from notes on the authors' code. The paper was not read; how they choose rows and layer for v
is not known here. Ours: harmful questions with harmful answers, safe rows, and the last layer by default.

`anchoring`: the score by which bi-directional anchoring (arXiv 2404.01099) chooses the rows that undo safety
most; see `holdfast.attacks.anchoring`. As a filter, the same score is turned round: the highest rows are
dropped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from holdfast.errors import DataError, ModelError
from holdfast.machine.files import append_jsonl, each_jsonl
from holdfast.machine.progress import Advance, nobody

Row = Mapping[str, Any]
Value = Callable[[Row], float | None]

FLUSHED = 16
"""Number of scores written at once; if the process is killed, at most this many rows are lost."""


def value_of(
    score: Literal["datashield", "anchoring"],
    model: Any,
    tokenizer: Any,
    harmful: Sequence[Row],
    safe: Sequence[Sequence[Row]],
    *,
    by: str = "representation",
    layer: int = -1,
    max_length: int = 2048,
) -> Value:
    """Return the function that scores one row of `prompt` and `completion`; the model reads the anchors.

    Args:
        harmful: rows that comply with a harmful question.
        safe: sets of rows with safe answers. `datashield` takes them together.
        by: for `anchoring`, v of a row: "representation" or "gradient" (of all weights).
        layer: for `datashield`, the layer of the hidden states; -1 is the last one.

    Raises:
        ModelError: the anchors give no direction, or the model has no such layer.
    """
    from holdfast.attacks import anchoring

    if score == "datashield":
        shift = shifts(model, tokenizer, layer, max_length)
        return _along(shift, harmful, [row for rows in safe for row in rows])
    if by == "gradient":
        weights = anchoring.all_weights(model)
        vector, anchor = (
            anchoring.gradients(model, tokenizer, weights, tokens, max_length)
            for tokens in (None, anchoring.TOKENS)
        )
    else:
        vector = anchor = anchoring.representations(model, tokenizer, max_length)
    scored = anchoring.scorer(harmful, safe, vector, anchor)
    return lambda row: scored(row)["score"]


def shifts(model: Any, tokenizer: Any, layer: int, max_length: int) -> Callable[[Row], Any]:
    """Return the function that gives the mean state of a row's answer minus that at the end of its prompt.

    Raises:
        ModelError: the model has no such layer.
    """
    import torch

    from holdfast.training.tokenising import IGNORED, tokenise

    depth = int(model.config.get_text_config().num_hidden_layers)
    if not (layer == -1 or 1 <= layer <= depth):
        raise ModelError(f"The layer of datashield is {layer}. Expected 1 to {depth}, or -1 for the last.")

    @torch.no_grad()
    def shift(row: Row) -> Any:
        given = tokenise(row, tokenizer, max_length)
        ids = torch.tensor([given["input_ids"]], device=model.device)
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        )
        states = output.hidden_states[layer][0].float()
        answer = [i for i, label in enumerate(given["labels"]) if label != IGNORED]
        found = states[answer].mean(0) - states[max(answer[0] - 1, 0)]
        if not bool(torch.isfinite(found).all()):
            raise ModelError("A hidden state is not finite. Use bfloat16 or float32 (model.dtype).")
        return found

    return shift


def _along(shift: Callable[[Row], Any], comply: Sequence[Row], refuse: Sequence[Row]) -> Value:
    """Return the score along v."""
    means = [sum(shift(row) for row in rows) / len(rows) for rows in (comply, refuse)]
    v = means[0] - means[1]
    length = float(v.norm())
    if not length:
        raise ModelError("The rows that comply and the rows that refuse give the same mean, so no direction.")
    v = v / length
    return lambda row: float(shift(row) @ v)


def score_rows(
    rows: Iterable[Row], value: Callable[[], Value], out: Path, progress: Advance = nobody, total: int = 0
) -> list[float | None]:
    """Return the score of each row, in order.

    Args:
        value: makes the function that scores a row; it is called only if a score is missing.
        out: the file of scores, one line for each row. It is appended to, and its scores are used again.

    Raises:
        DataError: the file holds the scores of other rows.
    """
    found: list[float | None] = []
    known, score = each_jsonl(out), None
    left = iter(rows)
    while batch := list(islice(left, FLUSHED)):
        new = []
        for row in batch:
            line = next(known, None)
            if line is not None and line.get("id") != row["id"]:
                raise DataError(f"{out} holds the score of {line.get('id')}, expected that of {row['id']}.")
            if line is None:
                known = iter(())  # the following lines are written here
                score = score or value()
                line = {"id": row["id"], "score": score(row)}
                new.append(line)
            found.append(line["score"])
        if new:
            append_jsonl(out, new)
        progress(len(found), total or len(found))
    return found


def limit(scores: Sequence[float | None], drop: float | None, threshold: float | None) -> float:
    """Return the score above which rows are dropped.

    Args:
        drop: the share of rows to drop; ties at the limit are kept.
        threshold: the limit itself, instead of a share.
    """
    if threshold is not None:
        return threshold
    assert drop is not None
    known = sorted((score for score in scores if score is not None), reverse=True)
    count = round(drop * len(scores))
    return known[count] if count < len(known) else -math.inf


def dropped(scores: Sequence[float | None], most: float) -> list[bool]:
    """Whether each row is dropped; a row without a score (a zero vector) is kept."""
    return [score is not None and score > most for score in scores]


def facts(scores: Sequence[float | None], gone: Sequence[bool], most: float) -> dict[str, Any]:
    """Return the counts, the limit, and the mean scores of the kept and the dropped rows."""

    def mean(of: bool) -> float | None:
        values = [s for s, drop in zip(scores, gone, strict=True) if s is not None and drop == of]
        return sum(values) / len(values) if values else None

    return {
        "rows": len(scores),
        "kept": len(gone) - sum(gone),
        "flagged": sum(gone),
        "unparsed": 0,
        "threshold": most if math.isfinite(most) else None,
        "mean_score_kept": mean(False),
        "mean_score_dropped": mean(True),
    }


def found_rows(attacked: Sequence[bool | None], gone: Sequence[bool]) -> dict[str, Any] | None:
    """Return how many of the attack's rows a filter finds, in percent; None if no row is known to be one.

    Args:
        attacked: whether each row is the attack's; None if that is not known.
    """
    known = [(bool(mine), drop) for mine, drop in zip(attacked, gone, strict=True) if mine is not None]
    total, flagged = sum(mine for mine, _ in known), sum(drop for _, drop in known)
    if not total:
        return None
    hits = sum(mine and drop for mine, drop in known)
    return {
        "rows": total,
        "found": hits,
        "recall": 100 * hits / total,
        "precision": 100 * hits / flagged if flagged else None,
    }
