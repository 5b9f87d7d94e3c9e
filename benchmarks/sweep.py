"""Claim: a sweep trains a shared step once, uses both cores, and its own part is small at 10,000 steps.

- `scale`: a grid of 10,000 steps is planned in under 10 s and 300 MB, in a process of its own.
- `list`: the state of a sweep of 20,000 complete steps is read in under 2 s.
- `scheduling`: what a worker adds to a step that does nothing: lock, record, notes, choice of the step.
- `ratios`: 20 poison ratios in the world, with short trainings: as single runs that share nothing, as a sweep
  with one worker, and as a sweep with two workers.

    python benchmarks/sweep.py [scale] [list] [scheduling] [ratios]

Results of parts that are not asked for stay as they are.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _record import RESULTS, save

from holdfast.machine.digests import sealed
from holdfast.machine.store import Store
from holdfast.pipeline import run
from holdfast.recipe import Recipe
from holdfast.study import folder, planning, sweeping, worker
from holdfast.study.grid import expand
from holdfast.study.resources import KINDS, Launcher

SHORT = {
    "extends": "world",
    "alignment": {"training": {"max_steps": 50}},
    "user": {"training": {"max_steps": 20}},
    "evaluation": {"prompts": 40},
}
"""The world with short trainings and few prompts."""


def grid_of(steps: int) -> dict[str, Any]:
    """Return a grid in the world with about this number of steps: two methods, two seeds, many ratios."""
    ratios = [round(i / 2000, 4) for i in range(steps // 24)]
    return {
        "extends": "world",
        "name": "many",
        "grid": {"user": ["sft", "lisa"], "data.poison_ratio": ratios, "seed": [1, 2]},
    }


def planned(steps: int) -> dict[str, Any]:
    """Plan a grid, and return the seconds and the peak memory of this process."""
    began, computing = time.monotonic(), time.process_time()
    with tempfile.TemporaryDirectory() as place:
        study = planning.plan(expand(grid_of(steps)), Store(Path(place)))
    return {
        "runs": len(study.plans),
        "steps": len(study.steps),
        "seconds": round(time.monotonic() - began, 2),
        "processor_seconds": round(time.process_time() - computing, 2),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def scale(steps: int = 10_000) -> dict[str, Any]:
    """Plan in a process of its own; the goals are 10 s and 300 MB."""
    command = f"import sweep, json; print(json.dumps(sweep.planned({steps})))"
    done = subprocess.run(
        [sys.executable, "-c", command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def listed(count: int = 20_000) -> dict[str, Any]:
    """Read the state of a sweep whose steps are complete; the goal is 2 s."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        (out / "sweep").mkdir()
        names = [f"score-{number:012x}" for number in range(count)]
        record = json.dumps(sealed({"kind": "score", "files": {}, "seconds": 1.0}))
        for name in names:
            (out / "steps" / name).mkdir(parents=True)
            (out / "steps" / name / "step.json").write_text(record, encoding="utf-8")
        steps = {name: {"kind": "score", "title": "scores", "parents": []} for name in names}
        runs = {str(number): names[number : number + 10] for number in range(0, count, 10)}
        known = {"store": "../steps", "launcher": "local", "steps": steps, "runs": runs, "recipes": {}}
        (out / "sweep" / "study.json").write_text(json.dumps(known), encoding="utf-8")
        began, computing = time.monotonic(), time.process_time()
        state = folder.status(out)
        seconds, processor = time.monotonic() - began, time.process_time() - computing
        assert state.counts() == {"complete": count}
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "holdfast", "sweep", "--status", place], check=True, capture_output=True
        )
        command = time.monotonic() - began
        began = time.monotonic()
        store = Store(out / "steps")
        assert all(store.record(name) is not None for name in names)
        checked = time.monotonic() - began
    return {
        "steps": count,
        "status_seconds": round(seconds, 2),
        "status_processor_seconds": round(processor, 2),
        "command_seconds": round(command, 2),
        "records_checked_seconds": round(checked, 2),
    }


