"""The rows of a report: the measurements of all runs without duplicates, aggregated over seeds."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.reporting.points import line_of
from holdfast.reporting.read import mapping, number
from holdfast.reporting.text import method_name

SCORES = {
    "harmful_score": "n_harmful",
    "finetune_accuracy": "n_task",
    "task_score": "n_task",
    "harmonic_mean": "n_harmonic",
    "benign_compliance": "n_benign",
    "over_refusal_rate": "n_benign",
    "gibberish_rate": "n_gibberish",
    "true_harmful_score": "n_true_harmful",
}
"""Each score of a row, and the key of the number of answers it is computed from."""

HARM = "harmful score"
"""The name of the share of harmful answers."""

Role = Literal["reference", "undefended", "defended", "control"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Score:
    """A percentage from 0 to 100 with its uncertainty.

    For several seeds, `value` is their mean and `stderr` the standard error over seeds. For one seed,
    `stderr` is binomial and `interval` is the Wilson interval, both as written by the run.
    """

    value: float
    stderr: float | None = None
    interval: tuple[float, float] | None = None
    n: int | None = None
    seeds: int = 1


@dataclass(frozen=True)
class JudgeScore:
    """One judge's results for a row. The error counts are None if the true labels are not known."""

    name: str
    version: str | None
    harmful_score: Score | None
    n: int | None
    unparsed: int | None
    false_positives: int | None
    false_negatives: int | None
    title: str = HARM
    mean_score: float | None = None
    """The mean of the judge's numeric scores, on the judge's own scale."""


@dataclass(frozen=True)
class Measurement:
    """One row of one `results.json`, with the run that it came from."""

    raw: Mapping[str, Any]
    run_name: str
    store: Path
    settings: str

    @property
    def steps(self) -> dict[str, Any]:
        """The ids of the steps that produced this row."""
        return mapping(self.raw.get("steps"))

    @property
    def seed(self) -> int | None:
        """The recipe's seed."""
        seed = self.raw.get("seed")
        return seed if isinstance(seed, int) else None


@dataclass(frozen=True)
class Row:
    """One line of the table: one model, over one or more seeds. None means not measured."""

    name: str
    alignment: str | None
    user: str | None
    post_hoc: str | None
    poison_ratio: float | None
    seeds: tuple[int, ...]
    scores: Mapping[str, Score | None]
    judges: Mapping[str, JudgeScore]
    unparsed: int | None
    peak_memory_bytes: float | None
    seconds: float | None
    alignment_peak_memory_bytes: float | None
    alignment_seconds: float | None
    members: tuple[Measurement, ...] = field(repr=False)
    number: int = 0
    label: str = ""

    def method(self, name: str) -> str:
        """The name of a defense as its paper writes it, taken from the results."""
        label = mapping(self.members[0].raw.get("labels")).get(name)
        return str(label) if label else method_name(name)

    def plain(self, name: str) -> bool:
        """Whether a method is plain training, without a defense."""
        plain = self.members[0].raw.get("baselines")
        return isinstance(plain, list) and name in plain

    @property
    def repaired(self) -> str:
        """The method's text about the repair, over all seeds; empty if the results lack it."""
        found = [mapping(member.raw.get("repair")) for member in self.members]
        return filled(self.members[0].raw.get("headline"), found)

    @property
    def filter(self) -> str | None:
        """The judge or the score that filtered the user's rows before training."""
        found = mapping(self.members[0].raw.get("filter"))
        return _name(found.get("judge") or found.get("score"))

    @property
    def user_rows(self) -> tuple[str, ...]:
        """How many of the user's rows attacks chose or changed and a filter kept, summed over all seeds."""
        filters = [mapping(m.raw.get("filter")) for m in self.members]
        lines = []
        for attacks in zip(*(_attacks(member.raw) for member in self.members), strict=False):
            chosen = f"{_total(attacks, 'kept')} of {_total(attacks, 'rows')} benign rows"
            line = f"{chosen}, chosen by {attacks[0].get('name')}"
            if "changed" in attacks[0]:
                name, changed, kept, harmful = (
                    attacks[0].get("name"), *(_total(attacks, key) for key in ("changed", "kept", "harmful")),
                )  # fmt: skip
                line = f"{name}: {kept} rows, {changed} of them changed, {harmful} harmful"
            lines.append(line)
        if filters[0]:
            line = f"filter: {_total(filters, 'kept')} of {_total(filters, 'rows')} rows kept"
            confusions = [mapping(raw.get("confusion")) for raw in filters]
            missed, found = (_total(confusions, key) for key in ("false_negatives", "true_positives"))
            if missed is not None and found is not None:
                line += f", {missed} of {missed + found} harmful rows missed"
            caught = [mapping(raw.get("attack_rows")) for raw in filters]
            if caught[0]:
                line += f", {_total(caught, 'found')} of {_total(caught, 'rows')} rows of the attack found"
            lines.append(line)
        ablated = [mapping(member.raw.get("post_hoc_attack")) for member in self.members]
        if ablated[0]:
            lines.append(f"{ablated[0].get('name')}: {filled(ablated[0].get('headline'), ablated)}")
        swept = line_of([member.raw for member in self.members])
        return (*lines, swept) if swept else tuple(lines)

    @property
    def role(self) -> Role:
        """Whether the model is not fine-tuned, fine-tuned without or with a defense, or a control.

        A control replaces a repair by something simpler. It is not a defense: it shows what the repair adds.
        Results of earlier versions do not record the role; there, a fine-tuned model counts as defended.
        """
        told = self.members[0].raw.get("role")
        if told in ROLES:
            return told
        return "reference" if self.user is None and self.post_hoc is None else "defended"


