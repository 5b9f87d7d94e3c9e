"""Training curves, as logged in `trainer_state.json`, with the switch points of methods with phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from holdfast.reporting.measurements import Measurement, Row
from holdfast.reporting.read import mapping, number, objects, read_object

SHOWN = 12
"""Maximum number of stages shown, besides those that drew layers: readers skip longer lists of charts."""

MOST_LAYERS = 500
"""With more layers, the rows of the layer chart would be too thin to see; no model has as many."""

SERIES: Mapping[str, tuple[str, str]] = {
    "loss": ("Loss", "loss"),
    "grad_norm": ("Gradient norm", "gradient norm"),
}
"""The values that every training logs: the chart and the name of the line."""

HUGE = 1e15
"""Above this, a chart's axis has no readable numbers; such a value counts as not finite."""


@dataclass(frozen=True)
class Layers:
    """A method's record of drawn layers: (step, probability of each layer), (step, drawn layers from 0)."""

    count: int
    probabilities: tuple[tuple[float, tuple[float, ...]], ...]
    draws: tuple[tuple[float, tuple[float, ...]], ...]


@dataclass(frozen=True)
class Curves:
    """The log of one training stage.

    Attributes:
        series: (steps, values) by name, with NaN for values that are not finite.
        shown: the chart and the name of the line of each series: `SERIES`, and what the method declares.
    """

    step_id: str
    stage: str
    label: str
    seed: int | None
    series: dict[str, tuple[list[float], list[float]]]
    switch_points: tuple[int, ...]
    starts_in_alignment: bool
    max_steps: int
    not_finite: int
    layers: Layers | None = None
    shown: Mapping[str, tuple[str, str]] = field(default_factory=lambda: SERIES)

    def panels(self) -> dict[str, list[str]]:
        """The names of the series of each chart."""
        found: dict[str, list[str]] = {}
        for name, (chart, _) in self.shown.items():
            found.setdefault(chart, []).append(name)
        return found

    def states(self) -> list[tuple[int, int, str]]:
        """(first step, last step, "alignment" or "user") of each phase; empty without switch points."""
        names = ("alignment", "user") if self.starts_in_alignment else ("user", "alignment")
        ends = [*self.switch_points, max(self.max_steps, *self.switch_points)] if self.switch_points else []
        return [(a, b, names[i % 2]) for i, (a, b) in enumerate(pairwise(ends)) if b > a]


def read_curves(rows: Sequence[Row]) -> tuple[tuple[Curves, ...], int, list[str]]:
    """The stages to draw, the number of stages left out, and the missing step folders.

    The first seed of every row comes before any other seed, and user stages before alignment stages.
    """
    wanted: dict[str, tuple[str, str, Measurement]] = {}
    deepest = max((len(row.members) for row in rows), default=0)
    for turn in range(deepest):
        for stage in ("user", "alignment"):
            for row in (row for row in rows if turn < len(row.members)):
                step_id = row.members[turn].steps.get(stage)
                if isinstance(step_id, str):
                    label = row.label if stage == "user" else row.method(row.alignment or "none")
                    wanted.setdefault(step_id, (stage, label, row.members[turn]))
    curves: list[Curves] = []
    missing: list[str] = []
    left_out = 0
    for step_id, (stage, label, member) in wanted.items():
        folder = step_folder(member.store, step_id)
        if folder is None or not (folder / "trainer_state.json").is_file():
            missing.append(step_id)
        else:
            read = _read(folder, step_id, stage, label, member.seed)
            if len(curves) < SHOWN or read.layers is not None:
                curves.append(read)
            else:
                left_out += 1
    return tuple(curves), left_out, missing


def step_folder(store: Path, step_id: str) -> Path | None:
    """The folder of a step, or None if it is missing or the id is not a plain folder name."""
    if not step_id or step_id.startswith(".") or any(char in step_id for char in "/\\\0"):
        return None
    folder = store / step_id
    return folder if folder.is_dir() else None


def _read(folder: Path, step_id: str, stage: str, label: str, seed: int | None) -> Curves:
    state = read_object(folder / "trainer_state.json")
    record = read_object(folder / "step.json") if (folder / "step.json").is_file() else {}
    training = mapping(record.get("training"))
    shown = {**SERIES, **_declared(training.get("series"))}
    series: dict[str, tuple[list[float], list[float]]] = {}
    not_finite, last = 0, 0.0
    for entry in objects(state.get("log_history")):
        step = number(entry.get("step"))
        if step is None:
            continue
        last = max(last, step)
        for name in shown:
            if entry.get(name) is None:
                continue
            value = number(entry[name])
            if value is None or abs(value) > HUGE:
                value = math.nan
                not_finite += 1
            steps, values = series.setdefault(name, ([], []))
            steps.append(step)
            values.append(value)
    points = training.get("switch_points")
    alignment_steps = number(training.get("alignment_steps"))
    return Curves(
        step_id=step_id,
        stage=stage,
        label=label,
        seed=seed,
        series=series,
        switch_points=tuple(sorted(round(p) for p in map(number, points) if p is not None))
        if isinstance(points, list)
        else (),
        starts_in_alignment=alignment_steps is None or alignment_steps > 0,
        max_steps=round(number(state.get("max_steps")) or last),
        not_finite=not_finite,
        layers=_layers(mapping(training.get("layer_history"))),
        shown=shown,
    )


def _declared(series: Any) -> dict[str, tuple[str, str]]:
    """The series of a method, as `step.json` has them."""
    return {
        str(name): (str(shown[0]), str(shown[1]))
        for name, shown in mapping(series).items()
        if isinstance(shown, list) and len(shown) == 2
    }


def _layers(history: dict[str, Any]) -> Layers | None:
    """The drawn layers, or None if there are none or their record is not valid."""
    count = number(history.get("layers"))
    if count is None or not 1 <= count <= MOST_LAYERS or count != int(count):
        return None
    probabilities = [
        (step, values)
        for step, values in _entries(history.get("probabilities"))
        if len(values) == count and all(0 <= value <= 1 for value in values)
    ]
    draws = [
        (step, values)
        for step, values in _entries(history.get("draws"))
        if all(0 <= value < count and value == int(value) for value in values)
    ]
    return Layers(int(count), tuple(probabilities), tuple(draws)) if probabilities or draws else None


def _entries(history: Any) -> list[tuple[float, tuple[float, ...]]]:
    """The valid [step, [value, ...]] entries of a list, sorted by step."""
    found = {}
    for entry in history if isinstance(history, list) else []:
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list):
            step, values = number(entry[0]), [number(value) for value in entry[1]]
            if step is not None and step >= 0 and values and None not in values:
                found[step] = tuple(value for value in values if value is not None)
    return sorted(found.items())
