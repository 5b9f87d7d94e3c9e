"""The measurements of all runs as rows of a report: without duplicates, and aggregated over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from holdfast.reporting.measurements import HARM, SCORES, JudgeScore, Measurement, Row, Score
from holdfast.reporting.read import mapping, number, text_of, total, values_of


def gather(measurements: Iterable[Measurement]) -> tuple[Row, ...]:
    """Rows for the table: each measurement once, seeds grouped, models before fine-tuning first."""
    groups: dict[str, list[Measurement]] = {}
    for measurement in _once(measurements):
        groups.setdefault(_group_key(measurement), []).append(measurement)
    rows: list[Row] = []
    for members in groups.values():
        seeds = [member.seed for member in members]
        if None in seeds or len(set(seeds)) < len(seeds):
            # The same seed twice means that something else differs: a mean would hide it.
            rows.extend(_row([member]) for member in members)
        else:
            rows.append(_row(sorted(members, key=lambda member: member.seed or 0)))
    rows.sort(key=lambda row: row.role != "reference")
    return _labelled(rows)


def _once(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Rows that share a score step are one measurement, even if they come from different runs.

    A row that also has results of lm-evaluation-harness is kept instead of one without them.
    """
    kept: dict[str, Measurement] = {}
    for measurement in measurements:
        score_step = measurement.steps.get("score")
        key = f"step {score_step}" if score_step else repr(sorted(measurement.raw.items(), key=str))
        if key not in kept or ("lm_eval" in measurement.raw and "lm_eval" not in kept[key].raw):
            kept[key] = measurement
    return list(kept.values())


def _group_key(measurement: Measurement) -> str:
    names = [measurement.raw.get(key) for key in ("name", "alignment", "user", "post_hoc")]
    return json.dumps([*names, measurement.settings])


def _row(members: Sequence[Measurement]) -> Row:
    raws = [member.raw for member in members]
    first = raws[0]
    judge_names = list(dict.fromkeys(name for raw in raws for name in mapping(raw.get("judges"))))
    return Row(
        name=str(first["name"]),
        alignment=text_of(first.get("alignment")),
        user=text_of(first.get("user")),
        post_hoc=text_of(first.get("post_hoc")),
        poison_ratio=number(first.get("poison_ratio")) if first.get("user") is not None else None,
        seeds=tuple(member.seed for member in members if member.seed is not None),
        scores={key: _score(raws, key, count) for key, count in SCORES.items()},
        judges={name: _judge(raws, name) for name in judge_names},
        unparsed=total(raws, "unparsed"),
        peak_memory_bytes=max(values_of(raws, "peak_memory_bytes"), default=None),
        seconds=_mean(values_of(raws, "seconds")),
        alignment_peak_memory_bytes=max(values_of(raws, "alignment_peak_memory_bytes"), default=None),
        alignment_seconds=_mean(values_of(raws, "alignment_seconds")),
        members=tuple(members),
    )


def _labelled(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Add numbers and labels; rows with the same name are distinguished by alignment, ratio, run and seed."""
    alignments: dict[str, set[str | None]] = {}
    for row in rows:
        alignments.setdefault(row.name, set()).add(row.alignment)
    labels = [
        f"{row.name}, {row.method(row.alignment)}"
        if row.alignment and len(alignments[row.name]) > 1
        else row.name
        for row in rows
    ]
    tails = (
        lambda row: f"p={row.poison_ratio:g}" if row.poison_ratio is not None else "",
        lambda row: row.members[0].run_name if row.members[0].run_name != row.name else "",
        lambda row: f"seed {row.seeds[0]}" if len(row.seeds) == 1 else "",
    )
    for tail in tails:
        shared = {label for label, count in Counter(labels).items() if count > 1}
        for index, row in enumerate(rows):
            if labels[index] in shared and (text := tail(row)):
                labels[index] = f"{labels[index]}, {text}"
    return tuple(
        replace(row, number=index, label=label)
        for index, (row, label) in enumerate(zip(rows, labels, strict=True), start=1)
    )


def _score(raws: Sequence[Mapping[str, Any]], key: str, count: str) -> Score | None:
    measured = [raw for raw in raws if number(raw.get(key)) is not None]
    values = values_of(measured, key)
    counts = values_of(measured, count)
    n = round(sum(counts)) if counts else None
    if not values:
        return None
    if len(values) > 1:
        return Score(statistics.fmean(values), _stderr(values), None, n, len(values))
    raw = measured[0]
    return Score(values[0], number(raw.get(f"{key}_stderr")), interval_of(raw, key), n)


def _judge(raws: Sequence[Mapping[str, Any]], name: str) -> JudgeScore:
    entries = [entry for raw in raws if (entry := mapping(mapping(raw.get("judges")).get(name)))]
    # An entry calls its error "harmful_score_stderr", as a row does, or "stderr".
    entries = [{"harmful_score_stderr": entry.get("stderr"), **entry} for entry in entries]
    versions = {str(entry["version"]) for entry in entries if entry.get("version") is not None}
    return JudgeScore(
        name=name,
        version=", ".join(sorted(versions)) or None,
        harmful_score=_score(entries, "harmful_score", "n"),
        n=total(entries, "n"),
        unparsed=total(entries, "unparsed"),
        false_positives=total(entries, "false_positives"),
        false_negatives=total(entries, "false_negatives"),
        title=str(next((entry["title"] for entry in entries if entry.get("title")), HARM)),
        mean_score=_mean(values_of(entries, "mean_score")),
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _stderr(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def interval_of(raw: Mapping[str, Any], key: str) -> tuple[float, float] | None:
    """The 95 % interval that a run wrote beside a score, or None."""
    value = raw.get(f"{key}_interval")
    if not isinstance(value, list) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)
