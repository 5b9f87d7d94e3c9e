"""A judge behind an OpenAI-compatible server: OpenAI, vLLM, SGLang, TGI, llama.cpp, `transformers serve`.

The key comes from OPENAI_API_KEY, the address from the recipe or OPENAI_BASE_URL; the key is sent to that
address and written nowhere. Temperature 0. `evaluation.client` says which calls are repeated; a reply that
cannot be read is reported, never guessed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from holdfast.errors import ModelError, RecipeError, StepFailed
from holdfast.evaluation import client
from holdfast.evaluation.served import Reply, ServedModel
from holdfast.machine.secrets import shown

PROMPTS = Path(__file__).parent / "prompts"
WORKERS = 8
"""Number of concurrent questions."""

Verdicts = TypeVar("Verdicts")


class Server:
    """One judge on one server.

    Args:
        model: the server's name of it.
        base_url: the server's address, ending in /v1; OPENAI_BASE_URL or OpenAI itself by default.
        requests_per_minute: calls are spread so that no more are made; None for no limit.
        max_calls: calls of this process in all, repetitions included; None for no limit.
        timeout: seconds for one call.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        requests_per_minute: float | None = None,
        max_calls: int | None = None,
        timeout: float = 120.0,
    ):
        check(model=model, base_url=base_url)
        self.served = ServedModel(model, base_url, timeout=timeout, before_call=self._take_turn)
        self.model, self.max_calls = model, max_calls
        self.pause = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.calls, self.next_call, self.lock = 0, 0.0, Lock()

    def ask_each(
        self, questions: Sequence[Sequence[Mapping[str, str]]], max_tokens: int
    ) -> Iterator[tuple[int, Reply]]:
        """Ask each list of messages, several at once; yield the place of each and its reply as they come.

        Raises:
            ModelError: the server refuses the key or the model.
            StepFailed: the server does not answer, or the budget of calls is too small; earlier verdicts are
                kept.
        """
        if self.max_calls is not None and self.max_calls - self.calls < len(questions):
            raise self._spent()
        asked = [
            {"messages": list(messages), "temperature": 0, "new_tokens": max_tokens} for messages in questions
        ]
        return self.served.ask_all(asked, threads=WORKERS)

    def _take_turn(self) -> None:
        """Take one call from the budget, and wait for its turn; the client does this before every call."""
        with self.lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise self._spent()  # by repetitions; a question that was not asked gets no verdict
            self.calls += 1
            now = time.monotonic()
            turn = max(now, self.next_call)
            self.next_call = turn + self.pause
        if turn > now:
            time.sleep(turn - now)

    def _spent(self) -> StepFailed:
        return StepFailed(
            f"The budget of {self.max_calls} calls to {self.model} is not enough ({self.calls} are used). "
            "The verdicts so far are kept; raise max_calls and run again to continue."
        )


def in_order(found: Iterable[tuple[int, Verdicts]]) -> list[Verdicts]:
    """Return results in the order of their places."""
    return [result for _, result in sorted(found, key=lambda one: one[0])]


def grouped(
    replies: Iterable[tuple[int, Reply]], groups: Sequence[int], judge: Callable[[list[Reply]], Verdicts]
) -> Iterator[tuple[int, Verdicts]]:
    """Yield the place of a row and its result as soon as all its replies have come.

    Args:
        groups: for each question, the place of the row that it belongs to; questions of a row are in order.
        judge: makes the result of a row from its replies.
    """
    found: dict[int, dict[int, Reply]] = {}
    for i, reply in replies:
        row = groups[i]
        of_row = found.setdefault(row, {})
        of_row[i] = reply
        if len(of_row) == groups.count(row):
            yield row, judge([of_row[k] for k in sorted(of_row)])


def without(replies: Iterable[Reply]) -> tuple[str, ...]:
    """Return the parameters that were left out of at least one call."""
    return tuple(sorted({name for reply in replies for name in reply.without}))


_QUOTED = re.compile(
    r'"[^"\n]*"|“[^”\n]*”|«[^»\n]*»|`[^`\n]+`|(?<!\w)\'[^\'\n]*\'(?!\w)|^[ \t]*>.*$', re.MULTILINE
)
_FENCED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)


def own_words(text: str) -> str:
    """Return a judge's reply without what it quotes: a quote of the answer is no grade."""
    return _QUOTED.sub('""', _FENCED.sub('""', text))


def check(model: str | None = None, base_url: str | None = None, **_: Any) -> None:
    """Raise an error that would stop a judge on a server, without calling it.

    Raises:
        RecipeError: no model is named, or the address is not valid.
        ModelError: the client or the key is missing.
    """
    if not model:
        raise RecipeError("A judge on a server needs the name of its model: {name: openai, model: NAME}.")
    if base_url is not None and not client.is_address(base_url):
        found = shown(base_url)
        raise RecipeError(f"base_url: expected an address like http://localhost:8000/v1, found {found!r}.")
    client.check_installed()
    if not os.environ.get("OPENAI_API_KEY") and not (base_url or client.default_address()):
        raise ModelError(
            "OPENAI_API_KEY is not set. Set it in the environment, or name a server of your own: base_url."
        )


def fill(template: str, **texts: str) -> str:
    """Replace {name} by texts in one pass, so that a {name} inside a text is not replaced."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)
