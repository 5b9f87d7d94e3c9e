"""The origin of the numbers: stamps, versions, machines, steps and recipes of all runs, without repeats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from holdfast.reporting.collect import Manifest, Run
from holdfast.reporting.read import mapping, number, objects
from holdfast.reporting.text import NOT_GIVEN, NOT_MEASURED, bytes_text, duration_text, plain, shorten

Facts = list[tuple[str, str]]  # (name, value) pairs for a description list

EXAMPLES = 8
"""Number of items of a list that are written out; the rest is counted."""


@dataclass(frozen=True)
class StepLine:
    """One step: its title, whether it was computed or reused, its time and its memory."""

    id: str
    title: str
    state: str
    time: str
    memory: str


@dataclass(frozen=True)
class ManifestPart:
    """A part of a data manifest: its facts, and the sources of its rows."""

    title: str
    facts: Facts
    sources: list[dict[str, str]]


def words(key: str) -> str:
    """A key of a JSON file as words."""
    return key.replace("_", " ")


def stamp_facts(runs: Sequence[Run]) -> Facts:
    """The protocol stamp; if runs differ, every value."""
    return _common([run.protocol for run in runs])


def version_facts(runs: Sequence[Run]) -> Facts:
    """Package versions and the git commit; if runs differ, every value."""
    found = [{**run.versions, "commit": run.git_commit or "not known"} for run in runs]
    return [(name, value) for name, value in _common(found) if value]


def hardware_facts(runs: Sequence[Run]) -> Facts:
    """The hardware; if runs differ, every value."""
    machines = []
    for run in runs:
        machine = dict(run.hardware)
        size = number(machine.pop("memory_bytes", None))
        if size is not None:
            machine["memory"] = bytes_text(size)
        if machine.get("gpu", "") is None:
            machine["gpu"] = "none"
        machines.append(machine)
    return _common(machines)


def run_facts(run: Run) -> str:
    """When a run ended, and how long its own steps took; those of other runs are counted only."""
    own = [step for step in run.steps if step.get("cached") is False]
    text = f"ended {run.finished}" if run.finished else "end not known"
    if run.steps:
        seconds = [value for step in own if (value := number(step.get("seconds"))) is not None]
        took = f" in {duration_text(sum(seconds))}" if seconds else ""
        text += f"; {len(own)} steps computed{took}, {len(run.steps) - len(own)} reused"
    return text


def step_lines(runs: Sequence[Run]) -> list[StepLine]:
    """Every step of all runs, once each, in the order of the runs."""
    found: dict[str, list[tuple[Run, dict[str, Any]]]] = {}
    for run in runs:
        for step in run.steps:
            found.setdefault(str(step.get("id")), []).append((run, step))
    return [_step_line(step_id, uses) for step_id, uses in found.items()]


def recipe_text(run: Run) -> str:
    """The whole recipe as YAML."""
    return yaml.safe_dump(run.recipe, sort_keys=False, allow_unicode=True, width=100) if run.recipe else ""


def recipe_changes(first: Run, other: Run) -> Facts:
    """The settings of `other`'s recipe that differ from the first run's recipe."""
    before, after = _flat(first.recipe), _flat(other.recipe)
    keys = [key for key in {**before, **after} if before.get(key, NOT_GIVEN) != after.get(key, NOT_GIVEN)]
    return [(key, after.get(key, NOT_GIVEN)) for key in keys]


def manifest_parts(manifest: Manifest) -> list[ManifestPart]:
    """A manifest as tables, one for each part; no fact of it is required."""
    parts = []
    for title, content in manifest.content.items():
        part = mapping(content)
        facts = [
            (words(key), _listed(value))
            for key, value in part.items()
            if key != "sources" and value is not None
        ]
        sources = [
            {key: _listed(value) for key, value in source.items()} for source in objects(part.get("sources"))
        ]
        for source in sources:
            if "sha256" in source:
                source["sha256"] = source["sha256"][:12]
        parts.append(ManifestPart(words(title), facts, sources))
    return parts


def _common(dicts: Sequence[dict[str, Any]]) -> Facts:
    facts = []
    for key in dict.fromkeys(key for one in dicts for key in one):
        values = dict.fromkeys(_listed(one[key]) for one in dicts if key in one)
        facts.append((words(key), " / ".join(values)))
    return facts


def _listed(value: Any) -> str:
    if isinstance(value, list) and len(value) > EXAMPLES:
        return f"{plain(value[:EXAMPLES])} and {len(value) - EXAMPLES} more"
    return shorten(plain(value), 400, 6)


def _step_line(step_id: str, uses: Sequence[tuple[Run, dict[str, Any]]]) -> StepLine:
    fresh = [run for run, step in uses if step.get("cached") is False]
    state = "computed" if fresh else "cached"
    reused = len(uses) - len(fresh)
    if fresh and reused:
        state += f", reused by {reused} other run{'s' if reused > 1 else ''}"
    _, step = next(((r, s) for r, s in uses if s.get("cached") is False), uses[0])
    seconds, memory = number(step.get("seconds")), number(step.get("peak_memory_bytes"))
    return StepLine(
        id=step_id,
        title=str(step.get("title") or step.get("kind") or step_id),
        state=state,
        time=NOT_MEASURED if seconds is None else duration_text(seconds),
        memory=NOT_MEASURED if memory is None else bytes_text(memory),
    )


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        found: dict[str, str] = {}
        for key, item in value.items():
            found.update(_flat(item, f"{prefix}.{key}" if prefix else str(key)))
        return found
    return {prefix: _listed(value)}
