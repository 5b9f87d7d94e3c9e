"""The user task of the embedded world: a question with a short answer, graded by its first line."""

from __future__ import annotations

from holdfast.tasks import Task


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0].strip().casefold()


def grade(answer: str, target: str) -> bool:
    """Right if the first line equals that of the target, ignoring case and surrounding whitespace."""
    return _first_line(answer) == _first_line(target)


TASK = Task(
    name="world",
    summary="the embedded world's small classification task",
    grade=grade,
    licence="Apache-2.0",
    max_new_tokens=16,
    test_size=500,
)