def filled(text: Any, found: Sequence[Mapping[str, Any]]) -> str:
    """Return a method's text with its facts over all seeds; empty if the results lack one of them."""
    if not isinstance(text, str):
        return ""
    for name in re.findall(r"\{(\w+)\}", text):
        values = _values(found, name)
        if len(values) < len(found):
            return ""
        span = " to ".join(f"{n:g}" for n in dict.fromkeys((min(values), max(values))))
        text = text.replace(f"{{{name}}}", span)
    return text


def harm_title(rows: Sequence[Row]) -> str:
    """The name of `harmful_score` in these rows: "attack success rate" if their judge only finds refusals."""
    found = set()
    for row in rows:
        if row.scores.get("harmful_score") is not None:
            judge = row.judges.get(str(row.members[0].raw.get("judge"))) or next(
                iter(row.judges.values()), None
            )
            found.add(judge.title if judge is not None else HARM)
    return found.pop() if len(found) == 1 else HARM


def stages_text(row: Row) -> str:
    """The stages that made a model, in order: "SFT → Filter (beaver_dam) + Lisa → Safe LoRA"."""
    names = [row.alignment, row.user, row.post_hoc]
    if not any(names):
        return "the base model"
    titles = [row.method(name) if name else "" for name in names]
    if row.filter:
        titles[1] = f"Filter ({row.filter}) + {titles[1]}"
    text = " → ".join(title for title in titles if title)
    return text if row.alignment else f"not aligned → {text}"


def _attacks(raw: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return what one attack or a list of attacks did to the user's rows."""
    found = raw.get("attack")
    return [mapping(one) for one in (found if isinstance(found, list) else [found] if found else [])]


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


def sweeps(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Repairs of the same fine-tuned models that differ in one number: its name, and rows sorted by it."""
    found: dict[str, list[tuple[float, Row]]] = {}
    for row in rows:
        raw, tuned = row.members[0].raw, [member.steps.get("user") for member in row.members]
        parameters = mapping(raw.get("post_hoc_parameters"))
        for name, value in parameters.items():
            if number(value) is not None and all(tuned):
                others = {**parameters, name: None}
                key = json.dumps([name, row.alignment, row.user, row.post_hoc, tuned, others], sort_keys=True)
                found.setdefault(key, []).append((float(value), row))
    return [
        (json.loads(key)[0], [row for _, row in sorted(line, key=lambda pair: pair[0])])
        for key, line in found.items()
        if len({value for value, _ in line}) > 1
    ]


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
        alignment=_name(first.get("alignment")),
        user=_name(first.get("user")),
        post_hoc=_name(first.get("post_hoc")),
        poison_ratio=number(first.get("poison_ratio")) if first.get("user") is not None else None,
        seeds=tuple(member.seed for member in members if member.seed is not None),
        scores={key: _score(raws, key, count) for key, count in SCORES.items()},
        judges={name: _judge(raws, name) for name in judge_names},
        unparsed=_total(raws, "unparsed"),
        peak_memory_bytes=max(_values(raws, "peak_memory_bytes"), default=None),
        seconds=_mean(_values(raws, "seconds")),
        alignment_peak_memory_bytes=max(_values(raws, "alignment_peak_memory_bytes"), default=None),
        alignment_seconds=_mean(_values(raws, "alignment_seconds")),
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
    values = _values(measured, key)
    counts = _values(measured, count)
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
        n=_total(entries, "n"),
        unparsed=_total(entries, "unparsed"),
        false_positives=_total(entries, "false_positives"),
        false_negatives=_total(entries, "false_negatives"),
        title=str(next((entry["title"] for entry in entries if entry.get("title")), HARM)),
        mean_score=_mean(_values(entries, "mean_score")),
    )


def _name(value: Any) -> str | None:
    return None if value is None else str(value)


def _values(raws: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    return [value for raw in raws if (value := number(raw.get(key))) is not None]


def _total(raws: Sequence[Mapping[str, Any]], key: str) -> int | None:
    """The sum over seeds, or None if a seed lacks it: a partial sum would look like the whole sum."""
    values = _values(raws, key)
    return round(sum(values)) if values and len(values) == len(raws) else None


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
