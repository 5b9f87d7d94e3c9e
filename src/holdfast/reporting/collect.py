"""Read runs into one typed structure that the page and the charts show. Reads JSON only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from holdfast.errors import ComparisonError, DataError, InputError
from holdfast.machine.files import read_json
from holdfast.reporting.answers import Comparison, compare_answers
from holdfast.reporting.finding import parts
from holdfast.reporting.gathering import gather
from holdfast.reporting.measurements import SCORES, Measurement, Row
from holdfast.reporting.read import mapping, objects, read_object
from holdfast.reporting.text import plain
from holdfast.reporting.training import Curves, read_curves, step_folder

REQUIRED = ("holdfast", "name", "rows", "protocol")
COSTS = ("peak_memory_bytes", "seconds", "alignment_peak_memory_bytes", "alignment_seconds")
DESCRIBED = ("protocol", "changes")
"""Fields of the protocol stamp that also describe the training; they may differ between runs in one table."""
SOMETIMES = ("harmful_rows", "template_date", "lm_eval")
"""Fields that only some runs have (with an attack, a dated template, or lm-evaluation-harness); these runs
must agree in them."""
NUMBERS = (*SCORES, *SCORES.values(), "poison_ratio", "unparsed", *COSTS)


@dataclass(frozen=True)
class Run:
    """One `results.json`."""

    name: str
    path: Path
    store: Path
    recipe: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    protocol: dict[str, Any]
    steps: tuple[dict[str, Any], ...]
    versions: dict[str, Any]
    hardware: dict[str, Any]
    manifest: str | None
    git_commit: str | None
    started: str | None
    finished: str | None
    attack_sweep: dict[str, Any] = field(default_factory=dict)
    title: str = ""
    """The name, with the folder if another run has the same name."""


@dataclass(frozen=True)
class Difference:
    """A field of the protocol stamp in which runs differ: (run, value) in the order of the runs."""

    field: str
    values: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Manifest:
    """The data manifest of one step, and the runs that used it."""

    step_id: str
    runs: tuple[str, ...]
    content: dict[str, Any]


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows. `missing` lists the step folders that were not found."""

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    finding: str
    differences: tuple[Difference, ...]
    curves: tuple[Curves, ...]
    curves_left_out: int
    comparison: Comparison | None
    manifests: tuple[Manifest, ...]
    missing: tuple[str, ...]
    unfinished: tuple[str, ...] = ()
    finding_rest: str = ""

    @property
    def headline_judge(self) -> str | None:
        """The judge of `harmful_score`: named by the rows or the protocol stamp, else a row's first judge."""
        told = [str(row.members[0].raw.get("judge")) for row in self.rows]
        told.append(str(self.runs[0].protocol.get("judge") or "").partition("@")[0])
        names = [name for row in self.rows for name in row.judges]
        return next((name for name in told if name in names), next(iter(names), None))


def collect(runs: Sequence[str | Path], *, force: bool = False) -> ReportData:
    """Read runs; each is given by its folder or its `results.json`.

    Raises:
        InputError: no run was given.
        DataError: a file is missing, incomplete or not a Holdfast result.
        ComparisonError: the protocol stamps differ and `force` is off.
    """
    if not runs:
        raise InputError(
            "Expected at least one run: a folder that `holdfast run` wrote, or its results.json."
        )
    paths = [Path(run) for run in runs]
    paths = [run for run in paths if not beside_runs(run)] or paths
    left = [run for run in paths if unfinished(run)]
    if len(left) == len(paths):
        left = []  # reading the first one says what is missing
    loaded = _titled([load(path) for path in _distinct([run for run in paths if run not in left])])
    differences = _differences(loaded)
    if differences and not force:
        raise ComparisonError(_explain(differences))
    rows = gather(
        Measurement(raw, run.name, run.store, _settings(run.recipe, raw))
        for run in loaded
        for raw in run.rows
    )
    curves, left_out, missing = read_curves(rows)
    comparison, gone = compare_answers(rows)
    manifests, lost = _manifests(loaded)
    forced = "The runs were measured under different protocols; nothing is concluded from comparing them."
    found = (forced, "") if differences else parts(rows)
    return ReportData(
        runs=tuple(loaded),
        rows=rows,
        finding=found[0],
        finding_rest=found[1].strip(),
        differences=tuple(differences),
        curves=curves,
        curves_left_out=left_out,
        comparison=comparison,
        manifests=tuple(manifests),
        missing=tuple(dict.fromkeys([*missing, *gone, *lost])),
        unfinished=tuple(Path(run).name for run in left),
    )


def unfinished(run: Path) -> bool:
    """Whether `run` is the folder of a run that has not written its results yet."""
    return Path(run).is_dir() and (run / "recipe.yaml").is_file() and not results_file(run).is_file()


def beside_runs(folder: Path) -> bool:
    """Whether a folder is one that a sweep has beside its runs: its store, or its own files."""
    try:
        return read_json(folder / "holdfast.json")["kind"] in ("store", "sweep")
    except (OSError, ValueError, LookupError, TypeError):
        return False


def results_file(run: Path) -> Path:
    """The `results.json` of `run`, which is a run's folder or that file."""
    return run / "results.json" if run.is_dir() else run


