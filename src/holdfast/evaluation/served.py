"""One model on an OpenAI-compatible server: its replies, and the parameters that it does not accept.

A parameter that the server refuses (`temperature` on models that reason, `seed`, `max_tokens`) is learned
from the first refusal. The question is asked again without it, and every reply says which parameters are
missing. A fault in one question is the reason of its reply; a fault in all of them ends the run.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from holdfast.errors import HoldfastError, ModelError, StepFailed, first_line
from holdfast.evaluation import client
from holdfast.evaluation.frames import UNFINISHED, spoken
from holdfast.evaluation.threads import as_finished
from holdfast.machine.secrets import password_of, redacted, shown

DOWN = 3
"""If the first replies are all lost, or all refused, and there are this many, the run stops."""

SILENT = 8
"""If this many questions in a row get no reply, the server has gone and the run stops."""

PATIENCE = 60.0
"""Seconds for the repetitions of one question, besides twice the time limit of a call."""

LENGTH = ("max_tokens", "max_completion_tokens")
"""The two names of the limit on new tokens; newer models accept only the second."""

_REFUSES = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed|extra|deprecated"
)
_PLACEHOLDERS = (client.NO_KEY, "empty", "dummy")


@dataclass(frozen=True)
class Reply:
    """A reply to one question.

    Attributes:
        text: the text without thinking; None if there is none, for the `reason`.
        lost: no call was successful: a timeout, a broken connection, an error of the server.
        refused: the server refused the question, or its reply is not in OpenAI's format.
        raw: the whole text, if thinking was removed from it.
        tokens: the number of generated tokens, if the server gives it.
        truncated: the reply was cut at the limit on new tokens.
        without: the parameters that were left out because the server does not accept them.
    """

    text: str | None
    reason: str = ""
    lost: bool = False
    refused: bool = False
    raw: str | None = None
    tokens: int | None = None
    truncated: bool = False
    without: tuple[str, ...] = ()

    @property
    def whole(self) -> str | None:
        """The text as the server sent it, or the reason why there is none."""
        return self.raw or self.text or self.reason


class ServedModel:
    """A model on a server.

    Args:
        model: the server's name of it.
        base_url: as in `client.connect`.
        timeout: the time limit of one call in seconds. A question is not repeated any more after twice that
            time and `PATIENCE`.
        before_call: called before every call, including repetitions; an exception from it ends the run.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        *,
        timeout: float,
        before_call: Callable[[], None] = lambda: None,
    ):
        self.before_call, self.stopped = before_call, False
        self.client, self.address = client.connect(base_url, timeout=timeout, before_call=self._before)
        self.model, self.timeout = model, timeout
        self.without: frozenset[str] = frozenset()
        self.length = LENGTH[0]
        self.alive = False
        self.silent = 0
        self._question = threading.local()

    def ask_all(self, questions: Sequence[Mapping[str, Any]], *, threads: int) -> Iterator[tuple[int, Reply]]:
        """Ask questions, several at once; yield the place of each and its reply as they come.

        Args:
            questions: `messages` or `prompt`, `new_tokens`, and other parameters of a call.

        Raises:
            ModelError: the server refuses the key or does not know the model, or redirects to another host.
            StepFailed: there is no server, it has no room, or it answers none of the first questions.
        """
        self.stopped = False
        held: list[tuple[int, Reply]] = []
        try:
            for i, reply in self._replies(questions, threads):
                if self.alive and not reply.lost:
                    self.silent = 0
                    yield from held
                    held = []
                    yield i, reply
                    continue
                held.append((i, reply))
                self._check(reply, held)
            yield from held
        finally:
            self.stopped = True

    def _replies(self, questions: Sequence[Mapping[str, Any]], threads: int) -> Iterator[tuple[int, Reply]]:
        """Ask the first question alone: a wrong address or name is one error, and refusals are learned."""
        alone = 0 if self.alive else min(1, len(questions))
        if alone:
            yield 0, self.ask(questions[0])
        for i, reply in as_finished(self.ask, questions[alone:], threads):
            yield i + alone, reply

    def _check(self, reply: Reply, held: Sequence[tuple[int, Reply]]) -> None:
        """Stop if the server answers nothing at all."""
        self.silent += reply.lost
        if self.silent >= (SILENT if self.alive else DOWN):
            raise StepFailed(
                f"No call to {self.model} was successful ({reply.reason}). Finished work is kept. "
                f"Run this again when {shown(self.address)} answers."
            )
        refused = [one for _, one in held if one.refused]
        if not self.alive and len(refused) >= DOWN:
            raise StepFailed(
                f"{shown(self.address)} answered none of the first {len(refused)} questions to {self.model}: "
                f"{refused[0].reason}."
            )

    def ask(self, question: Mapping[str, Any]) -> Reply:
        """Ask one question."""
        import openai

        self._question.until = time.monotonic() + 2 * self.timeout + PATIENCE
        try:
            completion, without = self._complete(question)
        except HoldfastError:
            raise
        except openai.OpenAIError as error:
            return self._failed(error)
        except (ValueError, RecursionError) as error:
            return Reply(None, f"the reply cannot be read: {self.told(error)}", refused=True)
        reply = self._read(completion, without)
        self.alive = self.alive or not reply.refused
        return reply

    def _failed(self, error: Exception) -> Reply:
        """Return the reply for an error of one question. Raises an error that affects every question."""
        import openai

        from holdfast.evaluation.transport import GivenUp, TooLarge, http_library

        cause = error.__cause__
        if isinstance(cause, HoldfastError):  # older clients wrap what `before_call` raises
            raise cause from None
        error = cause if isinstance(cause, GivenUp | TooLarge) else error
        told = self.told(error)
        if isinstance(error, openai.AuthenticationError) or (
            isinstance(error, openai.PermissionDeniedError) and not self.alive
        ):
            key = "the key in OPENAI_API_KEY" if self._key else "a call without a key; set OPENAI_API_KEY"
            raise ModelError(f"{shown(self.address)} does not accept {key}: {told}") from None
        if isinstance(error, openai.NotFoundError):
            raise ModelError(
                f"{shown(self.address)} does not know the model '{self.model}', or the address is wrong: "
                f"{told}"
            ) from None
        if isinstance(error, openai.RateLimitError):
            raise StepFailed(
                f"The server has no room for {self.model} now: {told}. Finished work is kept. Run this again "
                "later."
            ) from None
        if isinstance(cause, http_library().ConnectError | http_library().UnsupportedProtocol):
            raise StepFailed(
                f"No server answers at {shown(self.address)} ({self.clean(first_line(cause))}). No call to "
                f"{self.model} was successful. Start the server, then run this again."
            ) from None
        if isinstance(error, openai.APIConnectionError | openai.InternalServerError | GivenUp):
            return Reply(None, f"{told} (after {client.RETRIES + 1} tries at most)", lost=True)
        if isinstance(error, TooLarge | openai.APIStatusError):
            return Reply(None, f"the server refused it: {told}", refused=True)
        return Reply(None, f"the reply cannot be read: {told}", refused=True)

    def _complete(self, question: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
        """Return the parsed reply to a question, and the parameters that the server did not accept."""
        import openai

        without, length = set(self.without), self.length
        while True:
            given = {key: value for key, value in question.items() if key != "new_tokens"}
            given[length] = question["new_tokens"]
            sent = {key: value for key, value in given.items() if key not in without}
            try:
                found = self._call(sent)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                name = _refused(error.response.text, set(sent) - {"messages", "prompt"})
                if name is None:
                    raise
                if name == LENGTH[0]:
                    length = LENGTH[1]
                else:
                    without.add(name)
                continue
            self.without, self.length = self.without | without, length
            return found, tuple(sorted(without & set(given)))

    def _call(self, sent: Mapping[str, Any]) -> Any:
        from holdfast.evaluation.transport import http_library

        path = "/completions" if "prompt" in sent else "/chat/completions"
        response = self.client.post(path, cast_to=http_library().Response, body={"model": self.model, **sent})
        return json.loads(response.content)

    def _read(self, completion: Any, without: tuple[str, ...]) -> Reply:
        """Return the text of a completion, or the reason why there is none."""
        choices = completion.get("choices") if isinstance(completion, dict) else None
        choice = choices[0] if isinstance(choices, list) and choices else None
        if not isinstance(choice, dict):
            return Reply(None, "the reply is not a chat completion, which is OpenAI's format", refused=True)
        message = choice.get("message")
        message = message if isinstance(message, dict) else choice
        usage, end = completion.get("usage"), choice.get("finish_reason")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        facts: dict[str, Any] = {
            "tokens": tokens if type(tokens) is int and 0 <= tokens < 2**31 else None,
            "truncated": end == "length",
            "without": without,
        }
        if refusal := message.get("refusal"):
            return Reply(None, f"the model refuses: {self.clean(str(refusal))}", **facts)
        if end == "content_filter":
            return Reply(None, "the server's content filter blocked the reply", **facts)
        text = _text(message)
        if text is None or not text.strip():
            cut = ": it was cut at the limit on new tokens, thinking included" if end == "length" else ""
            return Reply(None, f"the reply is empty{cut}", **facts)
        text = self.clean(text)
        said = spoken(text)
        if not said:
            return Reply(None, UNFINISHED if said is None else "the reply is empty", raw=text, **facts)
        return Reply(said, raw=None if said == text.strip() else text, **facts)

    def told(self, error: Exception) -> str:
        """Return an error as one line: the server's words if there are any, without secrets."""
        from holdfast.evaluation.transport import GivenUp, TooLarge

        words = str(error)
        response = getattr(error, "response", None)
        if response is not None:
            words = f"{response.status_code}, {_words(response.text) or words}"
        elif error.__cause__ is not None and "timeout" in type(error.__cause__).__name__.lower():
            words = f"no whole reply in {self.timeout:g} seconds"
        elif not isinstance(error, GivenUp | TooLarge):
            words = f"{type(error).__name__}: {words}"
        return first_line(Exception(self.clean(words)))

    def clean(self, text: str) -> str:
        """Remove the key and passwords from a text, because a server may repeat them, and half surrogates."""
        text = re.sub("[\ud800-\udfff]", "\ufffd", text)
        return redacted(text, (self._key, password_of(self.address)))

    @property
    def _key(self) -> str | None:
        key = str(self.client.api_key)
        return None if key.lower() in _PLACEHOLDERS else key

    def _before(self) -> None:
        from holdfast.evaluation.transport import GivenUp

        if self.stopped:
            raise StepFailed("The run has stopped.")
        if time.monotonic() > getattr(self._question, "until", float("inf")):
            raise GivenUp(f"no reply in {2 * self.timeout + PATIENCE:g} seconds")
        self.before_call()


def _refused(text: str, sent: set[str]) -> str | None:
    """Return the parameter that an error of the server is about, or None if it is about something else."""
    low = text.lower()
    named = re.findall(r'"param"\s*:\s*"(\w+)"', low)
    found = [name for name in sorted(sent) if name in named or re.search(rf"(?<!\w){name}(?!\w)", low)]
    found.sort(key=lambda name: name not in named)
    limits = [name for name in LENGTH if name in sent]
    if limits == [LENGTH[0]] and LENGTH[1] in low:
        return LENGTH[0]
    # A limit that is too large for the model is about its value, and a reply without limit may be endless.
    refuses = _REFUSES.search(low) is not None and "context length" not in low and "too large" not in low
    return next((name for name in found if name not in LENGTH or refuses), None)


def _text(message: Mapping[str, Any]) -> str | None:
    """Return the text of a message; some servers send it as a list of parts."""
    content = message.get("content", message.get("text"))
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str))
    return content if isinstance(content, str) else None


def _words(text: str) -> str:
    """Return the message in the body of an error, in the forms of the common servers."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = text
    for key in ("error", "message", "detail", "msg"):
        while isinstance(found, list) and found:
            found = found[0]
        if isinstance(found, dict) and key in found:
            found = found[key]
    return " ".join(found.split()) if isinstance(found, str) else ""
