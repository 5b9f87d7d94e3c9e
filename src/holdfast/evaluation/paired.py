"""Compare two models on the same prompts: how much their scores differ, and whether that could be chance.

For right or wrong, and harmful or safe: the exact McNemar test (McNemar 1947; two-sided binomial over the
prompts on which the two differ) and Newcombe's interval for a difference of paired shares (Statistics in
Medicine 17, 2635-2650, 1998, method 10). For numbers (ROUGE-1, ratings, shares over seeds): a test that flips
the signs of the differences at random, and the bootstrap over prompts, both seeded. All of this is about
these trained models on prompts like these, not about a training with another seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

Z95 = 1.959964
DRAWS = 10_000
"""Number of random sign patterns, and of bootstrap samples."""
EXACT = 12
"""Up to this many differences that are not 0, every pattern of signs is tried."""
CHUNK = 500


@dataclass(frozen=True)
class Paired:
    """The second model compared with the first, in percentage points or in the unit of the numbers.

    Attributes:
        n: number of prompts with a value from both models.
        difference: second minus first.
        interval: 95 %; None for numbers from a single prompt.
        p: two-sided, for the hypothesis of no difference.
        only_first, only_second: prompts where only one of them is (harmful, right, ...); None for numbers.
    """

    n: int
    first: float
    second: float
    difference: float
    interval: tuple[float, float] | None
    p: float
    only_first: int | None = None
    only_second: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {**vars(self), "interval": list(self.interval) if self.interval else None}


def compare(first: Mapping[str, bool | float], second: Mapping[str, bool | float]) -> Paired | None:
    """Compare on the prompts (by id) for which both have a value; None if there are none.

    The values are all true or false (shares, in percent), or all numbers.
    """
    shared = [id for id in first if id in second]
    if not shared:
        return None
    pairs = [(first[id], second[id]) for id in shared]
    if all(isinstance(value, bool) for pair in pairs for value in pair):
        return _shares([(a is True, b is True) for a, b in pairs])
    return _numbers([(float(a), float(b)) for a, b in pairs])


def mcnemar(only_first: int, only_second: int) -> float:
    """Return the exact two-sided p-value of McNemar's test, from the prompts on which the models differ."""
    n, tail, ways = only_first + only_second, 0, 1
    for k in range(min(only_first, only_second) + 1):
        tail += ways
        ways = ways * (n - k) // (k + 1)
    return min(1.0, 2 * tail / 2**n)


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson 95 % interval of a share, as shares of 1 (E. B. Wilson, JASA 22, 1927)."""
    share, z2 = successes / n, z * z
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def newcombe(
    both: float, only_first: float, only_second: float, neither: float, z: float = Z95
) -> tuple[float, float]:
    """Return the interval of the second share minus the first, as shares of 1 (Newcombe's method 10).

    It is the 95 % interval unless another quantile `z` is given.
    """
    n = both + only_first + only_second + neither
    p1, p2 = (both + only_first) / n, (both + only_second) / n
    (low1, high1), (low2, high2) = wilson(both + only_first, n, z), wilson(both + only_second, n, z)
    spread = (both + only_first) * (only_second + neither) * (both + only_second) * (only_first + neither)
    cross = both * neither - only_first * only_second
    corrected = max(cross - n / 2, 0.0) if cross > 0 else float(cross)  # a continuity correction
    phi = corrected / math.sqrt(spread) if spread else 0.0

    def reach(up: float, down: float) -> float:
        return math.sqrt(max(0.0, up * up - 2 * phi * up * down + down * down))

    difference = p2 - p1
    return difference - reach(p2 - low2, high1 - p1), difference + reach(high2 - p2, p1 - low1)


def student(t: float, freedom: float) -> float:
    """Return the two-sided p-value of Student's t (Student 1908) for any degrees of freedom above 0."""
    if math.isinf(t):
        return 0.0
    return _beta(freedom / 2, 0.5, freedom / (freedom + t * t))


@cache
def student_quantile(freedom: float, level: float = 0.95) -> float:
    """Return the t whose interval from -t to t has the probability `level` by Student's t distribution."""
    low, high = 0.0, 2.0
    while student(high, freedom) > 1 - level:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if student(middle, freedom) > 1 - level else (low, middle)
    return high


def _beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22)."""
    if x <= 0 or x >= 1:
        return min(1.0, max(0.0, x))
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast below this
        return 1 - _beta(b, a, 1 - x)
    fraction = 1.0
    for m in range(200, 0, -1):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        fraction = 1 + even / (1 + odd / fraction)
    first = -(a + b) * x / (a + 1)
    scale = math.exp(
        a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    )
    return scale / a / (1 + first / fraction)


def holm(values: Sequence[float]) -> list[float]:
    """Correct p-values for multiple tests (Holm 1979): together they are valid at 5 %."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[i]))
        corrected[i] = highest
    return corrected


def _shares(pairs: Sequence[tuple[bool, bool]]) -> Paired:
    n, counts = len(pairs), {pair: pairs.count(pair) for pair in set(pairs)}
    both, a, b = (counts.get(pair, 0) for pair in ((True, True), (True, False), (False, True)))
    low, high = newcombe(both, a, b, n - both - a - b)
    first, second = 100 * (both + a) / n, 100 * (both + b) / n
    return Paired(n, first, second, 100 * (b - a) / n, (100 * low, 100 * high), mcnemar(a, b), a, b)


def _numbers(pairs: Sequence[tuple[float, float]]) -> Paired:
    n = len(pairs)
    first, second = math.fsum(a for a, _ in pairs) / n, math.fsum(b for _, b in pairs) / n
    differences = [b - a for a, b in pairs]
    interval = bootstrap(differences) if n > 1 else None
    return Paired(n, first, second, math.fsum(differences) / n, interval, flipped(differences))


def flipped(differences: Sequence[float]) -> float:
    """Return how often random signs move the sum of the differences at least as far from 0 as it is.

    Exact for few differences, otherwise by DRAWS patterns (plus the observed one, so it is never 0).
    """
    import numpy

    moved = numpy.array([d for d in differences if d != 0.0])
    if not len(moved):
        return 1.0
    edge = abs(moved.sum()) * (1 - 1e-9)  # sums in another order are rounded differently
    if len(moved) <= EXACT:
        patterns = (numpy.arange(2 ** len(moved))[:, None] >> numpy.arange(len(moved))) & 1
        return float((abs((2 * patterns - 1) @ moved) >= edge).mean())
    generator, hits = numpy.random.default_rng(0), 0
    for _ in range(DRAWS // CHUNK):
        signs = generator.choice(numpy.array([-1.0, 1.0]), (CHUNK, len(moved)))
        hits += int((abs(signs @ moved) >= edge).sum())
    return (hits + 1) / (DRAWS + 1)


def bootstrap(differences: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over prompts that are resampled with replacement."""
    import numpy

    values, generator = numpy.array(differences), numpy.random.default_rng(0)
    means = [
        values[generator.integers(0, len(values), (CHUNK, len(values)))].mean(axis=1)
        for _ in range(DRAWS // CHUNK)
    ]
    low, high = numpy.quantile(numpy.concatenate(means), (0.025, 0.975))
    return float(low), float(high)
