"""The numbers of a row of `results.json`: their keys, their names and their units.

A number inside another object has a key with dots, such as `judges.keyword.harmful_score`,
`cost.user.seconds` or `by_category.fraud.harmful_score`. A result of lm-evaluation-harness is
`lm_eval.TASK.METRIC`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import InputError, nearest
from holdfast.reporting.measurements import HARM, SCORES, Row, harm_title
from holdfast.reporting.read import mapping, number, objects
from holdfast.reporting.table import task_title
from holdfast.reporting.text import small

TITLES = {
    "harmful_score": HARM, "finetune_accuracy": "finetune accuracy", "task_score": "task score",
    "harmonic_mean": "harmonic mean", "benign_compliance": "benign compliance",
    "over_refusal_rate": "over-refusal rate", "gibberish_rate": "gibberish rate",
    "true_harmful_score": "true harmful score", "attack_success_rate": "attack success rate",
    "seconds": "training time", "peak_memory_bytes": "peak memory",
    "alignment_seconds": "alignment time", "alignment_peak_memory_bytes": "alignment memory",
    "tokens_per_second": "tokens per second", "unparsed": "unparsed answers",
    "task_unparsed": "unparsed answers to the task", "failed": "failed answers",
}  # fmt: skip
"""The name of each main number, here and in every table."""

INSIDE = ("judges", "by_category", "cost", "lm_eval")
"""The objects of a row whose numbers are metrics."""
NO_METRIC = ("seed", "poison_ratio", "processes")
UNITS = (
    ("_bytes", "GiB", 2.0**-30), ("tokens_per_second", "tokens/s", 1.0), ("joules", "J", 1.0),
    ("seconds", "s", 1.0), ("seconds_per_1000_steps", "s", 1.0), ("harmful_score", "%", 1.0),
)  # fmt: skip
"""The unit of a key by its end, and the factor of its values."""


@dataclass(frozen=True)
class Metric:
    """A number that rows have: its key in `results.json`, its name, and its unit.

    A value in the unit is the value of `results.json` times `factor`.
    """

    key: str
    title: str
    unit: str = ""
    factor: float = 1.0

    @property
    def heading(self) -> str:
        """The name with the unit: "peak memory, GiB"."""
        return f"{self.title}, {self.unit}" if self.unit else self.title


def places(raw: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], str]]:
    """Return where each metric of a row is: the object that holds it, and its key there."""
    found = dict(_inside(raw, ""))
    for name in INSIDE:
        part = _harness(raw) if name == "lm_eval" else mapping(raw.get(name))
        found |= dict(_inside(part, f"{name}.", deep=True))
    return {key: place for key, place in found.items() if key not in NO_METRIC}


def measured(rows: Sequence[Row]) -> dict[str, Metric]:
    """Return the metrics that at least one row has, by key; the main ones first."""
    raws = [member.raw for row in rows for member in row.members]
    keys = dict.fromkeys(key for raw in raws for key in places(raw))
    first = [key for key in TITLES if key in keys]
    return {key: _metric(key, rows, raws) for key in (*first, *(key for key in keys if key not in TITLES))}


def named(rows: Sequence[Row], names: Sequence[str]) -> tuple[Metric, ...]:
    """Return the metrics with these names: a key of `results.json`, or the name that the tables show.

    Raises:
        InputError: the rows do not have the metric.
    """
    known = measured(rows)
    by_name = {_letters(metric.title): metric for metric in reversed(known.values())}
    by_name |= {_letters(key): metric for key, metric in known.items()}
    chosen = {}
    for name in names:
        found = known.get(name) or by_name.get(_letters(name))
        if found is None:
            raise InputError(_unknown(name, known))
        chosen[found.key] = found
    return tuple(chosen.values())


def _unknown(name: str, known: Mapping[str, Metric]) -> str:
    main = [key for key in known if key in TITLES or re.fullmatch(r"judges\..+\.(harmful|mean)_score", key)]
    told = "is not measured in these runs" if name in TITLES else "is not a metric of these runs"
    close = nearest(name, known)
    hint = close if close.startswith(" Did you") else ""
    other = next((key for key in known if key.startswith("cost.")), None)
    more = f"; and all other numbers of a row of results.json, such as {other}" if other else ""
    return f"{name!r} {told}.{hint} They have: {', '.join(main)}{more}."


def _inside(
    part: Mapping[str, Any], before: str, *, deep: bool = False
) -> Iterator[tuple[str, tuple[Mapping[str, Any], str]]]:
    """Each number of an object with its key, without standard errors and counts."""
    for key, value in part.items():
        name = str(key)
        if isinstance(value, Mapping):
            if deep:
                yield from _inside(value, f"{before}{name}.", deep=True)
        elif number(value) is not None and not (name == "n" or name.startswith("n_") or "stderr" in name):
            yield f"{before}{name}", (part, name)


def _harness(raw: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The results of lm-evaluation-harness by task and metric; a filter is part of the metric's name."""
    found: dict[str, dict[str, Any]] = {}
    for task, result in mapping(raw.get("lm_eval")).items():
        values = found.setdefault(task, {"n": mapping(result).get("n")})
        for entry in objects(mapping(result).get("metrics")):
            how = str(entry.get("filter"))
            name = str(entry.get("metric")) + ("" if how in ("none", "", "None") else f".{how}")
            values |= {name: entry.get("value"), f"{name}_stderr": entry.get("stderr")}
    return found


def _metric(key: str, rows: Sequence[Row], raws: Sequence[Mapping[str, Any]]) -> Metric:
    title = TITLES.get(key) or key.replace("_", " ").replace(".", " ")
    if key == "harmful_score":
        title = harm_title(rows)
    elif key in ("finetune_accuracy", "task_score"):
        title = small(task_title(rows))
    elif judged := re.fullmatch(r"judges\.(.+)\.(\w+)", key):
        title = _judged(judged[1], judged[2], rows)
    if key == "task_score":
        percent = all(number(raw.get("finetune_accuracy")) is not None for raw in raws if "task_score" in raw)
        return Metric(key, title, "%" if percent else "")
    if key in SCORES or key == "attack_success_rate":
        return Metric(key, title, "%")
    unit, factor = next(((unit, factor) for end, unit, factor in UNITS if key.endswith(end)), ("", 1.0))
    return Metric(key, title, unit, factor)


def _judged(judge: str, name: str, rows: Sequence[Row]) -> str:
    """The name of a judge's number, as in the table of the judges."""
    own = next((row.judges[judge].title for row in rows if judge in row.judges), HARM)
    told = {"harmful_score": own, "false_negatives": "misses", "false_positives": "false alarms"}
    return f"{judge}: {told.get(name) or name.replace('_', ' ')}"


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
