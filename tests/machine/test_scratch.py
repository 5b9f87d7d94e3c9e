"""Temporaries of killed processes are removed, those of living ones stay; one process writes an output."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal

import pytest

from holdfast.errors import OutputError
from holdfast.machine import scratch
from holdfast.machine.files import beside, replace_folder
from holdfast.machine.scratch import Writing, is_temporary, temporary
from holdfast.machine.store import Store, claim_folder
from holdfast.measuring.answer_files import claim

FORK = multiprocessing.get_context("fork")


def holding(place, started, folder):
    with temporary(place, folder=folder):
        started.set()
        signal.pause()


@pytest.mark.parametrize("folder", [True, False])
def test_only_what_a_killed_process_left_is_removed(tmp_path, folder):
    place, started = tmp_path / "out", FORK.Event()
    other = FORK.Process(target=holding, args=(place, started, folder))
    other.start()
    assert started.wait(10)
    (theirs,) = tmp_path.iterdir()
    assert is_temporary(theirs)
    for name in (".out.settings", ".out.holdfast-me", "out.holdfast-abcdefgh"):
        (tmp_path / name).write_text("mine")
    with temporary(place, folder=True) as ours:
        assert {ours, theirs} < set(tmp_path.iterdir())
    os.kill(other.pid, signal.SIGKILL)
    other.join()
    with temporary(place, folder=True) as ours:
        assert not theirs.exists()
        (ours / "file").write_text("new")
        replace_folder(ours, place)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".out.holdfast-me", ".out.settings", "out", "out.holdfast-abcdefgh"]


@pytest.mark.parametrize("folder", [True, False])
def test_a_temporary_that_another_process_is_removing_is_not_used(tmp_path, monkeypatch, folder):
    """It locks the temporary before its owner does, and removes it afterwards."""
    lock, taken = scratch._lock, []

    def late(path):
        if not taken:
            taken.append((path, lock(path)))  # the other process
        return lock(path)

    monkeypatch.setattr(scratch, "_lock", late)
    with temporary(tmp_path / "out", folder=folder) as made:
        ((theirs, descriptor),) = taken
        assert made != theirs
        os.close(descriptor)


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), beside(tmp_path / "file") as made:
        made.write_text("half" * (1 // 0))
    assert not list(tmp_path.iterdir())


def test_a_step_does_not_list_temporaries(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / ".rows.jsonl.holdfast-abcdefgh").write_text("half")
    (tmp_path / "s" / "rows.jsonl").write_text("whole")
    assert list(Store(tmp_path).complete("s", {})["files"]) == ["rows.jsonl"]


def test_one_process_at_a_time_writes_an_output(tmp_path):
    out = tmp_path / "verdicts.jsonl"
    with claim(out, {"judge": "a"}):
        with pytest.raises(OutputError, match="Another process writes"):
            claim(out, {"judge": "a"})
        with pytest.raises(BlockingIOError):
            Writing(out)
    with claim(out, {"judge": "a"}):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["verdicts.jsonl", "verdicts.jsonl.json"]
    with pytest.raises(OutputError, match="other settings"):
        claim(out, {"judge": "b"})
    with claim(out, {"judge": "a"}):
        pass


def claims(folder, barrier, said):
    barrier.wait()
    try:
        claim_folder(folder, "store")
        said.put("")
    except OutputError as error:
        said.put(str(error))


def test_processes_that_claim_a_folder_together_all_have_it(tmp_path):
    for number in range(8):
        barrier, said = FORK.Barrier(4), FORK.Queue()
        folder = tmp_path / str(number)
        processes = [FORK.Process(target=claims, args=(folder, barrier, said)) for _ in range(4)]
        for process in processes:
            process.start()
        assert [said.get(timeout=20) for _ in processes] == [""] * 4
        for process in processes:
            process.join()


def test_a_temporary_of_another_process_is_nobody_elses_file(tmp_path):
    (tmp_path / ".holdfast.json.holdfast-abcdefgh").write_text("")
    claim_folder(tmp_path, "run")
    assert json.loads((tmp_path / "holdfast.json").read_text())["kind"] == "run"


@pytest.mark.parametrize("damage", [None, b"", b"\xff\xfe", b"[]", b"[" * 10**5, b'{"kind": 3}'])
def test_a_marker_that_is_lost_or_damaged_is_written_again(damage, tmp_path):
    """If the other files show what the folder is; a folder with anything else is refused."""
    step = tmp_path / "run" / "steps" / "data-0123456789ab"
    step.mkdir(parents=True)
    (step / "step.json").write_text('{"provenance": {"started": "2026-01-02T00:00:00Z"}}')
    if damage is not None:
        for folder in (tmp_path / "run", tmp_path / "run" / "steps"):
            (folder / "holdfast.json").write_bytes(damage)
    for folder, kind in ((tmp_path / "run", "run"), (tmp_path / "run" / "steps", "store")):
        claim_folder(folder, kind)
        assert json.loads((folder / "holdfast.json").read_text())["kind"] == kind
    assert Store(tmp_path / "run" / "steps").started() == "2026-01-02"
    (tmp_path / "run" / "steps" / "holdfast.json").unlink()
    (tmp_path / "run" / "steps" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not made by Holdfast"):
        claim_folder(tmp_path / "run" / "steps", "store")
