"""Paired comparisons against published numbers, plain loops and simulations; and files of two models."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from typer.testing import CliRunner

import tiny
from holdfast.cli.app import app
from holdfast.errors import ComparisonError, DataError
from holdfast.evaluation import paired
from holdfast.machine.files import read_json, write_json
from holdfast.measuring.comparing import compare


@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(4.302653, 2, 0.05), (-2.776445, 4, 0.05), (12.7062, 1, 0.05), (2.228139, 10, 0.05), (1.959964, 1e7, 0.05),
     (0, 3, 1.0), (9.924843, 2, 0.01), (3.182446, 3, 0.05), (math.inf, 2, 0.0)],
)  # fmt: skip
def test_student(t, freedom, p):
    """Against a table of quantiles."""
    assert paired.student(t, freedom) == pytest.approx(p, abs=2e-6)


def test_published_tables():
    """Cavo et al., as the R package contingencytables has it; a test on sputum of Armitage and Berry (StatsDirect)."""
    assert paired.newcombe(59, 6, 16, 80) == pytest.approx((0.0046, 0.1186), abs=5e-5)
    assert paired.mcnemar(12, 2) == pytest.approx(0.0129, abs=5e-5)


@pytest.mark.parametrize(("a", "b"), [(0, 0), (0, 5), (3, 3), (1, 9), (7, 2)])
def test_mcnemar_against_every_outcome(a, b):
    """Each differing prompt falls to either side with probability 1/2: the share of outcomes at least as uneven."""
    outcomes = list(itertools.product((0, 1), repeat=a + b))
    uneven = sum(abs(2 * sum(one) - a - b) >= abs(a - b) for one in outcomes)
    assert paired.mcnemar(a, b) == pytest.approx(uneven / len(outcomes))
    assert paired.mcnemar(a, b) == paired.mcnemar(b, a)


def test_mcnemar_of_many_prompts():
    assert paired.mcnemar(3000, 3000) == 1.0
    assert 0 < paired.mcnemar(0, 900) < 1e-200
    normal = math.erfc((abs(2200 - 2000) - 1) / math.sqrt(4200) / math.sqrt(2))
    assert paired.mcnemar(2000, 2200) == pytest.approx(normal, rel=0.01)


def test_the_interval_is_that_of_the_other_direction():
    low, high = paired.newcombe(10, 4, 9, 20)
    assert paired.newcombe(10, 9, 4, 20) == pytest.approx((-high, -low))
    assert paired.newcombe(5, 0, 0, 0)[0] < 0 < paired.newcombe(5, 0, 0, 0)[1], (
        "no difference, but few prompts"
    )


def test_the_interval_covers():
    """For 1500 pairs of models that differ by 10 points and have correlated answers."""
    rng, held = random.Random(0), 0
    for _ in range(1500):
        counts = dict.fromkeys(range(4), 0)
        for one in rng.choices(range(4), (0.3, 0.05, 0.15, 0.5), k=120):
            counts[one] += 1
        low, high = paired.newcombe(*counts.values())
        held += low <= 0.10 <= high
    assert 0.93 <= held / 1500 <= 0.975


def test_pairing_finds_what_two_intervals_do_not():
    """The same prompts are hard for both: the difference is clear, though each interval contains the other score."""
    first = {f"p{i}": i < 40 for i in range(100)}
    second = {f"p{i}": i < 48 for i in range(100)}
    found = paired.compare(first, second)
    assert (found.first, found.second, found.difference, found.n) == (40.0, 48.0, 8.0, 100)
    assert (found.only_first, found.only_second) == (0, 8)
    assert found.p == pytest.approx(2 / 2**8)
    assert 0 < found.interval[0] < 8 < found.interval[1]
    low, high = paired.wilson(40, 100)
    assert low < 0.48 < high


def test_only_shared_prompts_count():
    assert paired.compare({"a": True}, {"b": False}) is None
    found = paired.compare({"a": True, "b": True, "c": True}, {"b": False, "c": True, "d": True})
    assert (found.n, found.difference) == (2, -50.0)


def test_random_signs_against_every_pattern():
    rng = random.Random(1)
    for n in (1, 4, 9):
        moved = [rng.gauss(1, 1) for _ in range(n)]
        patterns = itertools.product((-1, 1), repeat=n)
        sums = [abs(sum(s * d for s, d in zip(signs, moved, strict=True))) for signs in patterns]
        expected = sum(one >= abs(sum(moved)) - 1e-12 for one in sums) / len(sums)
        assert paired.flipped([0.0, *moved, 0.0]) == pytest.approx(expected)
    assert paired.flipped([0.0, 0.0]) == 1.0
    many = [rng.gauss(0, 1) for _ in range(60)]
    normal = math.erfc(abs(sum(many)) / math.sqrt(sum(d * d for d in many)) / math.sqrt(2))
    assert paired.flipped(many) == pytest.approx(normal, abs=0.02)
    assert paired.flipped(many) == paired.flipped(many), "seeded"
    assert 0 < paired.flipped([1.0] * 60) <= 1e-4, "never 0"


def test_numbers_are_compared_by_their_means():
    rng = random.Random(2)
    first = {str(i): rng.random() * 100 for i in range(80)}
    second = {id: value + 3 + rng.gauss(0, 5) for id, value in first.items()}
    found = paired.compare(first, second)
    moved = [second[id] - first[id] for id in first]
    mean = sum(moved) / 80
    error = math.sqrt(sum((d - mean) ** 2 for d in moved) / 79 / 80)
    assert found.difference == pytest.approx(mean)
    assert found.interval == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.2)
    assert found.p < 0.001
    assert found.only_first is None
    assert paired.compare({"a": 1.0}, {"a": 2.0}).interval is None


def test_holm():
    assert paired.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert paired.holm([0.5, 0.9]) == [1.0, 1.0]
    assert paired.holm([]) == []


# Files


def verdicts(path, words, stamp="keyword@1", **more):
    tiny.write_jsonl(path, [{"id": f"h{i}", "verdict": word} for i, word in enumerate(words)])
    write_json(path.with_name(f"{path.name}.json"), {"made": {"judge_stamp": stamp}})
    return path


def test_two_files_of_verdicts(tmp_path):
    first = verdicts(tmp_path / "a.jsonl", ["harmful"] * 9 + ["safe"] * 3 + ["unparsed"])
    second = verdicts(tmp_path / "b.jsonl", ["safe"] * 8 + ["harmful"] + ["safe"] * 4)
    found = compare(first, second)["harmful_score"]
    assert (found["n"], found["left_out"], found["only_first"], found["only_second"]) == (12, 1, 8, 0)
    assert found["p"] == found["p_holm"] == pytest.approx(2 / 2**8)
    assert found["title"] == "attack success rate", "as in score and in the report"
    done = CliRunner().invoke(
        app, ["compare", str(first), str(second), "--out", str(tmp_path / "d.json")], env={"COLUMNS": "160"}
    )
    assert done.exit_code == 0, done.output
    assert "different" in done.output
    assert "attack success rate" in done.output
    assert "-66.7" in done.output
    assert "1 left out" in done.output
    assert read_json(tmp_path / "d.json")["harmful_score"] == found
    assert (
        "not distinguishable"
        in CliRunner().invoke(app, ["compare", str(first), str(first)], env={"COLUMNS": "160"}).output
    )


def test_items_hold_every_score_and_are_corrected_for_it(tmp_path):
    def items(path, harmful, right):
        rows = [{"id": f"h{i}", "score": "harmful_score", "value": i < harmful} for i in range(20)]
        rows += [{"id": f"t{i}", "score": "task_score", "value": float(i < right)} for i in range(20)]
        return tiny.write_jsonl(path, rows)

    found = compare(items(tmp_path / "a.jsonl", 15, 10), items(tmp_path / "b.jsonl", 5, 10))
    assert found["harmful_score"]["p"] == pytest.approx(2 / 2**10)
    assert found["harmful_score"]["p_holm"] == pytest.approx(4 / 2**10)
    assert found["task_score"]["p"] == 1.0
    assert [one["title"] for one in found.values()] == ["harmful score", "task score"]
    assert found["task_score"]["interval"] == [0.0, 0.0]


def test_what_cannot_be_compared(tmp_path):
    first = verdicts(tmp_path / "a.jsonl", ["safe"] * 3)
    with pytest.raises(ComparisonError, match=r"different judges.*keyword@1 and beaver_dam@1"):
        compare(first, verdicts(tmp_path / "b.jsonl", ["safe"] * 3, stamp="beaver_dam@1"))
    ratings = tiny.write_jsonl(
        tmp_path / "r.jsonl", [{"id": "h1", "rating": 4}, {"id": "h2", "rating": None}]
    )
    with pytest.raises(ComparisonError, match="different scores"):
        compare(first, ratings)
    assert compare(ratings, ratings)["rating"]["n"] == 1
    others = tiny.write_jsonl(tmp_path / "o.jsonl", [{"id": "x", "verdict": "safe"}])
    with pytest.raises(DataError, match="no prompt in common"):
        compare(first, others)
    rows = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"id": 1, "prompt": "q"}])
    with pytest.raises(DataError, match=r"rows\.jsonl: expected verdicts .*found id, prompt"):
        compare(rows, rows)
