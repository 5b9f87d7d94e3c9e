"""All errors that Holdfast raises deliberately.

::

    HoldfastError              exit code 1: something failed
    ├── InputError             exit code 2: the user's input cannot be used
    │   ├── RecipeError        a recipe, an override or a command-line option
    │   ├── DataError          a data file or its rows
    │   ├── ModelError         a model folder, a Hub id, an adapter or a tokenizer
    │   ├── OutputError        the output folder or file
    │   ├── ComparisonError    results that are not comparable
    │   └── Problems           several of these, found before a run starts
    └── StepFailed             a step of a run stopped before its end

A message says what was expected, what was found, where, and what to do. It never contains a secret, and
it is complete without a traceback: the command prints only the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Self

_CONTROLS = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\n\t"} | {127: "\u2421"}
_FORMATS = (*range(128, 160), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A))
_VISIBLE = _CONTROLS | dict.fromkeys((*_FORMATS, *range(55296, 57344)), "�")


def visible(text: str) -> str:
    """Return a text with a visible sign for each control character: ESC becomes \u241b.

    C0 and C1 controls (except line break and tab), controls of the direction of writing, the Unicode line
    separators and half surrogates are replaced.
    """
    return text.translate(_VISIBLE)


class HoldfastError(Exception):
    """A failure that the user did not cause; the command ends with exit code 1.

    Its message is `visible`, whatever it quotes from a file, a model or a server.
    """

    exit_code = 1

    def __str__(self) -> str:
        return visible(super().__str__())


class InputError(HoldfastError):
    """The user's input cannot be used; the command ends with exit code 2.

    Attributes:
        key: the recipe key that the problem belongs to, in parts; () if it belongs to none.
        elsewhere: whether the input exists but is not on this machine, such as a gated model of the Hub.
    """

    exit_code = 2
    key: tuple[str, ...] = ()
    elsewhere: bool = False

    def not_here(self) -> Self:
        """Return the error itself, marked as one of an input that is not on this machine."""
        self.elsewhere = True
        return self

    def at(self, *key: str) -> InputError:
        """Return the error itself with a recipe key, unless it has one."""
        self.key = self.key or key
        return self

    def after(self, where: str) -> InputError:
        """Return the same error with a place before its message, as in "my.yaml, line 7"; itself for ""."""
        if not where:
            return self
        made = type(self)(f"{where}: {self}")
        made.key, made.elsewhere = self.key, self.elsewhere
        return made


class RecipeError(InputError):
    """A recipe, an override or an option is not valid."""


class DataError(InputError):
    """A data file cannot be read, or its rows are not as required."""


class ModelError(InputError):
    """A model, adapter or tokenizer cannot be found or used."""


class OutputError(InputError):
    """The output folder or file cannot be written, or contains something else."""


class ComparisonError(InputError):
    """The results to compare were measured under different protocols."""


class Problems(InputError):
    """Several problems, listed together; `found` holds them."""

    def __init__(self, found: Sequence[InputError]):
        self.found = tuple(found)
        lines = "\n".join("- " + str(error).replace("\n", "\n  ") for error in found)
        super().__init__(f"{len(found)} problems were found; nothing was trained.\n{lines}")


class StepFailed(HoldfastError):
    """A step of a run stopped before its end; running again resumes it."""


def problems(checks: Iterable[Callable[[], None]]) -> list[InputError]:
    """Call every check, and return the problems that they raise, each text once."""
    found: dict[str, InputError] = {}
    for check in checks:
        try:
            check()
        except InputError as error:
            for one in error.found if isinstance(error, Problems) else (error,):
                found.setdefault(str(one), one)
    return list(found.values())


def refuse(found: Sequence[InputError]) -> None:
    """Raise the only problem, or `Problems` if there are several; do nothing if there is none."""
    if found:
        raise found[0] if len(found) == 1 else Problems(found)


@contextmanager
def about(*key: str) -> Iterator[None]:
    """Give a recipe key to an error that is raised inside, unless it has one."""
    try:
        yield
    except InputError as error:
        raise error.at(*key)  # noqa: B904


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters, or its kind."""
    return str(error).strip().split("\n")[0][:300] or type(error).__name__


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelt name: " Did you mean 'lisa'?", or the list of known names."""
    known = sorted(known)
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(known)}." if known else ""
