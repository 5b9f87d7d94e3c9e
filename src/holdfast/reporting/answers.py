"""Answers of several models to the same prompts. The prompts on which the models differ most are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

from holdfast.reporting.measurements import Measurement, Row
from holdfast.reporting.read import mapping, number, read_lines, read_object
from holdfast.reporting.training import step_folder

PER_SET = {"harmful": 4, "task": 3, "benign": 3}
"""Number of prompts shown from each set."""

COMPARED = 200
"""Two answers are compared by this many characters from their beginning."""


@dataclass(frozen=True)
class Verdict:
    """A judge's verdict: "harmful", "safe" or "unparsed", with the judge's score if it gives one."""

    judge: str
    verdict: str
    score: float | None


@dataclass(frozen=True)
class Answer:
    """One model's answer to a prompt."""

    label: str
    text: str
    truncated: bool
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt of a test set, with the answers of the compared models, always in the same order."""

    id: str
    set: str
    instruction: str
    input: str
    target: str | None
    category: tuple[str, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Comparison:
    """The chosen prompts, and the labels of the models that answered them."""

    labels: tuple[str, ...]
    prompts: tuple[Prompt, ...]
    split: tuple[Prompt, ...] = ()
    """Harmful prompts with the answers that one judge calls harmful and another judge calls safe."""

    def of(self, name: str) -> list[Prompt]:
        """Return the chosen prompts of one set."""
        return [prompt for prompt in self.prompts if prompt.set == name]


Generations = dict[tuple[str, str], dict[str, Any]]  # a row of generations.jsonl by (set, id)
Verdicts = dict[str, list[Verdict]]


def compare_answers(rows: Sequence[Row]) -> tuple[Comparison | None, list[str]]:
    """The answers of up to three models (None if no answers were kept), and the missing step folders."""
    labels: list[str] = []
    read: list[tuple[Generations, Verdicts]] = []
    missing: list[str] = []
    for row in compared(rows):
        member = row.members[0]
        found = generations(member, missing)
        if found:
            labels.append(row.label)
            read.append((found, verdicts(member, missing)))
    if not read:
        return None, missing
    shared = set(read[0][0]).intersection(*(generations for generations, _ in read[1:]))
    # Models of different runs may have answered different prompts: then only the first model's are shown.
    if not shared:
        labels, read, shared = labels[:1], read[:1], set(read[0][0])
    prompts = []
    split: list[Prompt] = []
    for name, count in PER_SET.items():
        keys = sorted(key for key in shared if key[0] == name)
        candidates = [_prompt(key, labels, read) for key in keys]
        split += _spread([one for prompt in candidates if (one := _split(prompt))])[:count]
        candidates.sort(key=_difference, reverse=True)  # stable: ties keep the order of their ids
        prompts.extend(_spread(candidates)[:count])
    return (Comparison(tuple(labels), tuple(prompts), tuple(split)) if prompts else None), missing


def compared(rows: Sequence[Row]) -> list[Row]:
    """The model before fine-tuning, and the most and the least harmful model after fine-tuning."""
    after = [row for row in rows if row.role != "reference"]
    scored = [row for row in after if row.scores["harmful_score"] is not None]
    chosen: list[Row] = []
    if scored:
        by_score = sorted(scored, key=_harmful_score)
        undefended = [row for row in by_score if row.role == "undefended" and row.alignment is not None]
        defended = [row for row in by_score if row.role == "defended"]
        chosen = [(undefended or by_score)[-1], (defended or by_score)[0]]
    elif after:
        chosen = after[:2]
    before = [row for row in rows if row.role == "reference"]
    if chosen and before:
        same = [row for row in before if row.alignment == chosen[0].alignment]
        chosen.insert(0, (same or before)[0])
    elif before:
        chosen = before[:2]
    return list({row.number: row for row in chosen}.values())


def _harmful_score(row: Row) -> float:
    score = row.scores["harmful_score"]
    return score.value if score is not None else 0.0


def generations(member: Measurement, missing: list[str]) -> Generations:
    """The answers of one model by set and id; `missing` receives the step folder if it is not there."""
    found: Generations = {}
    step_id = member.steps.get("generate")
    if not isinstance(step_id, str):
        return found
    folder = step_folder(member.store, step_id)
    if folder is None or not (folder / "generations.jsonl").is_file():
        missing.append(step_id)
        return found
    for row in read_lines(folder / "generations.jsonl"):
        if row.get("answer") is not None:
            found[str(row.get("set")), str(row.get("id"))] = row
    return found


def verdicts(member: Measurement, missing: list[str]) -> Verdicts:
    """Verdicts by prompt id, in the order of the row's moderate steps (the same as that of its judges)."""
    found: Verdicts = {}
    steps = member.steps.get("moderate") or []
    steps = [steps] if isinstance(steps, str) else steps
    names = list(mapping(member.raw.get("judges")))
    for index, step_id in enumerate(step for step in steps if isinstance(step, str)):
        folder = step_folder(member.store, step_id)
        if folder is None or not (folder / "verdicts.jsonl").is_file():
            missing.append(step_id)
            continue
        record = read_object(folder / "step.json") if (folder / "step.json").is_file() else {}
        # Runs that share a step may label its judge differently: the row's own label is preferred.
        told = record.get("judge") or f"judge {index + 1}"
        judge = names[index] if len(names) == len(steps) else str(told)
        for row in read_lines(folder / "verdicts.jsonl"):
            verdict = Verdict(judge, str(row.get("verdict", "unparsed")), number(row.get("score")))
            found.setdefault(str(row.get("id")), []).append(verdict)
    return found


def _prompt(
    key: tuple[str, str], labels: Sequence[str], read: Sequence[tuple[Generations, Verdicts]]
) -> Prompt:
    first = read[0][0][key]
    category = first.get("category")
    target = first.get("target")
    return Prompt(
        id=key[1],
        set=key[0],
        instruction=str(first.get("instruction") or ""),
        input=str(first.get("input") or ""),
        target=None if target is None else str(target),
        category=tuple(str(name) for name in category) if isinstance(category, list) else (),
        answers=tuple(
            Answer(
                label=label,
                text=str(generations[key]["answer"]),
                truncated=generations[key].get("truncated") is True,
                verdicts=tuple(verdicts.get(key[1], ())),
            )
            for label, (generations, verdicts) in zip(labels, read, strict=True)
        ),
    )


def _split(prompt: Prompt) -> Prompt | None:
    """The prompt with only the answers on which the judges contradict each other; None if there are none."""
    answers = tuple(
        answer
        for answer in prompt.answers
        if {"harmful", "safe"} <= {verdict.verdict for verdict in answer.verdicts}
    )
    return replace(prompt, answers=answers) if answers else None


def _difference(prompt: Prompt) -> tuple[int, float]:
    """How much the models differ: first by the headline judge's verdicts, then by the text of the answers."""
    verdicts = {answer.verdicts[0].verdict for answer in prompt.answers if answer.verdicts}
    first = prompt.answers[0].text[:COMPARED]
    ratios = [
        SequenceMatcher(None, first, other.text[:COMPARED], autojunk=False).ratio()
        for other in prompt.answers[1:]
    ]
    return len(verdicts), round(sum(1 - ratio for ratio in ratios), 6)


def _spread(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The first prompt of each category, then the other prompts; both groups keep their order."""
    first = {prompt.category: prompt for prompt in reversed(prompts)}
    return sorted(prompts, key=lambda prompt: first[prompt.category] is not prompt)
