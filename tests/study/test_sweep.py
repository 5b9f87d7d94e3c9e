"""Sweeps: each shared step once, by workers that may fail or die, with the results of single runs."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import pytest

import kills
import tiny
from commands import holdfast_command
from holdfast.cli.sweeping import status_table
from holdfast.errors import OutputError, StepFailed
from holdfast.pipeline import stages
from holdfast.reporting import report
from holdfast.study import local, sweeping
from holdfast.study.folder import lock, status
from holdfast.study.worker import work
from runs import Inside, no_pages, numbers, run
from warm import warm


class Forked:
    """A worker in a fork of this process, where everything is imported; `arm` prepares its death."""

    def __init__(self, folder, number, arm=None):
        def begin():
            if arm is not None:
                arm()
            work(folder, number)

        self.process = multiprocessing.get_context("fork").Process(target=begin)
        self.process.start()
        self.terminate, self.wait = self.process.terminate, self.process.join

    def poll(self):
        return self.process.exitcode


def grid(folder, users):
    recipe = tiny.recipe(folder, grid={"user": users}, name="study")
    training = recipe.pop("user")["training"]
    for user in users:
        user["training"] = training
    return recipe


SFT, LISA = {"defense": "sft"}, {"defense": "lisa", "alignment_steps": 1, "finetune_steps": 2}


def test_a_killed_workers_step_is_taken_over_and_the_numbers_are_those_of_single_runs(tmp_path, monkeypatch):
    warm()
    started = []

    def start(folder, number, environment):
        started.append(number)
        return Forked(folder, number, kills.in_training("user", 3) if len(started) == 1 else None)

    monkeypatch.setattr(local, "start_worker", start)
    monkeypatch.setattr(local, "PAUSE", 0.05)
    given, out = grid(tmp_path / "in", [{**SFT}, {**LISA}]), tmp_path / "out"
    with no_pages():
        found = sweeping.sweep(given, out=out, device="cpu", workers=2)
    assert len(started) == 3, "one worker died, and one came instead"
    assert set(found) == {"sft", "lisa"}
    single = {k: v for k, v in given.items() if k != "grid"}
    single |= {"user": given["grid"]["user"][1], "name": "lisa"}
    alone, _ = run(single, tmp_path / "alone")
    assert numbers(found["lisa"]) == numbers(alone)
    assert [step["id"] for step in found["lisa"]["steps"]] == [step["id"] for step in alone["steps"]]
    made = [path.name for path in (out / "steps").glob("*-*")]
    assert len([name for name in made if name.startswith("alignment")]) == 1
    page = report(sorted(out.glob("*")), tmp_path / "page.html")
    assert "lisa" in page.read_text()
    started.clear()
    with no_pages():
        assert sweeping.sweep(given, out=out, device="cpu").keys() == found.keys()
    assert not started, "every step is complete"


def test_a_failed_step_stops_only_what_needs_it_and_the_same_call_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(local, "start_worker", Inside)
    given, out = grid(tmp_path / "in", [{**LISA}, {**SFT}]), tmp_path / "out"
    train = stages.train_stage

    def failing(inputs, folder, machine):
        if inputs["method"].name == "lisa":
            raise ValueError("the card is full")
        return train(inputs, folder, machine)

    with no_pages(), monkeypatch.context() as patch:
        patch.setattr(stages, "train_stage", failing)
        with pytest.raises(
            StepFailed, match=r"1 steps failed, so 1 of 2 runs(.|\n)*Lisa(.|\n)*the card is full"
        ) as told:
            sweeping.sweep(given, out=out, device="cpu")
    log = str(told.value).rpartition("log: ")[2]
    assert "in failing" in Path(log).read_text(), "the traceback"
    assert json.loads((out / "sft" / "results.json").read_text())["rows"]
    assert not (out / "lisa" / "results.json").exists()
    state = status(out)
    assert state.runs == (2, 1)
    assert set(state.counts()) == {"complete", "failed", "stopped"}
    assert "1 of 2 runs complete" in status_table(state).title
    assert {title.rpartition(", ")[2] for title in state.titles.values()} == {"sft", "lisa", "2 runs"}
    assert not state.alive
    with lock(out / "sweep"):
        assert status(out).alive
        with pytest.raises(OutputError, match="Another sweep runs"):
            sweeping.sweep(given, out=out, device="cpu")
    shown = holdfast_command("sweep", "--status", out)
    assert shown.returncode == 0
    assert "The sweep does not run" in " ".join(shown.stdout.split())
    assert "ValueError" in shown.stdout
    with no_pages():
        assert list(sweeping.sweep(given, out=out, device="cpu")) == ["lisa", "sft"]
    assert status(out).runs == (2, 2)


def test_a_step_in_which_every_worker_dies_fails(tmp_path, monkeypatch):
    class Dead(Inside):
        def __init__(self, folder, number, environment):
            self.code = 0
            try:
                work(folder, number)
            except SystemExit:
                self.code = -9

        def poll(self):
            return self.code

    def dying(inputs, folder, machine):
        raise SystemExit

    monkeypatch.setattr(local, "start_worker", Dead)
    monkeypatch.setattr(local, "PAUSE", 0)
    monkeypatch.setattr(stages, "train_stage", dying)
    with no_pages(), pytest.raises(StepFailed, match=r"3 workers ended in alignment with .*exit code -9"):
        sweeping.sweep(grid(tmp_path / "in", [{**SFT}]), out=tmp_path / "out", device="cpu")


def test_a_worker_is_a_process_that_ends_well_if_no_step_is_left(tmp_path):
    (tmp_path / "logs").mkdir()
    study = {
        "store": ".",
        "device": "cpu",
        "recipes": {},
        "steps": {},
        "runs": {},
        "needs": {},
        "processes": {},
    }
    (tmp_path / "study.json").write_text(json.dumps(study))
    worker = local.start_worker(tmp_path, 0, os.environ)
    code = worker.wait(60)
    worker.stdin.close()
    assert code == 0, (tmp_path / "logs" / "worker-0.log").read_text()


def test_a_folder_without_a_sweep_has_no_status(tmp_path):
    with pytest.raises(OutputError, match="found none"):
        status(tmp_path)
