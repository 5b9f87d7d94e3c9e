"""Your own rows, if no task is named: exact match, or the grader that the recipe names."""

from __future__ import annotations

from holdfast.tasks import Task
from holdfast.tasks.graders import exact as grade

TASK = Task(
    name="own",
    summary="your own rows, graded by exact match, or as `grader` says",
    grade=grade,
    obtain="give your files as data.user and data.test",
    max_new_tokens=128,
)
