"""The questions of a gate, and the answers of each model to them, kept in files named by their content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.data.sources import Source
from holdfast.errors import ComparisonError, DataError, RecipeError
from holdfast.evaluation.moderation import check_answered
from holdfast.evaluation.turns import SECOND
from holdfast.machine.digests import Digests
from holdfast.machine.progress import Advance
from holdfast.machine.store import identity_hash
from holdfast.measuring.answer_files import Rows, made_by, read_answers
from holdfast.measuring.gate_sides import Side
from holdfast.measuring.generating import Job
from holdfast.recipe.evaluation import Decoding

EVERYDAY = Path(__file__).with_name("everyday.jsonl")
"""Harmless questions of Holdfast's own, many of which sound alarming, to measure over-refusal."""
DEFAULTS = ("beavertails", "xstest")
"""The harmful prompts that are tried if none are given."""
SETTINGS = ("system", "max_new_tokens", "sampling")
"""The settings that two files of answers have to share."""
ANSWER = ("answer", "tokens", "truncated", "raw", "error", "without")
"""The keys of a row that belong to its answer, not to its question."""


@dataclass(frozen=True)
class Questions:
    """The rows to answer, and for each set its `source`, its `n`, and whether it is a `default`."""

    rows: Rows
    facts: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Asked:
    """How the questions are answered: everything but the model."""

    rows: Rows
    how: Decoding
    task: str
    work: Path
    device: str


def which_questions(sides: Sequence[Side], sets: Mapping[str, Any], most: int) -> Questions:
    """Return the questions: those of the first file of answers, or else the given or default sets.

    Raises:
        RecipeError: prompts are given with a file of answers, or no default prompts are available.
        DataError: a source cannot be used.
    """
    file = next((side.file for side in sides if side.file is not None), None)
    if file is not None:
        given = [name for name in ("prompts", "benign", "task_rows") if sets[name] is not None]
        if given:
            raise RecipeError(
                f"The questions are those of {file}, so --{given[0].replace('_', '-')} has no effect. "
                "Leave it out."
            )
        rows = [
            {key: value for key, value in row.items() if key not in ANSWER}
            for row in read_answers(file)[0]
            if row["set"] != SECOND
        ]
        return Questions(rows, _facts(rows, dict.fromkeys(("harmful", "task", "benign"), str(file)), ()))
    world = all(is_world(side) for side in sides)
    benign = sets["benign"] or ("world" if world else str(EVERYDAY))
    harmful = sets["prompts"] or ("world" if world else None)
    made = {
        "benign": None if benign == "none" else benign, "task": sets["task"], "test": sets["task_rows"],
        "prompts": most, "task_size": most,
    }  # fmt: skip
    rows, used = _first_available([harmful] if harmful else DEFAULTS, made)
    rows = [row for row in rows if row["set"] != "benign" or benign != "none"]
    names = {"harmful": used, "task": sets["task_rows"] or sets["task"], "benign": benign}
    if names["benign"] == str(EVERYDAY):
        names["benign"] = "built in"
    defaults = [name for name, key in (("harmful", "prompts"), ("benign", "benign")) if sets[key] is None]
    return Questions(rows, _facts(rows, names, defaults))


def _first_available(sources: Sequence[Source], made: Mapping[str, Any]) -> tuple[Rows, Source]:
    """Return the rows with the first harmful prompts that can be read."""
    problems = []
    for source in sources:
        try:
            return list(datasets.test_rows(harmful_test=source, **made).rows), source
        except DataError as error:
            if len(sources) == 1:
                raise
            problems.append(f"{source}: {error}")
    tried = "\n".join(problems)
    raise RecipeError(
        "No harmful prompts are given, and the default ones are not available here. Give --prompts FILE.\n"
        f"{tried}"
    )


def _facts(rows: Rows, sources: Mapping[str, Any], defaults: Sequence[str]) -> dict[str, dict[str, Any]]:
    counts = {name: sum(row["set"] == name for row in rows) for name in ("harmful", "benign", "task")}
    return {
        name: {"source": _shown(sources[name]), "n": n, "default": name in defaults}
        for name, n in counts.items()
        if n
    }


