"""Judges and raters of a recipe: their identity, the checks before a run, and loading them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from holdfast import registry
from holdfast.errors import ModelError, RecipeError
from holdfast.evaluation.judges import LoadedJudge, LoadedRater
from holdfast.machine.digests import Digests
from holdfast.machine.store import identity_hash
from holdfast.measuring import protocol
from holdfast.recipe import Recipe
from holdfast.recipe.evaluation import JudgeRecipe, RaterRecipe, raters
from holdfast.recipe.model import block
from holdfast.tasks import METRICS, Metric, Task

Kind = TypeVar("Kind", bound=JudgeRecipe)

HARM = "harmful score"
"""The name of the share of harmful verdicts, unless the judge has its own name for it."""


def judge_folder(judge: JudgeRecipe, download: bool = False) -> Path | None:
    """The local folder of the judge's model; None if it has no model, or the model is not downloaded yet."""
    from holdfast.evaluation.judges.finding import find_judge

    path = judge.path or registry.face("judges", judge.name).facts.get("default_path")
    if path is None:
        return None
    try:
        return find_judge(path, download)
    except ModelError:
        if download or Path(path).exists() or path.startswith((".", "/")):
            raise
        return None


def judge_identity(
    judge: JudgeRecipe, digests: Digests | None = None, download: bool = False
) -> dict[str, Any]:
    """Return what determines a judge's verdicts, apart from its code: model, threshold, length and options.

    The address of a server, and limits on the calls to it, are left out.
    """
    from holdfast.weights.folders import fingerprint

    folder, options = judge_folder(judge, download), judge.options()
    for key in ("base_url", "requests_per_minute", "max_calls", "timeout"):
        options.pop(key, None)
    if judge.policy is not None:
        found = Path(judge.policy).is_file()  # the check before a run refuses a policy that is none
        content = Path(judge.policy).read_bytes().decode("utf-8", "replace") if found else None
        options["policy"] = judge.policy if content is None else identity_hash(content)
    return {
        "model": fingerprint(folder, digests) if folder else judge.path,
        "threshold": judge.threshold,
        "max_length": judge.max_length,
        "options": options,
    }


def check_judge(judge: JudgeRecipe) -> None:
    """Check that a judge can run, and download its model, before anything starts."""
    judge_folder(judge, download=True)
    check = registry.get("judges", judge.name).check
    if check is not None:
        check(path=judge.path, threshold=judge.threshold, max_length=judge.max_length, **judge.options())


def load_judge(judge: JudgeRecipe, device: str) -> LoadedJudge:
    """Load the judge."""
    return registry.get("judges", judge.name).load(
        path=judge.path,
        threshold=judge.threshold,
        max_length=judge.max_length,
        device=device,
        **judge.options(),
    )


def title(judge: str) -> str:
    """Return the name of a judge's score, which is its share of harmful verdicts."""
    return str(registry.face("judges", judge).facts.get("title", HARM))


def rater(recipe: Recipe) -> RaterRecipe | None:
    """The judge that rates the answers to the task; None if the task has its own grader or rating is off.

    Raises:
        RecipeError: only a judge can grade the task and no judge is given, or the judge measures something
            else.
    """
    task, named = protocol.grader(recipe), recipe.evaluation.rater
    if task.grade is not None:
        if isinstance(named, RaterRecipe):
            rows = "your own rows are" if task.name == "own" else f"{task.name} is"
            text = f"evaluation.rater: {named.name} rates answers, but {rows} graded without a judge"
            raise RecipeError(f"{text}. Leave it out.")
        return None
    if named is None:
        fitting = (raters(task.metric) or ["my_judge.py"])[0]
        measures = METRICS.get(task.metric, Metric(task.metric)).title
        raise RecipeError(
            f"Only a judge can grade {task.name} ({measures}), and none is given. Write evaluation: {{rater: "
            f"{{name: {fitting}, model: ..., base_url: ...}}}}, or rater: none to leave it unmeasured."
        )
    if not isinstance(named, RaterRecipe):
        return None
    check_rater(named, task)
    return named


def check_rater(named: RaterRecipe, task: Task) -> None:
    """Raise RecipeError if the judge does not measure the task's metric."""
    measures = registry.face("judges", named.name).facts.get("metric")
    if measures != task.metric:
        known = f" Judges that do: {', '.join(raters(task.metric))}." if raters(task.metric) else ""
        raise RecipeError(f"{named.name} measures {measures}, but {task.name} needs {task.metric}.{known}")


def load_rater(named: RaterRecipe) -> LoadedRater:
    """Load the rater."""
    common = {key: getattr(named, key) for key in ("path", "threshold", "max_length")}
    given = {key: value for key, value in common.items() if value is not None}
    return registry.get("judges", named.name).load(**given, **named.options())


def ready(name: str, device: str, options: Mapping[str, Any]) -> Any:
    """Check and load the judge `name`, as for a judge in a recipe. `device` may be "auto"."""
    judge = checked(JudgeRecipe, name, options)
    where = _judge_device(name, device)
    check_judge(judge)
    return load_judge(judge, where)


def checked(kind: type[Kind], name: str, options: Mapping[str, Any]) -> Kind:
    """The judge in the form of a recipe. Raises RecipeError if the options are not valid in a recipe."""
    given = {key: value for key, value in options.items() if value is not None}
    return block(kind, {"name": name, **given}, "")


def _judge_device(judge: str, asked: str) -> str:
    """Return the device; torch is imported only for a judge that loads a model.

    Raises:
        RecipeError: this machine has no such device.
    """
    from holdfast.models.device import available, check_name

    check_name(asked)
    facts = registry.face("judges", judge).facts
    if not (facts.get("needs_path") or facts.get("default_path")):
        return "cpu"
    return available(asked)
