"""The rows of a report by method and grid keys: means over seeds with 95 % intervals by Student's t.

A method is the stages of a row, with its filter. A grid key is a key of the recipe that has several values
within one method, such as `data.poison_ratio` or `user.rho`; names and seeds are no grid keys.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from holdfast.evaluation.paired import student_quantile
from holdfast.reporting.gathering import interval_of
from holdfast.reporting.measurements import SCORES, Measurement, Role, Row, stages_text
from holdfast.reporting.metrics import places
from holdfast.reporting.read import mapping, number

COSTS = ("seconds", "peak_memory_bytes", "alignment_seconds", "alignment_peak_memory_bytes")
"""Measurements that are no scores."""

METRICS = (*SCORES, *COSTS)

BLOCKS = ("model", "data", "alignment", "user", "post_hoc")
"""The blocks of a recipe whose keys can be grid keys, in their order."""


@dataclass(frozen=True)
class Mean:
    """A metric of a group.

    Attributes:
        value: the mean over seeds.
        stderr: the standard error over seeds; of one seed, that of its answers (binomial), if known.
        interval: the 95 % interval: over seeds by Student's t, of one seed Wilson's over its answers.
        by_seed: the value of each seed, in their order.
        n: the number of answers, over all seeds.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    by_seed: tuple[float, ...]
    n: int | None = None

    @property
    def seeds(self) -> int:
        """The number of seeds with a value."""
        return len(self.by_seed)


def mean(values: Sequence[float], n: int | None = None) -> Mean:
    """The mean over two or more seeds, with its standard error and 95 % interval by Student's t."""
    value, error = statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))
    reach = student_quantile(len(values) - 1) * error
    return Mean(value, error, (value - reach, value + reach), tuple(values), n)


def mean_of(raws: Sequence[Mapping[str, Any]], metric: str) -> Mean | None:
    """A metric, by its key, over rows of `results.json` that differ in the seed; None if no row has it."""
    found = [place for raw in raws if (place := places(raw).get(metric)) is not None]
    if not found:
        return None
    values = [float(part[name]) for part, name in found]
    counts = [count for part, name in found if (count := _count(part, name)) is not None]
    n = round(sum(counts)) if counts else None
    if len(values) > 1:
        return mean(values, n)
    part, name = found[0]
    error = number(part.get(f"{name}_stderr", part.get("stderr")))  # a judge's entry may call it "stderr"
    return Mean(values[0], error, interval_of(part, name), (values[0],), n)


def _count(part: Mapping[str, Any], name: str) -> float | None:
    """The number of answers behind a number: of the row, of a judge's entry, or of its mean score."""
    return next((n for key in (SCORES.get(name, ""), f"n_{name}", "n") if (n := number(part.get(key)))), None)


@dataclass(frozen=True)
class Group:
    """The runs of one method with the same values of all grid keys, over seeds.

    Attributes:
        method: its stages, as in the report: "SFT → Lisa".
        keys: the values of the grid keys that this group has; a model before fine-tuning has no user keys.
        means: by main metric, its mean; a metric that was not measured is absent.
        rows: the rows of the report that are part of it.
    """

    method: str
    name: str
    role: Role
    keys: Mapping[str, Any]
    seeds: tuple[int, ...]
    means: Mapping[str, Mean]
    rows: tuple[Row, ...] = field(repr=False)

    def mean(self, metric: str) -> Mean | None:
        """The mean of any metric, also of one that `means` lacks, such as `judges.keyword.harmful_score`."""
        if metric in self.means:
            return self.means[metric]
        return mean_of([member.raw for row in self.rows for member in row.members], metric)


@dataclass(frozen=True)
class Series:
    """The points of one line of a chart: a metric over a grid key.

    Attributes:
        method: the method.
        fixed: the values of the other grid keys.
        points: the value of the key and the mean; numbers in ascending order.
    """

    method: str
    fixed: Mapping[str, Any]
    points: tuple[tuple[Any, Mean], ...]


