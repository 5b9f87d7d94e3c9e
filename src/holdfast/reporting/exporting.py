"""The results of runs as files for other programs: one row for each method and value of the grid keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from holdfast.machine.files import write_text
from holdfast.machine.outputs import check_results, written
from holdfast.reporting import sheets
from holdfast.reporting.collect import DESCRIBED, ReportData, collect
from holdfast.reporting.grouped import COSTS, Group, Grouped, Mean, grouped, key_text, value_text
from holdfast.reporting.metrics import measured
from holdfast.reporting.sheets import Sheet
from holdfast.reporting.text import NOT_MEASURED, score_text

SHOWN = (
    "harmful_score", "finetune_accuracy", "task_score", "benign_compliance", "over_refusal_rate",
    "gibberish_rate",
)  # fmt: skip
"""The metrics of the LaTeX table; the other files have all of them."""


def export(runs: Sequence[Path], files: dict[str, Path], *, force: bool = False) -> None:
    """Write the results of runs as files.

    Args:
        runs: folders of runs, or their `results.json`.
        files: the file of each format: "csv", "json", "latex" or "markdown".
        force: put runs with different protocol stamps into one file.

    Raises:
        InputError: no run was given.
        DataError: a file of a run is missing, incomplete or not a Holdfast result.
        ComparisonError: the protocol stamps differ and `force` is off.
        OutputError: a file cannot be written, is given twice, or is the results of a run.
    """
    if not files:
        return
    check_results(files.values(), [run if run.is_file() else run / "results.json" for run in runs])
    data = collect(runs, force=force)
    found = grouped(data.rows)
    for kind, file in files.items():
        with written(file):
            write_text(file, FORMATS[kind](data, found))


def records(found: Grouped) -> list[dict[str, Any]]:
    """A record for each group: method, grid keys, seeds, and each metric's mean, n, error and interval."""
    return [_record(group, found.keys, found.metrics()) for group in found.groups]


def _record(group: Group, keys: Sequence[str], metrics: Sequence[str]) -> dict[str, Any]:
    told: dict[str, Any] = {"method": group.method, "name": group.name, "role": group.role}
    told |= {key: group.keys.get(key) for key in keys}
    told["seeds"] = len(group.seeds) or 1
    for metric in metrics:
        mean = group.means.get(metric)
        low, high = (mean.interval if mean else None) or (None, None)
        told |= {
            metric: _rounded(mean.value if mean else None),
            f"{metric}_stderr": _rounded(mean.stderr if mean else None),
            f"{metric}_low": _rounded(low),
            f"{metric}_high": _rounded(high),
        }
        if metric not in COSTS:
            told[f"{metric}_n"] = mean and mean.n
    return told


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def sheet(data: ReportData, found: Grouped) -> Sheet:
    """The main scores, with half the width of the 95 % interval."""
    metrics = [metric for metric in SHOWN if metric in found.metrics()]
    if "finetune_accuracy" in metrics and "task_score" in metrics:  # the same number
        metrics.remove("task_score")
    known = measured(data.rows)
    rows = [
        (
            group.method,
            *(value_text(group.keys[key]) if key in group.keys else "–" for key in found.keys),
            str(len(group.seeds) or 1),
            *(interval_text(group.means.get(metric)) for metric in metrics),
        )
        for group in found.groups
    ]
    columns = (
        "Method",
        *(key_text(key, found.keys) for key in found.keys),
        "Seeds",
        *(known[metric].title[:1].upper() + known[metric].title[1:] for metric in metrics),
    )
    several = any(len(group.seeds) > 1 for group in found.groups)
    single = any(len(group.seeds) < 2 for group in found.groups)
    notes = []
    if several:
        notes.append("Over several seeds: the mean and its 95 % interval by Student's t.")
    if single:
        notes.append("One seed: the 95 % interval over the answers (Wilson).")
    stamp = data.runs[0].protocol if not data.differences else {}
    notes += [
        f"{key}: {value}" for key, value in stamp.items() if key in ("judge", "prompts", "n_prompts", "task")
    ]
    return Sheet("Results", columns, tuple(rows), tuple(notes), left=1)


def interval_text(mean: Mean | None) -> str:
    """A mean with its 95 % interval: "40.2 [35.1, 45.3]"."""
    if mean is None:
        return NOT_MEASURED
    text = score_text(mean.value)
    if mean.interval is None:
        return text
    return f"{text} [{score_text(mean.interval[0])}, {score_text(mean.interval[1])}]"


def _json(data: ReportData, found: Grouped) -> str:
    stamps = [{k: v for k, v in run.protocol.items() if k not in DESCRIBED} for run in data.runs]
    distinct = [stamp for number, stamp in enumerate(stamps) if stamp not in stamps[:number]]
    return sheets.json_text({"keys": list(found.keys), "rows": records(found), "protocols": distinct})


FORMATS: dict[str, Callable[[ReportData, Grouped], str]] = {
    "csv": lambda data, found: sheets.csv_text(records(found)),
    "json": _json,
    "latex": lambda data, found: sheets.latex([sheet(data, found)]),
    "markdown": lambda data, found: sheets.markdown([sheet(data, found)]),
}
"""What to write for each format."""
