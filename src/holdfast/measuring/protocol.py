"""The measurement that a recipe asks for: the grading task, the length of answers, and the decoding."""

from __future__ import annotations

from typing import Any

from holdfast import data as datasets
from holdfast import tasks
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted


def graded_as(recipe: Recipe) -> tasks.Task:
    """Return the task of the test rows: the named task, or the one for the user's own files."""
    return datasets.grading_task(recipe.data.user, recipe.data.task, recipe.data.test)


def grader(recipe: Recipe) -> tasks.Task:
    """Return the task that grades the test rows, with the recipe's grader if it names one."""
    return adapted(graded_as(recipe), recipe.data.grader)


def knows_truth(recipe: Recipe) -> bool:
    """Whether the harmful prompts come from the world, which knows which answers comply."""
    return (recipe.data.test_harmful or recipe.data.harmful) == "world"


def new_tokens(recipe: Recipe) -> dict[str, int]:
    """Return the maximum number of new tokens for each set of prompts."""
    most = recipe.evaluation.max_new_tokens
    task = recipe.evaluation.task_new_tokens or grader(recipe).max_new_tokens
    return {"harmful": most, "task": task, "benign": most}


def sampling(recipe: Recipe) -> dict[str, Any] | None:
    """Return the settings of sampling, or None if decoding is greedy."""
    how = recipe.evaluation
    if not how.temperature:
        return None
    return {"temperature": how.temperature, "top_p": how.top_p, "seed": recipe.seed}


def decoding(recipe: Recipe) -> str:
    """Return the decoding as text for the protocol, without the seed."""
    how = sampling(recipe)
    return "greedy" if how is None else "temperature {temperature:g}, top_p {top_p:g}".format(**how)


def two_turns(recipe: Recipe) -> bool:
    """Whether the task asks a second question after the model's own first answer."""
    return grader(recipe).metric == "mt_bench"
