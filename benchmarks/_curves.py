"""The harmful score during fine-tuning, measured by SafetyProbe in the user stage of a run."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import _study as study
from _study import Row

from holdfast import SafetyProbe
from holdfast.machine.files import read_jsonl
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline import plan
from holdfast.pipeline.stages import train_stage
from holdfast.pipeline.step import Inputs, Machine

AT = (0, 5, 10, 20, 35, 50, 75, 100, 150, 200, 300, 400)
PICTURED = (
    "SFT",
    "Lisa, rho=1",
    "SBR, norm=mean",
    "GuardSpace",
    "SPAG",
    "VLGuard",
    "BSO",
    "T-Vaccine",
    "NA-SFT",
)
"""The most important first."""


class ProbeAt(SafetyProbe):
    """A SafetyProbe that measures after the steps in `AT`, and after the last step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in AT or state.global_step >= state.max_steps:
            self._measure(args, state, control, **kwargs)


def curves(work: Any) -> None:
    """Measure the missing curves until the time is over."""
    for method in PICTURED:
        row = Row(method, study.SEEDS[0])
        if row.key in work.found["curves"]:
            continue
        if not work.time_for(1.5):
            print("The time limit ends the curves here; the same command resumes them.", flush=True)
            return
        began = time.monotonic()
        work.found["curves"][row.key] = curve(work, row)
        work.save()
        scores = [f"{point['step']}: {point['harmful_score']:.0f}" for point in work.found["curves"][row.key]]
        print(f"curve of {row.key}: {', '.join(scores)} | {time.monotonic() - began:.0f} s", flush=True)


def curve(work: Any, row: Row) -> list[dict[str, Any]]:
    """Train the row's user stage once more with a probe, and return what the probe measured."""
    asked = study.changes(row, work.size(row.task))
    work.run(asked, row.task)
    store = Store(work.out / "steps")
    planned = plan(work.recipe(asked, row.task), digests=store.digests)
    step = next(step for step in planned.steps if step.kind == "user")
    tested = next(s for s in planned.steps if s.kind == "data" and s.inputs["role"] == "test")
    rows = read_jsonl(store.path(tested.id) / "rows.jsonl")
    probe = ProbeAt(
        [one["instruction"] for one in rows if one["set"] == "harmful"], "keyword", size=None,
        max_new_tokens=16, template="chat",
    )  # fmt: skip
    given = dict(Inputs(step.inputs, store))
    method = given["method"]

    def trainer(**options: Any) -> Any:
        made = method.trainer(**options)
        made.add_callback(probe)
        return made

    # check_model is looked up on the class, but train_stage only calls it
    given["method"] = replace(method, trainer=trainer)
    with tempfile.TemporaryDirectory() as folder:
        train_stage(_Open(given), Path(folder), Machine(work.device, planned.model, Progress()))
    names = {"safety/harmful_score": "harmful_score", "safety/harmful_score_stderr": "stderr"}
    return [
        {"step": point["step"], **{ours: point[theirs] for theirs, ours in names.items()}}
        for point in probe.history
    ]


class _Open(dict):  # type: ignore[type-arg]
    """Inputs that are open already."""
