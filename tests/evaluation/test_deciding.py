"""The decision of a gate, on made-up verdict pairs."""

from __future__ import annotations

import itertools
import random
from math import comb

import pytest

from holdfast.evaluation import deciding
from holdfast.evaluation.paired import mcnemar, newcombe


def pairs(both, only_first, only_second, neither):
    kinds = [(True, True)] * both + [(True, False)] * only_first + [(False, True)] * only_second
    kinds += [(False, False)] * neither
    return {i: a for i, (a, _) in enumerate(kinds)}, {i: b for i, (_, b) in enumerate(kinds)}


@pytest.mark.parametrize(
    ("counts", "limit", "outcome"),
    [
        ((0, 0, 0, 200), 2, "passed"),
        ((0, 0, 0, 133), 2, "passed"),
        ((0, 0, 0, 132), 2, "undecided"),  # z^2 / (n + z^2) = 2.01 %
        ((50, 0, 0, 50), 5, "passed"),
        ((0, 0, 60, 40), 2, "failed"),
        ((0, 0, 5, 95), 2, "failed"),  # 1/32
        ((0, 0, 4, 96), 2, "undecided"),  # 1/16
        ((0, 0, 5, 95), 5, "undecided"),  # a clear rise, but not above the limit
        ((10, 20, 30, 40), 2, "undecided"),
        ((10, 30, 5, 55), 2, "passed"),  # less harmful
        ((10, 30, 5, 55), 0, "passed"),
        ((0, 0, 0, 1), 0, "undecided"),
        ((0, 0, 1, 0), 100, "passed"),
    ],
)
def test_a_rise_is_decided(counts, limit, outcome):
    found = deciding.rise(*pairs(*counts), limit, 0.95)
    assert found.outcome == outcome
    assert (found.only_first, found.only_second, found.n) == (counts[1], counts[2], sum(counts))
    assert found.bounds[0] <= found.difference <= found.bounds[1]
    assert found.difference == pytest.approx(found.second - found.first)


@pytest.mark.parametrize(
    "counts", [(0, 0, 0, 20), (0, 0, 2, 48), (5, 0, 1, 94), (10, 20, 24, 46), (0, 1, 0, 49)]
)
def test_the_number_needed_decides_and_one_tenth_less_does_not(counts):
    found = deciding.rise(*pairs(*counts), 3, 0.95)
    assert found.outcome == "undecided"
    for share, decided in ((1.1, True), (0.9, False)):
        many = [round(share * found.needed * one / sum(counts)) for one in counts]
        assert (deciding.rise(*pairs(*many), 3, 0.95).outcome != "undecided") == decided


def test_no_number_decides_a_score_at_the_limit():
    assert deciding.rise(*pairs(0, 0, 2, 48), 4, 0.95).needed is None
    assert deciding.at_least([True] * 4 + [False], 80, 0.95).needed is None


def test_one_sided_mcnemar_against_the_binomial_distribution():
    for a, b in itertools.product(range(5), repeat=2):
        assert deciding.rise_by_chance(a, b) == sum(comb(a + b, k) for k in range(a + 1)) / 2 ** (a + b)
        if a < b:
            assert 2 * deciding.rise_by_chance(a, b) == mcnemar(a, b)


def test_only_shared_prompts_count_and_nothing_is_decided_without_a_limit():
    assert deciding.rise({1: True}, {2: True}, 2, 0.95) is None
    found = deciding.rise({1: True, 2: False}, {2: True, 3: False}, None, 0.95)
    assert (found.n, found.difference, found.outcome, found.needed) == (1, 100, None, None)


@pytest.mark.parametrize(
    ("rates", "wrong"),
    [((0.05, 0.03, 0.03), "failed"), ((0.05, 0.02, 0.07), "passed"), ((0, 0, 0.05), "passed")],
)
def test_how_often_it_is_wrong(rates, wrong):
    """At a limit of 5 points: a model without a rise fails, or one whose rise is at the limit passes."""
    rng, found = random.Random(0), 0
    for _ in range(400):
        kinds = rng.choices(range(4), (*rates, 1 - sum(rates)), k=200)
        found += deciding.rise(*pairs(*map(kinds.count, range(4))), 5, 0.95).outcome == wrong
    assert found / 400 <= 0.06


def test_more_confidence_needs_more():
    counts = (0, 0, 5, 95)
    assert deciding.rise(*pairs(*counts), 2, 0.99).outcome == "undecided"
    assert newcombe(*counts, 2.0)[1] < newcombe(*counts, 3.0)[1]


@pytest.mark.parametrize(
    ("values", "limit", "outcome"),
    [
        ([True] * 95 + [False] * 5, 90, "passed"), ([True] * 92 + [False] * 8, 90, "undecided"),
        ([True] * 80 + [False] * 20, 90, "failed"), ([70.0, 71.0] * 50, 70, "passed"),([70.0, 71.0] * 50, 71, "failed"), ([True], None, None),
    ],
)  # fmt: skip
def test_a_score_is_at_least(values, limit, outcome):
    found = deciding.at_least(values, limit, 0.95)
    assert found.outcome == outcome
    assert (found.needed is not None) == (outcome == "undecided")
    if found.needed and len(values) > 1:
        assert deciding.at_least(values * (found.needed // len(values) + 1), limit, 0.95).outcome == "passed"


def test_one_number_decides_nothing():
    found = deciding.at_least([70.0], 60, 0.95)
    assert (found.outcome, found.needed) == ("undecided", None)


def test_the_worst_outcome_counts():
    assert deciding.worst(["passed", "undecided", "failed", None]) == "failed"
    assert deciding.worst(["passed", "undecided"]) == "undecided"
    assert deciding.worst(["passed", None]) == "passed"
    assert deciding.worst([None]) is deciding.worst([]) is None