def _distinct(runs: Sequence[Path]) -> list[Path]:
    return list({results_file(run).resolve(): run for run in runs}.values())


def load(given: Path) -> Run:
    """Read the results of one run, given by its folder or its `results.json`.

    Raises:
        DataError: there are none, or they are damaged.
    """
    path = results_file(given)
    if not path.is_file():
        found = "a folder without one" if given.is_dir() else "nothing" if not path.exists() else "no file"
        raise DataError(
            f"Expected a run (a folder with results.json, or that file), found {found}: {given}. "
            "A run writes results.json when it ends: call `holdfast run` again to resume a stopped run."
        )
    content = read_object(path)
    absent = [key for key in REQUIRED if key not in content]
    if absent:
        raise DataError(f"{path} is not a Holdfast result: missing keys: {', '.join(absent)}.")
    rows = content["rows"]
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "name" in row for row in rows):
        raise DataError(
            f'{path} is not a Holdfast result: expected "rows" to be a list of objects with a name.'
        )
    for row in rows:
        for key in NUMBERS:
            if isinstance(row.get(key), str | bool | list | dict):
                raise DataError(
                    f"{path}, row {row['name']!r}: expected a number or null for {key}, found {row[key]!r}."
                )
    if not isinstance(content["protocol"], dict):
        raise DataError(f'{path} is not a Holdfast result: expected "protocol" to be an object.')
    steps = objects(content.get("steps"))
    ids = [str(step.get("id")) for step in steps]
    manifest = content.get("manifest") or next((id for id in ids if id.startswith("manifest-")), None)
    return Run(
        name=str(content["name"]),
        path=path,
        store=path.parent / str(content.get("store") or "steps"),
        recipe=mapping(content.get("recipe")),
        rows=tuple(rows),
        protocol=content["protocol"],
        steps=tuple(steps),
        versions=mapping(content.get("versions")),
        hardware=mapping(content.get("hardware")),
        manifest=None if manifest is None else str(manifest),
        git_commit=_optional(content.get("git_commit")),
        started=_optional(content.get("started")),
        finished=_optional(content.get("finished")),
        attack_sweep=mapping(content.get("attack_sweep")),
    )


def _titled(runs: Sequence[Run]) -> list[Run]:
    counts = Counter(run.name for run in runs)
    return [
        replace(run, title=run.name if counts[run.name] == 1 else f"{run.name} ({run.path.parent.name})")
        for run in runs
    ]


def _optional(value: Any) -> str | None:
    return None if value is None else str(value)


def _differences(runs: Sequence[Run]) -> list[Difference]:
    fields = dict.fromkeys(field for run in runs for field in run.protocol if field not in DESCRIBED)
    found = []
    for name in fields:
        # An absent field differs from a null field; repr distinguishes 1, "1" and true.
        asked = [run for run in runs if name in run.protocol or name not in SOMETIMES]
        if len({repr(run.protocol.get(name, "absent")) for run in asked}) > 1:
            shown = [plain(run.protocol[name]) if name in run.protocol else "absent" for run in runs]
            names = [run.title for run in runs]
            found.append(Difference(name, tuple(zip(names, shown, strict=True))))
    return found


def _explain(differences: Sequence[Difference]) -> str:
    lines = ["The runs were measured under different protocols, so their scores are not comparable:"]
    for difference in differences:
        by_value: dict[str, list[str]] = {}
        for run, value in difference.values:
            by_value.setdefault(value, []).append(run)
        shown = "; ".join(f"{value} ({', '.join(names)})" for value, names in by_value.items())
        lines.append(f"  {difference.field}: {shown}")
    lines.append("Measure them under the same protocol, or compare them anyway with --force.")
    return "\n".join(lines)


def _settings(recipe: dict[str, Any], raw: dict[str, Any]) -> str:
    """The part of the recipe behind this row, without the seed; rows that differ in it are not averaged."""
    data = mapping(recipe.get("data"))
    parts: dict[str, Any] = {"model": recipe.get("model")}
    for stage in ("alignment", "user"):
        if raw.get(stage) is not None:
            parts[stage] = recipe.get(stage)
    if raw.get("post_hoc") is not None:  # if the recipe sweeps a parameter, this row's value of it
        parts["post_hoc"] = {**mapping(recipe.get("post_hoc")), **mapping(raw.get("post_hoc_parameters"))}
    if raw.get("post_hoc_attack") is not None:
        parts["post_hoc_attack"] = recipe.get("post_hoc_attack")
    if raw.get("attack_sweep") is not None:
        parts["attack_sweep"] = recipe.get("attack_sweep")
    parts["data"] = data if raw.get("user") is not None else data.get("alignment")
    return json.dumps(parts, sort_keys=True)


def _manifests(runs: Sequence[Run]) -> tuple[list[Manifest], list[str]]:
    users: dict[str, tuple[Run, list[str]]] = {}
    for run in runs:
        if run.manifest is not None:
            users.setdefault(run.manifest, (run, []))[1].append(run.title)
    manifests, missing = [], []
    for step_id, (run, names) in users.items():
        folder = step_folder(run.store, step_id)
        if folder is None or not (folder / "manifest.json").is_file():
            missing.append(step_id)
        else:
            manifests.append(Manifest(step_id, tuple(names), read_object(folder / "manifest.json")))
    return manifests, missing