@dataclass(frozen=True)
class Grouped:
    """All groups of a report, and their grid keys in the order of the recipe."""

    keys: tuple[str, ...]
    groups: tuple[Group, ...]

    def metrics(self) -> tuple[str, ...]:
        """The metrics that at least one group has."""
        return tuple(one for one in METRICS if any(one in group.means for group in self.groups))

    def series(self, key: str, metric: str) -> tuple[Series, ...]:
        """A line for each method and value of the other keys, over the groups that have `key` and `metric`.

        Lines of a single point are left out.
        """
        lines: dict[str, tuple[Group, list[tuple[Any, Mean]]]] = {}
        for group in self.groups:
            mean = group.mean(metric) if key in group.keys else None
            if mean is None:
                continue
            fixed = {name: value for name, value in group.keys.items() if name != key}
            line = lines.setdefault(_text([group.method, fixed]), (group, []))
            line[1].append((group.keys[key], mean))
        return tuple(
            Series(
                first.method,
                {name: value for name, value in first.keys.items() if name != key},
                tuple(_in_order(points)),
            )
            for first, points in lines.values()
            if len(points) > 1
        )


def grouped(rows: Iterable[Row]) -> Grouped:
    """Group the rows of a report (`collect(...).rows`) by method and grid keys, over seeds.

    Rows of different names are one group if only their seeds differ. If a seed appears twice in a group,
    something differs that is not part of the recipe's model, stages and data; the rows stay apart.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        settings = row.members[0].settings
        found.setdefault(_text([stages_text(row), row.role, settings]), []).append(row)
    sets: list[list[Row]] = []
    for same in found.values():
        seeds = [seed for row in same for seed in _seeds(row)]
        alone = None in seeds or len(set(seeds)) < len(seeds)
        sets += [[row] for row in same] if alone else [same]
    given = [_flat(settings_of(same[0].members[0])) for same in sets]
    keys = _grid_keys([stages_text(same[0]) for same in sets], given)
    return Grouped(
        keys,
        tuple(
            _group(same, {key: flat[key] for key in keys if key in flat})
            for same, flat in zip(sets, given, strict=True)
        ),
    )


def settings_of(measurement: Measurement) -> dict[str, Any]:
    """The part of the recipe behind a row, without the seed."""
    try:
        return mapping(json.loads(measurement.settings))
    except ValueError:
        return {}


def key_text(key: str, keys: Iterable[str]) -> str:
    """The last part of a key as its title, or the whole key if another one has the same last part."""
    short = key.rpartition(".")[2]
    return key if sum(one.rpartition(".")[2] == short for one in keys) > 1 else short


def value_text(value: Any) -> str:
    """A value of a grid key as text."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _seeds(row: Row) -> list[int | None]:
    return [member.seed for member in row.members]


def _flat(settings: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The settings by whole key; what names the methods is left out, a list is one value."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        here = f"{place}.{key}" if place else key
        if key == "defense":
            continue
        if isinstance(value, Mapping):
            found |= _flat(value, here)
        else:
            found[here] = value
    return found


def _grid_keys(methods: Sequence[str], given: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The keys that have several values within one method; a key that a run lacks has another value."""
    several = dict.fromkeys(key for flat in given for key in flat)
    kept = []
    for key in sorted(several, key=_block):
        values: dict[str, set[str]] = {}
        for method, flat in zip(methods, given, strict=True):
            values.setdefault(method, set()).add(_text(flat[key]) if key in flat else "absent")
        if any(len(found) > 1 for found in values.values()):
            kept.append(key)
    return tuple(kept)


def _block(key: str) -> int:
    block = key.partition(".")[0]
    return BLOCKS.index(block) if block in BLOCKS else len(BLOCKS)


def _group(rows: Sequence[Row], keys: Mapping[str, Any]) -> Group:
    members = sorted((one for row in rows for one in row.members), key=lambda one: one.seed or 0)
    means = {metric: found for metric in METRICS if (found := mean_of([m.raw for m in members], metric))}
    first = rows[0]
    return Group(
        method=stages_text(first),
        name=first.label if len(rows) == 1 else first.name,
        role=first.role,
        keys=keys,
        seeds=tuple(member.seed for member in members if member.seed is not None),
        means=means,
        rows=tuple(rows),
    )


def _in_order(points: Sequence[tuple[Any, Mean]]) -> Sequence[tuple[Any, Mean]]:
    numeric = all(number(value) is not None for value, _ in points)
    return sorted(points, key=lambda point: point[0]) if numeric else points


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
