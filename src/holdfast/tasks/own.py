"""A user's own rows, when no task is named: exact match."""

from __future__ import annotations

from holdfast.tasks import Task


def grade(answer: str, target: str) -> bool:
    """Right if the texts are equal apart from whitespace at both ends."""
    return answer.strip() == target.strip()


TASK = Task(
    name="own",
    summary="your own rows, graded by exact match",
    grade=grade,
    max_new_tokens=128,
)
