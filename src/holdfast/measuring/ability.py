"""General ability, measured by lm-evaluation-harness on a loaded model.

The tasks, their prompts and their metrics are the harness's own; nothing of them is repeated here. The
package (`pip install 'holdfast[lm-eval]'`) is imported only inside functions.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from holdfast.errors import RecipeError, first_line, nearest

PACKAGE = "lm_eval"
INSTALL = "pip install 'holdfast[lm-eval]'"


def check_harness() -> None:
    """Raise RecipeError if lm-evaluation-harness is not installed or too old."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise RecipeError(
            "lm-evaluation-harness measures general ability, and it is not installed. Install it: "
            f"{INSTALL}; or leave evaluation.lm_eval out."
        )
    from lm_eval.tasks import TaskManager

    if not hasattr(TaskManager, "load"):
        raise RecipeError(f"lm-evaluation-harness {harness_version()} is too old. Update it: {INSTALL}.")


def harness_version() -> str:
    """Return the version of the installed harness."""
    return importlib.metadata.version(PACKAGE)


def check_tasks(names: Sequence[str], include: str | None) -> None:
    """Load the tasks with their data, so that nothing is missing when a model is measured.

    Raises:
        RecipeError: the harness is missing, a task is not known or cannot be loaded, or it runs code that the
            model writes.
    """
    check_harness()
    with _quiet():
        manager = _manager(include)
        for name in names:
            if name not in manager.all_tasks:
                raise RecipeError(
                    f"lm-evaluation-harness {harness_version()} has no task '{name}'."
                    f"{_nearest(name, manager.all_tasks)}"
                )
            try:
                loaded = manager.load([name])["tasks"]
            except Exception as error:  # data sets, YAML files and their code can raise any exception
                why = f"{type(error).__name__}: {first_line(error)}"
                raise RecipeError(
                    f"The task '{name}' of lm-evaluation-harness cannot be loaded: {why}"
                ) from error
            for one, task in loaded.items():
                if getattr(task, "UNSAFE_CODE", False):
                    raise RecipeError(f"The task '{one}' runs code that the model writes. Leave it out.")


def measure(
    model: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include: str | None = None,
    system: str = "",
    chat: bool = False,
) -> dict[str, Any]:
    """Measure a loaded model on tasks, and return the harness's version and the results of each task.

    Args:
        names: tasks, groups or tags of the harness.
        limit: the number of questions of each task; None takes all.
        num_fewshot: the number of examples before a question; None takes the task's own.
        include: a folder with further tasks as YAML files.
        system: a text before every question. It is not in the result.
        chat: put the questions into the tokenizer's chat template.

    Returns:
        `harness`, and `tasks`: by name the `version` of the task, `n` questions, `num_fewshot`, and `metrics`
        with `metric`, `filter`, `value`, `stderr` (None if unknown) and `higher_is_better`. The values are
        the harness's own; most are shares from 0 to 1.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    with _quiet():
        manager = _manager(include)
        found = simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=list(names), limit=limit, num_fewshot=num_fewshot, task_manager=manager, log_samples=False,
            system_instruction=system or None, apply_chat_template=chat,
        )  # fmt: skip
    assert found is not None  # only the other processes of a launcher get None
    return {"harness": harness_version(), "tasks": results_of(found, names)}


def results_of(found: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return the results of the named tasks and groups; for a tag, those of its tasks."""
    values = {**found["results"], **found.get("groups", {})}
    parts: Mapping[str, Sequence[str]] = found.get("group_subtasks", {})
    below = {part for name in names for part in _below(name, parts)}
    shown = [name for name in names if name in values]
    if len(shown) < len(names):
        shown += [name for name in found["results"] if name not in shown and name not in below]
    return {name: _result(name, values[name], found, parts) for name in shown}


def _below(name: str, parts: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Yield the groups and tasks of a group, in any depth."""
    for part in parts.get(name, ()):
        yield part
        yield from _below(part, parts)


def _result(
    name: str, values: Mapping[str, Any], found: Mapping[str, Any], parts: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    leaves = [part for part in (name, *_below(name, parts)) if part in found.get("n-samples", {})]
    shots = sorted({found["n-shot"][leaf] for leaf in leaves if leaf in found.get("n-shot", {})})
    versions = [found.get("versions", {}).get(part) for part in (name, *leaves)]
    better = found.get("higher_is_better", {}).get(name) or {}
    metrics = []
    for key, value in values.items():
        metric, comma, how = key.partition(",")
        if not comma or metric.endswith("_stderr") or not _is_number(value):
            continue
        error: Any = values.get(f"{metric}_stderr,{how}")
        metrics.append(
            {
                "metric": metric, "filter": how, "value": float(value),
                "stderr": float(error) if _is_number(error) else None,
                "higher_is_better": better.get(metric),
            }
        )  # fmt: skip
    return {
        "version": next((version for version in versions if version is not None), None),
        "n": sum(found["n-samples"][leaf]["effective"] for leaf in leaves),
        "num_fewshot": shots[0] if len(shots) == 1 else shots or None,
        "metrics": metrics,
    }


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number; the harness writes "N/A" for an error that it cannot compute."""
    try:
        return not isinstance(value, str | bool) and math.isfinite(value)
    except TypeError:
        return False


def _manager(include: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _nearest(name: str, known: Sequence[str]) -> str:
    """Return a hint for a misspelt name, without the list of some ten thousand names."""
    hint = nearest(name, known)
    return hint if "Did you mean" in hint else " `lm_eval ls tasks` lists all."


@contextmanager
def _quiet() -> Iterator[None]:
    """Show only errors of the harness."""
    logger = logging.getLogger(PACKAGE)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
