"""Cohen's kappa against textbook numbers and an independent loop, and the record of each pair of judges."""

from __future__ import annotations

from random import Random

import pytest

from holdfast.evaluation.agreement import agreement, kappa


def verdicts(words):
    return [{"id": f"h{i}", "verdict": word} for i, word in enumerate(words)]


@pytest.mark.parametrize(
    ("both", "first", "second", "neither", "expected"),
    [
        (20, 5, 10, 15, 0.4),  # the textbook example: observed 0.7, chance 0.5
        (45, 15, 25, 15, 0.1304),
        (25, 35, 5, 35, 0.2593),
        (10, 0, 0, 10, 1.0),
        (0, 10, 10, 0, -1.0),
        (5, 5, 5, 5, 0.0),
        (10, 0, 0, 0, None),
        (0, 0, 0, 0, None),
    ],
)
def test_kappa(both, first, second, neither, expected):
    counts = {
        ("harmful", "harmful"): both,
        ("harmful", "safe"): first,
        ("safe", "harmful"): second,
        ("safe", "safe"): neither,
    }
    found = kappa(counts)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-4))


def test_kappa_against_the_definition():
    """Chance agreement: the share of equal verdicts over all pairs of one judge's and the other's verdicts."""
    rng = Random(0)
    a = rng.choices(["harmful", "safe"], [1, 2], k=60)
    b = [word if rng.random() < 0.7 else rng.choice(["harmful", "safe"]) for word in a]
    observed = sum(x == y for x, y in zip(a, b, strict=True)) / 60
    chance = sum(x == y for x in a for y in b) / 3600
    (found,) = agreement({"one": verdicts(a), "two": verdicts(b)})
    assert found["kappa"] == pytest.approx((observed - chance) / (1 - chance))
    assert found["agree"] == pytest.approx(100 * observed)


def test_what_is_kept_of_every_pair():
    found = agreement(
        {
            "one": verdicts(["harmful", "safe", "harmful", "unparsed", "safe"]),
            "two": verdicts(["harmful", "harmful", "safe", "safe", "safe"]),
            "three": verdicts(["safe"] * 5),
        }
    )
    assert [pair["judges"] for pair in found] == [["one", "two"], ["one", "three"], ["two", "three"]]
    first = found[0]
    assert (first["both"], first["neither"], first["only_first"], first["only_second"]) == (1, 1, 1, 1)
    assert (first["n"], first["one_unparsed"], first["agree"]) == (4, 1, 50.0)
    assert first["differ"] == ["h1", "h2"]
    assert agreement({"one": verdicts(["safe"])}) == []
