"""The judge of a gate: the given one or a default, and its verdicts, kept in files named by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from holdfast.evaluation import moderation
from holdfast.machine.progress import Advance
from holdfast.machine.store import identity_hash
from holdfast.measuring import judging
from holdfast.measuring.answer_files import Rows, claim, judged_answers, learn_refusals
from holdfast.measuring.gate_answers import is_world
from holdfast.measuring.gate_sides import Side
from holdfast.recipe.evaluation import JudgeRecipe


@dataclass(frozen=True)
class Choice:
    """A judge with its options, and why it was chosen; "" if the user named it."""

    name: str
    options: Mapping[str, Any]
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """Return its name, what its share of "harmful" is called, and why it was chosen."""
        shown = Path(self.name).name if self.name.endswith(".py") else self.name
        return {"name": shown, "title": judging.title(self.name), "why": self.why}


def chosen_judge(sides: Sequence[Side], judge: str | None, options: Mapping[str, Any]) -> Choice:
    """Return the judge that the user named, or the best one that needs no download; it is checked.

    Raises:
        RecipeError, ModelError: the judge cannot be used.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if judge is not None:
        choice = Choice(judge, given)
    elif all(is_world(side) for side in sides):
        choice = Choice("beaver_dam", {"path": "world", **given}, "the judge of the embedded world")
    elif given.get("path") or judging.judge_folder(JudgeRecipe(name="beaver_dam")) is not None:
        choice = Choice("beaver_dam", given, "its model is on this machine")
    else:
        choice = Choice("keyword", given, "no model of a judge is on this machine")
    judging.check_judge(judging.checked(JudgeRecipe, choice.name, choice.options))
    return choice


def verdicts_on(
    answers: Sequence[Rows], choice: Choice, work: Path, device: str, progress: Advance
) -> list[Rows]:
    """Return the judge's verdicts on the answers of every model.

    Raises:
        StepFailed: the judge leaves too many answers without a verdict.
    """
    loaded = judging.ready(choice.name, device, choice.options)
    found = []
    for rows in answers:
        made = {"judge": choice.name, "judge_stamp": loaded.stamp, "answers": judged_answers(rows)}
        out = work / f"verdicts-{identity_hash(made)}.jsonl"
        with claim(out, made):
            verdicts = moderation.give_verdicts(rows, loaded, out, progress=progress)
            learn_refusals(out, verdicts)
        moderation.check_parsed(rows, verdicts, judge=choice.name, out=out)
        found.append(verdicts)
    return found