def _shown(source: Any) -> str:
    return (
        source if isinstance(source, str) else Path(source).name if isinstance(source, Path) else "own rows"
    )


def is_world(side: Side) -> bool:
    """Whether a side is the embedded world's model, which understands only the world's questions."""
    from holdfast.weights.folders import find_model, model_path

    if side.model is None:
        return False
    folder = find_model(str(model_path(side.model.path)), side.model.revision)
    return (folder / "config.json").read_bytes() == (Path(model_path("world")) / "config.json").read_bytes()


def answers_of(sides: Sequence[Side], asked: Asked, progress: Advance) -> list[Rows]:
    """Return the answers of every side, in order; weights that several sides share are loaded once.

    Raises:
        StepFailed: a model answers none of the harmful prompts.
    """
    from holdfast.models.sharing import Shared

    shared, digests, found = Shared(), Digests(asked.work / "digests.json"), []
    total = len(asked.rows) * sum(side.file is None for side in sides)
    before = 0
    for side in sides:
        if side.file is not None:
            rows = [row for row in read_answers(side.file)[0] if row["set"] != SECOND]
        else:
            watch = partial(_counted, progress, before, total)
            rows = _generated(side, asked, shared, digests, watch)
            before += len(asked.rows)
        check_answered(rows)
        found.append(rows)
    return found


def _counted(progress: Advance, before: int, total: int, done: int, _: int) -> None:
    progress(before + done, total)


def _generated(side: Side, asked: Asked, shared: Any, digests: Digests, progress: Advance) -> Rows:
    """Return the answers of weights, from the file that is named by everything that they depend on."""
    from holdfast.machine.processes import Processes
    from holdfast.models.dates import FIXED
    from holdfast.models.device import choose_device
    from holdfast.models.dtypes import used_dtype
    from holdfast.weights.folders import find_model, fingerprint, model_path

    assert side.model is not None
    model = side.model
    if model.template_date is None:  # answers of another day are comparable
        model = model.model_copy(update={"template_date": FIXED})
    folder = find_model(str(model_path(model.path)), model.revision)
    dtype = used_dtype(folder, model.dtype, choose_device(asked.device, folder, Processes()))
    identity = {
        "model": fingerprint(folder, digests),
        "adapters": [fingerprint(one, digests) for one in side.chain],
        "rows": asked.rows,
        "decoding": asked.how.model_dump(),
        "weights": {**model.model_dump(exclude={"path", "revision", "trust_remote_code"}), "dtype": dtype},
        "task": asked.task,
        "versions": {name: version(name) for name in ("holdfast", "torch", "transformers", "peft")},
    }
    out = asked.work / f"answers-{identity_hash(identity)}.jsonl"
    job = Job(asked.rows, out, asked.task, asked.how, 0, progress, digests)
    return job.ask_weights(model, side.chain, asked.device, shared)


def check_same_questions(start: Side, before: Rows, side: Side, after: Rows) -> None:
    """Check that two models answered the same questions in the same way.

    Raises:
        ComparisonError: an id belongs to two different questions, no question is in common, or files of
            answers were made with other settings.
    """
    known = {(row["set"], row["id"]): _question(row) for row in before}
    shared = [row for row in after if (row["set"], row["id"]) in known]
    if not any(row["set"] == "harmful" for row in shared):
        raise ComparisonError(
            f"{start.name} and {side.name} have no harmful prompt in common (by id). Generate both "
            "from the same prompts."
        )
    for row in shared:
        if known[row["set"], row["id"]] != _question(row):
            raise ComparisonError(
                f"{start.name} and {side.name} have different questions under the id {row['id']!r}. Generate "
                "both from the same prompts."
            )
    made = [made_by(one.file) if one.file is not None else None for one in (start, side)]
    for key in SETTINGS:
        if all(one and key in one for one in made) and made[0][key] != made[1][key]:  # type: ignore[index]
            raise ComparisonError(
                f"{start.name} and {side.name} were generated with different settings ({key}: "
                f"{made[0][key]} and {made[1][key]}). Generate both with the same ones."  # type: ignore[index]
            )


def _question(row: Mapping[str, Any]) -> tuple[str, str]:
    return row["instruction"], row.get("input") or ""
