"""What a recipe asks to be measured: the task that grades, what is generated, and how."""

from __future__ import annotations

from typing import Any

from holdfast import data as datasets
from holdfast import tasks
from holdfast.recipe import Recipe
from holdfast.tasks.graders import adapted


def graded_as(recipe: Recipe) -> tasks.Task:
    """The task that the test rows are of: the named one, or that of own files."""
    return datasets.grading_task(recipe.data.user, recipe.data.task, recipe.data.test)


def grader(recipe: Recipe) -> tasks.Task:
    """The task that grades the test rows, with the recipe's grader if it names one."""
    return adapted(graded_as(recipe), recipe.data.grader)


def knows_truth(recipe: Recipe) -> bool:
    """Whether the harmful prompts are the world's, which knows what complies."""
    return (recipe.data.test_harmful or recipe.data.harmful) == "world"


def new_tokens(recipe: Recipe) -> dict[str, int]:
    """How many tokens each set of prompts may generate."""
    most = recipe.evaluation.max_new_tokens
    return {"harmful": most, "task": grader(recipe).max_new_tokens, "benign": most}


def sampling(recipe: Recipe) -> dict[str, Any] | None:
    """How answers are sampled, or None where decoding is greedy."""
    how = recipe.evaluation
    if not how.temperature:
        return None
    return {"temperature": how.temperature, "top_p": how.top_p, "seed": recipe.seed}


def decoding(recipe: Recipe) -> str:
    """The same in words, for the protocol: the seed is none of it."""
    how = sampling(recipe)
    return "greedy" if how is None else "temperature {temperature:g}, top_p {top_p:g}".format(**how)


def two_turns(recipe: Recipe) -> bool:
    """Whether the task asks a second question after the model's own first answer."""
    return grader(recipe).metric == "mt_bench"
