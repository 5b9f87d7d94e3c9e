"""A run that is killed at any point and started again ends with the numbers of an uninterrupted run."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import pytest

from holdfast import pipeline
from holdfast.machine.progress import Progress
from holdfast.pipeline.checkpoints import last_checkpoint
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


@pytest.fixture(scope="module")
def killed(done, tmp_path_factory):
    """A run that was killed after two checkpoints of the user stage."""
    folder = tmp_path_factory.mktemp("killed")
    context = multiprocessing.get_context("fork")
    process = context.Process(
        target=killed_run, args=(done[0], folder / "out", KILLS["user, inside a phase"])
    )
    process.start()
    process.join(120)
    return folder / "out"


def tear(path):
    path.write_bytes(path.read_bytes()[:500])


def flip(path):
    """Change a byte, and neither size nor mtime."""
    before, whole = path.stat(), bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def add(path):
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")


def other_cost(path):
    path.write_text(path.read_text().replace('"seconds": ', '"seconds": 1'))


DAMAGE = {
    "torn optimizer": (tear, "optimizer.pt"),
    "changed weights": (flip, "adapter_model.safetensors"),
    "changed method state": (flip, "method/state.safetensors"),
    "lost random numbers": (Path.unlink, "rng_state.pth"),
    "added file": (add, "method/state/data"),
    "added metadata": (add, "method/state/.metadata"),
    "torn marker": (tear, "holdfast.json"),
    "changed marker": (other_cost, "holdfast.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, killed, done, tmp_path):
    recipe, whole, expected, _ = done
    shutil.copytree(killed, tmp_path / "out")
    (newest,) = (tmp_path / "out" / "steps").glob("user-*/checkpoints/checkpoint-4")
    change, name = DAMAGE[damage]
    change(newest / name)
    steps, said = [], []

    class Steps(Progress):
        def advance(self, done, total, **facts):
            if total == 8:
                steps.append(done)

        def say(self, text):
            said.append(text)

    results = pipeline.run(Recipe.load(recipe), out=tmp_path / "out", device="cpu", progress=Steps())
    assert steps == [3, 4, 5, 6, 7, 8]
    (line,) = said
    assert f"{newest} is damaged" in line
    assert Path(name).name in line
    assert numbers(results) == numbers(expected)
    assert left(tmp_path / "out", results) == left(whole, expected)


def test_checkpoints_that_are_all_damaged_train_from_the_start(killed, tmp_path):
    folder = shutil.copytree(
        next((killed / "steps").glob("user-*")) / "checkpoints", tmp_path / "checkpoints"
    )
    said = []
    assert last_checkpoint(folder, said.append) == folder / "checkpoint-4"
    for name in ("checkpoint-2", "checkpoint-4"):
        tear(folder / name / "scheduler.pt")
    assert last_checkpoint(folder, said.append) is None
    assert ["checkpoint-4" in line or "checkpoint-2" in line for line in said] == [True, True]
    assert not list(folder.glob("checkpoint-*"))


@pytest.mark.parametrize("kind", ["generate", "moderate", "user"])
def test_a_changed_file_of_the_same_size_is_made_again(kind, done, copy):
    """Nothing of the changed step is used, and the steps after it stay."""
    recipe, out = copy
    row = done[2]["rows"][1]
    step = row["steps"][kind][0] if kind == "moderate" else row["steps"][kind]
    name = {"generate": "generations.jsonl", "moderate": "verdicts.jsonl"}.get(
        kind, "adapter/adapter_model.safetensors"
    )
    flip(out / "steps" / step / name)
    said = []

    class Said(Progress):
        def say(self, text):
            said.append(text)

    results = pipeline.run(Recipe.load(recipe), out=out, device="cpu", progress=Said())
    (line,) = said
    assert "is done again" in line
    assert step in line
    assert name in line
    assert numbers(results) == numbers(done[2])
    assert left(out, results) == left(done[1], done[2])


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
