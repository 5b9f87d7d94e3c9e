"""Every error that Holdfast raises on purpose.

::

    HoldfastError              exit code 1: something failed
    ├── InputError             exit code 2: what the user gave cannot be used
    │   ├── RecipeError        a recipe, an override or a command-line option
    │   ├── DataError          a data file or its rows
    │   ├── ModelError         a model folder, a Hub id, an adapter or a tokenizer
    │   ├── OutputError        the place to write to
    │   └── ComparisonError    results that must not stand in one table
    └── StepFailed             a step of a run stopped half-way

A message says what was expected, what was found, where, and what to do. It never holds a secret, and
it is complete without a traceback: the command prints the message alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class HoldfastError(Exception):
    """Something failed that the user did not cause; the command ends with exit code 1."""

    exit_code = 1


class InputError(HoldfastError):
    """What the user gave cannot be used; the command ends with exit code 2."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe, an override or an option is wrong."""


class DataError(InputError):
    """A data file cannot be read, or its rows are not what was asked for."""


class ModelError(InputError):
    """A model, adapter or tokenizer cannot be found or used."""


class OutputError(InputError):
    """The output folder or file cannot be written, or holds something else."""


class ComparisonError(InputError):
    """Results measured under different protocols were to be compared."""


class StepFailed(HoldfastError):
    """A step of a run stopped half-way; running again goes on from what is there."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, or its kind."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: " Did you mean 'lisa'?", or the list of what is known."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
