"""A run that is killed at any point and started again ends with the numbers of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import signal

import pytest

from holdfast import pipeline
from holdfast.machine.progress import Progress
from holdfast.recipe import Recipe
from kills import before_the_marker, in_a_checkpoint, in_training, in_writing_rows, killed_run
from runs import left, numbers, run

KILLS = {
    "user rows": before_the_marker("data", 2),
    "manifest": before_the_marker("manifest"),
    "alignment": in_training("alignment-", 5),
    "alignment, done": before_the_marker("alignment"),
    "user, before a checkpoint": in_training("user-", 1),
    "user, inside a phase": in_training("user-", 6),
    "user, in a checkpoint": in_a_checkpoint(4),
    "answers": in_writing_rows("generations.jsonl", 1),
    "verdicts": in_writing_rows("verdicts.jsonl", 2),
    "scores": before_the_marker("score", 2),
}


@pytest.mark.parametrize("where", KILLS)
def test_a_kill_anywhere_changes_no_number(where, done, tmp_path):
    recipe, whole, expected, _ = done
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed_run, args=(recipe, tmp_path / "out", KILLS[where]))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, "the run was not killed"
    assert not (tmp_path / "out" / "results.json").exists()
    results, seen = run(recipe, tmp_path / "out")
    assert len(seen.resumed) == 1
    assert numbers(results) == numbers(expected)
    assert left(tmp_path / "out", results) == left(whole, expected), "weights, answers, verdicts: bit for bit"


def test_training_goes_on_from_its_last_checkpoint(done, tmp_path):
    recipe, _, _, _ = done
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=killed_run, args=(recipe, tmp_path / "out", KILLS["user, inside a phase"])
    )
    process.start()
    process.join(120)
    kept = sorted(p.name for p in (tmp_path / "out" / "steps").glob("user-*/checkpoints/*"))
    assert kept == ["checkpoint-2", "checkpoint-4"]
    steps = []

    class Steps(Progress):
        def advance(self, done, total, **facts):
            if total == 8:
                steps.append(done)

    pipeline.run(Recipe.load(recipe), out=tmp_path / "out", device="cpu", progress=Steps())
    assert steps == [5, 6, 7, 8]


def test_a_kill_before_the_marker_trains_nothing_again(done, tmp_path):
    recipe, _, _, _ = done
    context = multiprocessing.get_context("fork")
    process = context.Process(target=killed_run, args=(recipe, tmp_path / "out", KILLS["alignment, done"]))
    process.start()
    process.join(120)
    taken = []

    class Steps(Progress):
        def advance(self, done, total, **facts):
            if "loss" in facts and facts.get("state") is None:
                taken.append(done)

    pipeline.run(Recipe.load(recipe), out=tmp_path / "out", device="cpu", progress=Steps())
    assert taken == [], "every step of the alignment stage was in its last checkpoint"


def test_two_runs_of_one_recipe_share_the_work(done, tmp_path):
    recipe, whole, expected, _ = done
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / "a", tmp_path / "b"]
    processes = [
        context.Process(
            target=pipeline.run, args=(Recipe.load(recipe),),
            kwargs={"out": out, "store": tmp_path / "steps", "device": "cpu"},
        )
        for out in outs
    ]  # fmt: skip
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    for out in outs:
        results = json.loads((out / "results.json").read_text())
        assert numbers(results) == numbers(expected)
        assert results["store"] == "../steps"
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "steps").symlink_to(tmp_path / "steps")
    assert left(tmp_path / "one", results) == left(whole, expected)
