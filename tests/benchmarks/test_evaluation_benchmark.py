"""The evaluation benchmark runs on a few prompts and steps, and both ways give the same results."""

from __future__ import annotations

from places import BENCHMARKS


def test_both_ways_find_the_same(monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("evaluation")
    assert set(benchmark.CASES) == {"world", "llama-100m"}
    few = {"harmful": 6, "task": 4, "new_tokens": {"harmful": 8, "task": 4}, "rounds": 1}
    found = benchmark.measure({"world": few}, {"steps": 3, "rounds": 1}, judged=3)
    case = found["evaluation"]["world, cpu"]
    assert case["prompts"] == case["same_answers"] == case["same_verdicts"] == 10
    assert case["ratio_median"] > 0
    assert found["judge"]["answers"] == found["judge"]["same_verdicts"] == 3
    assert found["probe"]["same_weights"]
    assert found["probe"]["measurements"] == 2, "before the training, and after its last step"


def test_the_judge_alone(monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(BENCHMARKS)
    found = importlib.import_module("evaluation").judging(5, 1)
    assert found["answers"] == found["same_verdicts"] == 5
