"""The decision of a gate: has a share risen, is a score high enough, or are there too few prompts to say?

Every decision has a confidence, 0.95 by default. A rise is decided on the same prompts for both models:

- passed: the upper limit of the rise (one-sided, Newcombe's method 10) is at most the permitted rise;
- failed: the rise is larger than permitted, and McNemar's exact one-sided test finds it;
- undecided: neither. `needed` is the number of prompts that would decide, if the shares stayed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from holdfast.evaluation.paired import newcombe, wilson

PASSED, FAILED, UNDECIDED = "passed", "failed", "undecided"
MOST = 10_000_000
"""The largest number of prompts that `needed` considers."""


@dataclass(frozen=True)
class Decision:
    """One score of the new model, in percent, and what was decided.

    Attributes:
        first, second: the scores of the model before and of the new model; `first` is None if only a minimum
            is required.
        difference: second minus first; None without `first`.
        bounds: the one-sided lower and upper limits of the difference, or of `second` without `first`.
        limit: the permitted rise, or the required minimum; None if nothing is required.
        p: one-sided p-value of McNemar's test for a rise; None without `first`.
        n: number of prompts.
        only_first, only_second: number of prompts on which only one of them is (harmful, ...).
        outcome: "passed", "failed" or "undecided"; None if nothing is required.
        needed: number of prompts that would decide; None if it is decided, or if no number would.
    """

    first: float | None
    second: float
    difference: float | None
    bounds: tuple[float, float]
    limit: float | None
    p: float | None
    n: int
    only_first: int | None
    only_second: int | None
    outcome: str | None
    needed: int | None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**vars(self), "bounds": list(self.bounds)}


def rise(
    first: Mapping[str, bool], second: Mapping[str, bool], limit: float | None, confidence: float
) -> Decision | None:
    """Decide whether a share has risen by more than `limit` points, on the prompts (by id) of both models.

    Returns:
        the decision, or None if the models have no prompt in common.
    """
    shared = [id for id in first if id in second]
    if not shared:
        return None
    pairs = [(first[id], second[id]) for id in shared]
    counts = tuple(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False)))
    both, a, b, neither = counts
    n, difference = len(shared), 100 * (counts[2] - counts[1]) / len(shared)
    low, high = newcombe(both, a, b, neither, _quantile(confidence))
    p = rise_by_chance(a, b)
    outcome = None
    if limit is not None:
        if 100 * high <= limit:
            outcome = PASSED
        elif difference > limit and p <= 1 - confidence + 1e-12:
            outcome = FAILED
        else:
            outcome = UNDECIDED
    needed = (
        _prompts_for_rise(counts, limit, confidence) if limit is not None and outcome == UNDECIDED else None
    )
    return Decision(
        100 * (both + a) / n, 100 * (both + b) / n, difference, (100 * low, 100 * high), limit, p, n, a, b,
        outcome, needed,
    )  # fmt: skip


def rise_by_chance(only_first: int, only_second: int) -> float:
    """Return the exact one-sided p-value of McNemar's test for a rise from the first model to the second."""
    n, tail, ways = only_first + only_second, 0, 1
    for k in range(only_first + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return tail / 2**n


def at_least(values: Iterable[bool | float], limit: float | None, confidence: float) -> Decision | None:
    """Decide whether the mean of values is at least `limit`: passed or failed if the one-sided limit says so.

    Args:
        values: right or wrong, or shares in percent.

    Returns:
        the decision, or None if there are no values.
    """
    known = list(values)
    if not known:
        return None
    n, z = len(known), _quantile(confidence)
    if all(isinstance(value, bool) for value in known):
        score, spread = 100 * sum(known) / n, None
    else:
        score = math.fsum(known) / n
        spread = math.sqrt(math.fsum((v - score) ** 2 for v in known) / (n - 1)) if n > 1 else math.inf

    def bounds(count: int) -> tuple[float, float]:
        if spread is None:
            low, high = wilson(score / 100 * count, count, z)
            return 100 * low, 100 * high
        reach = z * spread / math.sqrt(count)
        return max(0.0, score - reach), min(100.0, score + reach)

    outcome, needed = None, None
    if limit is not None:
        least = limit

        def decided(count: int) -> bool:
            return bounds(count)[0] >= least or bounds(count)[1] < least

        if decided(n):
            outcome = PASSED if bounds(n)[0] >= limit else FAILED
        else:
            outcome, needed = UNDECIDED, _first(decided, n)
    return Decision(None, score, None, bounds(n), limit, None, n, None, None, outcome, needed)


def worst(outcomes: Iterable[str | None]) -> str | None:
    """Return "failed" if one failed, else "undecided" if one is, else "passed"; None without outcomes."""
    found = set(outcomes)
    return next((one for one in (FAILED, UNDECIDED, PASSED) if one in found), None)


def _quantile(confidence: float) -> float:
    return NormalDist().inv_cdf(confidence)


def _prompts_for_rise(counts: tuple[int, ...], limit: float, confidence: float) -> int | None:
    """Return the number of prompts that would decide, if the shares of the four kinds of pairs stayed."""
    n, z = sum(counts), _quantile(confidence)
    larger = 100 * (counts[2] - counts[1]) / n > limit

    def decided(count: int) -> bool:
        both, a, b, neither = (count * one / n for one in counts)
        if larger:  # McNemar's test, in the normal approximation with its continuity correction
            return b - a - 1 >= z * math.sqrt(a + b) and 2 ** -(a + b) <= 1 - confidence
        return 100 * newcombe(both, a, b, neither, z)[1] <= limit

    return _first(decided, n)


def _first(decided: Callable[[int], bool], n: int) -> int | None:
    """Return the smallest number above n for which `decided` is true; None if there is none up to MOST."""
    low, high = n, 2 * n
    while not decided(high):
        if high > MOST:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if decided(middle) else (middle, high)
    return high