def scheduling(steps: int = 1_000, workers: int = 1) -> dict[str, Any]:
    """Run steps that do nothing; return the milliseconds of a step."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)
        (out / "sweep").mkdir()
        store = Store(out / "steps", read_only=False)
        study = planning.plan(expand(grid_of(steps)), store)
        empty = {n: dataclasses.replace(s, work=_nothing, check=None) for n, s in study.steps.items()}
        plans = {
            name: dataclasses.replace(one, steps=tuple(empty[step.id] for step in one.steps))
            for name, one in study.plans.items()
        }
        study = planning.Study(plans)
        needs = {kind: Launcher().need(kind, "cpu") for kind in KINDS}
        folder.describe(out / "sweep", study, store, "cpu", needs)
        planning.replan = lambda *_: study  # type: ignore[assignment]
        began = time.monotonic()
        forked = multiprocessing.get_context("fork")
        started = [forked.Process(target=worker.work, args=(out / "sweep", n)) for n in range(workers)]
        for one in started:
            one.start()
        for one in started:
            one.join()
        seconds = time.monotonic() - began
        assert folder.status(out).counts() == {"complete": len(study.steps)}
    return {
        "steps": len(study.steps),
        "workers": workers,
        "ms_a_step": round(1000 * seconds / len(study.steps), 2),
    }


def _nothing(inputs: Any, place: Path, machine: Any) -> None:
    """The work of a step that does nothing."""


def ratios(count: int = 20) -> dict[str, Any]:
    """Run poison ratios with and without shared steps, and with two workers; seconds and ratios of them."""
    values = [round(i / 100, 2) for i in range(count)]
    axis = {**SHORT, "name": "ratios", "grid": {"data.poison_ratio": values}}
    with tempfile.TemporaryDirectory() as place:
        out = Path(place)

        def alone() -> list[Any]:
            found = []
            for one in values:
                recipe = Recipe.load({**SHORT, "name": "one"}, [f"data.poison_ratio={one}"])
                found.append(run(recipe, out=out / "alone" / str(one), device="cpu")["rows"])
            return found

        def swept(workers: int) -> list[Any]:
            found = sweeping.sweep(axis, out=out / f"swept-{workers}", device="cpu", workers=workers)
            return [one["rows"] for one in found.values()]

        alone_rows, alone_seconds = _timed(alone)
        one_rows, one_seconds = _timed(lambda: swept(1))
        two_rows, two_seconds = _timed(lambda: swept(2))
        same = _scores(alone_rows) == _scores(one_rows) == _scores(two_rows)
    return {
        "ratios": count,
        "single_runs_seconds": round(alone_seconds, 1),
        "one_worker_seconds": round(one_seconds, 1),
        "two_workers_seconds": round(two_seconds, 1),
        "single_runs_to_one_worker": round(alone_seconds / one_seconds, 2),
        "one_worker_to_two": round(one_seconds / two_seconds, 2),
        "same_scores": same,
    }


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    began = time.monotonic()
    return work(), time.monotonic() - began


def _scores(runs: list[list[Mapping[str, Any]]]) -> list[Any]:
    return [[(row["harmful_score"], row["finetune_accuracy"]) for row in rows] for rows in runs]


PARTS: dict[str, Callable[[], dict[str, Any]]] = {
    "scale": scale,
    "list": listed,
    "scheduling": lambda: {"one": scheduling(), "two": scheduling(workers=2)},
    "ratios": ratios,
}


def main() -> None:
    """Measure the parts that are asked for, all by default."""
    path = RESULTS / "sweep.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    result = {name: found[name] for name in PARTS if name in found}
    for name in sys.argv[1:] or PARTS:
        load = os.getloadavg()[0]
        result[name] = {**PARTS[name](), "load": [round(load, 1), round(os.getloadavg()[0], 1)]}
    save("sweep", {name: result[name] for name in PARTS if name in result})


if __name__ == "__main__":
    main()
