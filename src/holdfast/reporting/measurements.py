"""What a report knows of a model: its measurements, its scores, and the row that they make."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from holdfast.reporting.points import line_of
from holdfast.reporting.read import mapping, number, text_of, total, values_of
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
        return text_of(found.get("judge") or found.get("score"))

    @property
    def user_rows(self) -> tuple[str, ...]:
        """How many of the user's rows attacks chose or changed and a filter kept, summed over all seeds."""
        filters = [mapping(m.raw.get("filter")) for m in self.members]
        lines = []
        for attacks in zip(*(_attacks(member.raw) for member in self.members), strict=False):
            chosen = f"{total(attacks, 'kept')} of {total(attacks, 'rows')} benign rows"
            line = f"{chosen}, chosen by {attacks[0].get('name')}"
            if "changed" in attacks[0]:
                name, changed, kept, harmful = (
                    attacks[0].get("name"), *(total(attacks, key) for key in ("changed", "kept", "harmful")),
                )  # fmt: skip
                line = f"{name}: {kept} rows, {changed} of them changed, {harmful} harmful"
            lines.append(line)
        if filters[0]:
            line = f"filter: {total(filters, 'kept')} of {total(filters, 'rows')} rows kept"
            confusions = [mapping(raw.get("confusion")) for raw in filters]
            missed, found = (total(confusions, key) for key in ("false_negatives", "true_positives"))
            if missed is not None and found is not None:
                line += f", {missed} of {missed + found} harmful rows missed"
            caught = [mapping(raw.get("attack_rows")) for raw in filters]
            if caught[0]:
                line += f", {total(caught, 'found')} of {total(caught, 'rows')} rows of the attack found"
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
        values = values_of(found, name)
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
