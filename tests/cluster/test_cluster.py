"""Sweeps on a real Slurm and a real Ray: whatever is killed, the numbers are those of single runs, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

import tiny
from holdfast.machine.store import MARKER
from holdfast.study.folder import status
from places import DOCS
from runs import left, numbers, run

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SFT, LISA = {"defense": "sft"}, {"defense": "lisa", "alignment_steps": 1, "finetune_steps": 2}


LONG = 15
"""Epochs of a training that is killed in the middle: 120 steps with a checkpoint after every 12."""


def grid(folder, launcher, users=(SFT, LISA), epochs=1, **changes):
    """Write a grid of user stages, and return its file and the recipe of each run, by folder.

    Args:
        epochs: of both trainings.
    """
    recipe = tiny.recipe(folder / "in", name="study", **changes)
    training = {**recipe.pop("user")["training"], "num_train_epochs": epochs}
    recipe["alignment"]["training"] = training
    recipe["evaluation"]["task_new_tokens"] = 8  # conftest.py changes the default in this process
    users = [{**user, "training": training} for user in users]
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump({**recipe, "grid": {"user": users}, "launcher": launcher}))
    return file, {user["defense"]: {**recipe, "user": user, "name": user["defense"]} for user in users}


def start(file, out):
    command = [sys.executable, "-m", "holdfast", "sweep", file, "--out", out, "--device", "cpu"]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=file.parent,
        # A background job of a shell ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def ended(process, code=0):
    text = process.communicate(timeout=1200)[0]
    assert process.returncode == code, text
    return text


def notes(out):
    """What runs now: pairs of a kind of step and what its worker or job says."""
    found = []
    for path in (out / "sweep" / "workers").glob("*.json"):
        try:
            note = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        found.append((note["step"].rpartition("-")[0], note))
    return found


def wait_for(what, process=None, seconds=900):
    last = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < last
        if process is not None and process.poll() is not None:
            pytest.fail(process.communicate()[0])
        time.sleep(0.02)
    return found


def training(out, stage="user"):
    """The process of a training that has written a checkpoint."""
    found = [note for kind, note in notes(out) if kind == stage]
    return [note["pid"] for note in found if checkpoints(out, note["step"])]


def checkpoints(out, step):
    """The training steps after which the complete checkpoints of a step were written."""
    found = (out / "steps").glob(f"{step}/checkpoints/checkpoint-*/{MARKER}")
    return [int(marker.parent.name.split("-")[1]) for marker in found]


class Killer(threading.Thread):
    """Kills one process in a step of each kind: in the middle of a training, and anywhere in other steps."""

    def __init__(self, out, kinds):
        super().__init__(daemon=True)
        self.out, self.left, self.ended = out, set(kinds), False

    def run(self):
        while self.left and not self.ended:
            for kind, pid in self._found():
                if kind in self.left:
                    try:
                        os.kill(pid, signal.SIGKILL)
                    except ProcessLookupError:
                        continue
                    self.left.discard(kind)
            time.sleep(0.05)

    def _found(self):
        for stage in self.left & {"alignment", "user"}:
            for pid in training(self.out, stage):
                yield stage, pid
        others = self.left - {"alignment", "user"}
        if not others:
            return
        for kind, note in notes(self.out):
            if kind in others:
                yield kind, note["pid"]
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            if "holdfast.study.job" in words or (words and words[0].startswith("ray::")):
                for kind in others & {word.rpartition("-")[0] for word in " ".join(words).split()}:
                    yield kind, process.pid


def same(out, folder, singles):
    """Assert that the runs of a sweep have the numbers, and the bytes, of single runs."""
    for name, single in singles.items():
        found = json.loads((out / name / "results.json").read_text())
        alone, _ = run(single, folder / "alone" / name)
        for one, other in zip(numbers(found), json.loads(json.dumps(numbers(alone))), strict=True):
            assert {k: (v, other[k]) for k, v in one.items() if v != other[k]} == {}
        assert left(out, found) == left(folder / "alone" / name, alone)


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray"], indirect=True)
def test_whatever_is_killed_the_numbers_are_those_of_single_runs(launcher, tmp_path):
    repair = {"defense": "soup"}
    file, singles = grid(tmp_path, launcher, epochs=LONG, post_hoc=repair)
    out = tmp_path / "out"
    kinds = ["alignment", "user", "generate"]
    if launcher["name"] != "local":  # a worker on this machine does these in milliseconds
        kinds += ["post_hoc", "moderate", "score"]
    killer = Killer(out, kinds)
    killer.start()
    head = start(file, out)
    wait_for(lambda: "user" not in killer.left, head)
    head.kill()
    head.communicate()
    ended(start(file, out))
    killer.ended = True
    assert not killer.left, "each kind of step was killed once"
    same(out, tmp_path, singles)
    if launcher["name"] == "slurm":
        jobs = json.loads((out / "sweep" / "jobs.json").read_text())
        assert {place["size"] for name, place in jobs.items() if name.startswith("user")} <= {1, 2}


@pytest.mark.parametrize("launcher", ["slurm", "ray"], indirect=True)
def test_a_failed_step_stops_what_needs_it_and_the_same_command_goes_on(launcher, tmp_path):
    file, singles = grid(tmp_path, launcher)
    out = tmp_path / "out"
    step = run(singles["lisa"], tmp_path / "first")[0]["rows"][-1]["steps"]["user"]
    (out / "steps").mkdir(parents=True)
    blocked = out / "steps" / step / "trainer_state.json"
    shutil.copy(tmp_path / "first" / "steps" / "holdfast.json", out / "steps")
    blocked.mkdir(parents=True)
    text = ended(start(file, out), 1)
    assert "1 steps failed, so 1 of 2 runs are not complete" in text
    log = out / "sweep" / "logs" / f"{step}.log"
    assert str(log) in text
    assert "trainer_state.json" in log.read_text()
    state = status(out)
    assert (state.states[step], state.runs) == ("failed", (2, 1))
    assert set(state.counts()) == {"complete", "failed", "stopped"}
    blocked.rmdir()
    ended(start(file, out))
    same(out, tmp_path, singles)


@pytest.mark.parametrize("launcher", ["slurm", "ray"], indirect=True)
def test_ctrl_c_leaves_the_jobs_running_and_the_same_command_finds_them(launcher, tmp_path):
    file, singles = grid(tmp_path, launcher, epochs=LONG)
    out = tmp_path / "out"
    head = start(file, out)
    wait_for(lambda: training(out), head)
    head.send_signal(signal.SIGINT)
    text = ended(head, 130)
    assert {"slurm": "stay in the queue of Slurm", "ray": "runs on in the Ray cluster"}[
        launcher["name"]
    ] in text
    assert f"holdfast sweep --status {out}" in text
    assert "run the same command again" in text
    wait_for(lambda: set(status(out).states.values()) == {"complete"})
    assert not list(out.glob("*/results.json"))
    ended(start(file, out))
    same(out, tmp_path, singles)


@pytest.mark.parametrize("launcher", ["local", "slurm", "ray"], indirect=True)
def test_a_step_in_several_processes_runs_under_torchrun(launcher, tmp_path):
    file, singles = grid(tmp_path, {**launcher, "processes": 2}, users=[LISA], epochs=LONG)
    out, alone = tmp_path / "out", tmp_path / "alone"
    killer = Killer(out, ["user"])
    killer.start()
    ended(start(file, out))
    assert not killer.left
    (tmp_path / "single.yaml").write_text(yaml.safe_dump(singles["lisa"]))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = ["-m", "holdfast", "run", tmp_path / "single.yaml", "--out", alone, "--device", "cpu"]
    subprocess.run([*torchrun, *command], check=True, capture_output=True)
    found, single = (
        json.loads(path.read_text()) for path in (out / "lisa" / "results.json", alone / "results.json")
    )
    assert found["rows"][-1]["processes"] == 2
    assert numbers(found) == numbers(single)
    assert left(out, found) == left(alone, single)


@pytest.mark.parametrize("launcher", ["slurm"], indirect=True)
def test_a_job_that_reaches_its_time_limit_goes_on_from_its_checkpoint(launcher, tmp_path):
    file, singles = grid(tmp_path, {**launcher, "steps": {"user": {"time": "2m"}}}, users=[SFT], epochs=LONG)
    out = tmp_path / "out"
    head = start(file, out)
    (pid,) = wait_for(lambda: training(out), head)
    os.kill(pid, signal.SIGSTOP)  # the training reaches the limit, however fast this machine is
    saved = max(checkpoints(out, "user-*"))

    def later():
        """How far the training is in another process."""
        found = [note for kind, note in notes(out) if kind == "user" and note["pid"] != pid]
        return [note["done"] for note in found if note.get("done")]

    assert wait_for(later, head)[0] > saved
    ended(head)
    jobs = json.loads((out / "sweep" / "jobs.json").read_text())
    (job,) = {place["job"] for name, place in jobs.items() if name.startswith("user")}
    command = ["scontrol", "show", "job", job]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"Restarts=[1-9]", shown), shown
    same(out, tmp_path, singles)


@pytest.mark.parametrize("launcher", ["slurm"], indirect=True)
def test_a_killed_job_and_a_killed_slurmctld(launcher, tmp_path):
    file, singles = grid(tmp_path, launcher, users=[SFT], epochs=LONG)
    out = tmp_path / "out"
    head = start(file, out)
    (pid,) = wait_for(lambda: training(out), head)
    job = psutil.Process(pid).parent()
    assert "submitit.core._submit" in job.cmdline()
    job.kill()
    folder = Path(os.environ["SLURM_CONF"]).parent
    os.kill(int((folder / "slurmctld.pid").read_text()), signal.SIGKILL)
    time.sleep(10)
    subprocess.run(["slurmctld"], check=True)
    ended(head)
    same(out, tmp_path, singles)


@pytest.mark.parametrize("launcher", ["ray"], indirect=True)
def test_a_killed_ray_cluster_ends_the_command_and_the_same_command_goes_on(launcher, ray, tmp_path):
    file, singles = grid(tmp_path, launcher, users=[SFT], epochs=LONG)
    out = tmp_path / "out"
    head = start(file, out)
    wait_for(lambda: training(out), head)
    ray.kill()
    assert "Run the same command again" in ended(head, 1)
    ray.start()
    ended(start(file, out))
    same(out, tmp_path, singles)


def test_ray_is_started_here_if_the_grid_has_no_address(tmp_path):
    pytest.importorskip("ray")
    file, singles = grid(tmp_path, {"name": "ray", "workers": 2}, users=[SFT])
    ended(start(file, tmp_path / "out"))
    same(tmp_path / "out", tmp_path, singles)


@pytest.mark.parametrize("name", ["slurm", "ray"])
def test_the_files_of_the_page_run(name, tmp_path, request):
    request.getfixturevalue(name)
    short = ["alignment.training.max_steps=20", "user.training.max_steps=20", "evaluation.prompts=10"]
    command = [sys.executable, "-m", "holdfast", "sweep", DOCS / "cluster" / f"{name}.yaml", *short]
    out = tmp_path / "out"
    done = subprocess.run([*command, "--out", out, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(out.glob("*/results.json"))) == 4
