"""Bi-directional anchoring: find the benign rows that undo safety most, by their closeness to anchors.

He, Xia and Henderson, "What is in your safe data?", arXiv 2404.01099 (Lisa, arXiv 2405.18641, Table 15). For
a row z of prompt and answer, on the model before fine-tuning,

    score(z) = <v(z), mean of v over harmful anchors> - sum over safe sets S of <v(z), mean of v over S>,

where v(z), scaled to length 1, is the gradient of the mean cross-entropy of the answer, or the last hidden
state of the row's last token. As in the authors' scripts, an anchor's answer is cut to its first ten tokens
for its gradient and a row keeps its whole answer, and there are two sets of safe anchors. Rows are streamed:
in addition to the model, only two vectors for the anchors and the v of one row are in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from holdfast.attacks import Attack
from holdfast.errors import ModelError
from holdfast.machine.files import append_jsonl, read_jsonl
from holdfast.machine.progress import Advance, nobody
from holdfast.training.tokenising import IGNORED, tokenise

Row = Mapping[str, Any]
Vector = Sequence[Tensor | None]
"""A vector as a list of tensors; None stands for a tensor of zeros."""

TOKENS = 10
"""Number of first tokens of an anchor's answer whose loss gives its gradient."""

FLUSHED = 16
"""Number of scores written at once; if the process is killed, at most this many rows are lost."""


def gradients(
    model: Any, tokenizer: Any, weights: Sequence[Tensor], tokens: int | None, max_length: int
) -> Any:
    """v(z) by gradients: d loss / d w for each of `weights`, for the first `tokens` tokens of the answer.

    The row is cut after these tokens, because in a causal model later tokens do not change this gradient.
    `tokens` None keeps the whole answer.
    """

    def vector(row: Row) -> Vector:
        given = tokenise(row, tokenizer, max_length)
        answer = [i for i, label in enumerate(given["labels"]) if label != IGNORED][:tokens]
        ids = torch.tensor([given["input_ids"][: answer[-1] + 1]], device=model.device)
        labels = torch.tensor([given["labels"][: answer[-1] + 1]], device=model.device)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        return torch.autograd.grad(loss, weights, allow_unused=True)

    return vector


def representations(model: Any, tokenizer: Any, max_length: int) -> Any:
    """v(z) by representations: the last hidden state of the row's last token, shape (hidden size,)."""

    @torch.no_grad()
    def vector(row: Row) -> Vector:
        ids = torch.tensor([tokenise(row, tokenizer, max_length)["input_ids"]], device=model.device)
        output = model(
            input_ids=ids, attention_mask=torch.ones_like(ids), output_hidden_states=True, use_cache=False
        )
        return [output.hidden_states[-1][0, -1]]

    return vector


def all_weights(model: Any) -> list[Tensor]:
    """Return the weights of the model itself, made trainable; the weights of its adapters are not included.

    The gradient is the same for adapters added to the base and for adapters stacked on it.
    """
    found = []
    for name, weight in model.named_parameters():
        wanted = "lora_" not in name and weight.is_floating_point()
        weight.requires_grad_(wanted)
        found += [weight] if wanted else []
    return found


def scorer(
    harmful: Sequence[Row],
    safe: Sequence[Sequence[Row]],
    vector: Callable[[Row], Vector],
    anchor: Callable[[Row], Vector] | None = None,
) -> Callable[[Row], dict[str, float | None]]:
    """Return the function that gives score, harmful and safe of a row; the means of the anchors are computed.

    The arguments and the values are those of `score_rows`.
    """
    of_anchor = anchor or vector
    means = _sum_of_means([harmful], of_anchor), _sum_of_means(safe, of_anchor)

    def score(row: Row) -> dict[str, float | None]:
        v = vector(row)
        length = _length(v)
        near = [_dot(v, mean) / length for mean in means] if length else None
        parts = dict(zip(("harmful", "safe"), near or (None, None), strict=True))
        return {"score": near[0] - near[1] if near else None, **parts}

    return score


def score_rows(
    rows: Sequence[Row],
    harmful: Sequence[Row],
    safe: Sequence[Sequence[Row]],
    vector: Callable[[Row], Vector],
    out: Path,
    progress: Advance = nobody,
    flushed: int = FLUSHED,
    anchor: Callable[[Row], Vector] | None = None,
) -> list[dict[str, Any]]:
    """Return the scores of `rows` in order. Each score is appended to `out`, and scores in `out` are reused.

    Args:
        rows, harmful: prompt and completion; each of `rows` has an id.
        safe: sets of such rows, each with the weight -1.
        vector, anchor: v of a row and of an anchor; they are the same if `anchor` is None.
        flushed: number of scores written at once.

    Returns:
        Dicts with id, score, harmful and safe (the two parts of the score; `safe` is the sum over the sets),
        or None if v is zero.

    Raises:
        ModelError: the vectors of the anchors are zero, or not finite.
    """
    found = {row["id"]: row for row in read_jsonl(out)}
    missing = [row for row in rows if row["id"] not in found]
    score = scorer(harmful, safe, vector, anchor) if missing else dict
    fresh: list[dict[str, Any]] = []
    for i, row in enumerate(missing, 1):
        fresh.append({"id": row["id"], **score(row)})
        if len(fresh) == flushed or i == len(missing):
            append_jsonl(out, fresh)
            found |= {row["id"]: row for row in fresh}
            fresh = []
            progress(len(found), len(rows))
    return [found[row["id"]] for row in rows]


def highest(scores: Sequence[Mapping[str, Any]], size: int) -> list[int]:
    """Return the positions of the `size` highest scores in ascending order; among equal scores, the first."""
    known = [i for i, row in enumerate(scores) if row["score"] is not None]
    return sorted(sorted(known, key=lambda i: (-scores[i]["score"], i))[:size])


def _sum_of_means(sets: Sequence[Sequence[Row]], vector: Callable[[Row], Vector]) -> Vector:
    """Return the sum over sets of the mean of v at length 1; a mean is not normalised, as in their code."""
    total: list[Tensor | None] = []
    for rows in sets:
        for v in map(vector, rows):
            length = _length(v) * len(rows)
            if not length:
                raise ModelError(
                    "The gradient or representation of an anchor is zero, so no row is close to it."
                )
            total = total or [None] * len(v)
            for i, part in enumerate(v):
                if part is not None:  # in place, because the gradients of a whole model are large
                    place = total[i]
                    total[i] = part / length if place is None else place.add_(part, alpha=1 / length)
    return total


def _length(v: Vector) -> float:
    squares = [torch.linalg.vector_norm(part, dtype=torch.float32) ** 2 for part in v if part is not None]
    length = float(sum(squares)) ** 0.5
    if not math.isfinite(length):
        raise ModelError("A gradient or representation is not finite. Use bfloat16 or float32 (model.dtype).")
    return length


def _dot(a: Vector, b: Vector) -> float:
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(sum((x.float() * y.float()).sum() for x, y in pairs))


ATTACK = Attack(
    name="bi_directional_anchoring",
    label="Bi-directional anchoring",
    paper="arXiv 2404.01099",
)
