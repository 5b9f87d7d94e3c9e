"""A judge behind an OpenAI-compatible server: OpenAI, vLLM, SGLang, TGI, llama.cpp, `transformers serve`.

The key comes from OPENAI_API_KEY, the address from the recipe or OPENAI_BASE_URL, both read by the `openai`
client; the key is sent to that address and written nowhere. Temperature 0. `evaluation.client` says which
calls are repeated; a reply that cannot be read is reported, never guessed.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from holdfast.errors import ModelError, RecipeError, StepFailed, first_line
from holdfast.evaluation import client

PROMPTS = Path(__file__).parent / "prompts"
WORKERS = 8
"""Number of concurrent questions."""
DOWN = 3
"""If this many questions at once get no reply, the server is considered down and the run stops."""


@dataclass(frozen=True)
class Reply:
    """A reply: `text`, or None and the reason. `lost` is true if no call was successful."""

    text: str | None
    reason: str = ""
    lost: bool = False


class Server:
    """One model on one server.

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
        # A local server needs no key, but the client does.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = client.connect(base_url, timeout=timeout, key=key, before_call=self._take_turn)
        self.model, self.max_calls = model, max_calls
        self.pause = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self.calls, self.next_call, self.lock = 0, 0.0, Lock()
        self.length_key = "max_tokens"

    def ask_all(self, questions: Sequence[Sequence[Mapping[str, str]]], max_tokens: int) -> list[Reply]:
        """Return a reply to each list of messages, with several requests at once.

        Raises:
            StepFailed: the server refuses the key or the model, or does not answer, or the budget of calls is
                too small; earlier verdicts are kept.
        """
        if self.max_calls is not None and self.max_calls - self.calls < len(questions):
            raise self._spent()
        with ThreadPoolExecutor(WORKERS) as pool:
            replies = list(pool.map(lambda messages: self._ask(messages, max_tokens), questions))
        if len(replies) >= DOWN and all(reply.lost for reply in replies):
            raise StepFailed(
                f"No call to {self.model} was successful ({replies[0].reason}). Earlier verdicts are kept. "
                "Run again when the server answers."
            )
        return replies

    def _ask(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Reply:
        import openai

        try:
            return self._read(self._call(messages, max_tokens))
        except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise StepFailed(f"The server refuses {self.model}: {self._told(error)}") from None
        except openai.RateLimitError as error:
            raise StepFailed(
                f"The server has no room for {self.model} now: {self._told(error)}. Run again later."
            ) from None
        except (openai.APIConnectionError, openai.InternalServerError) as error:
            if isinstance(error.__cause__, StepFailed):  # older clients wrap what `_take_turn` raises
                raise error.__cause__ from None
            return Reply(None, f"{self._told(error)} ({client.RETRIES + 1} tries)", lost=True)
        except openai.APIStatusError as error:
            return Reply(None, self._told(error))  # about this question, for instance too long
        except (ValueError, openai.OpenAIError) as error:  # torn JSON among them
            return Reply(None, f"the reply cannot be read: {self._told(error)}")

    def _call(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> Any:
        """Make one call; models that only accept `max_completion_tokens` are asked again with it."""
        import openai

        create: Any = self.client.chat.completions.create
        options = {"model": self.model, "messages": list(messages), "temperature": 0}
        try:
            return create(**options, **{self.length_key: max_tokens})
        except openai.BadRequestError as error:
            if "max_completion_tokens" not in str(error) or self.length_key != "max_tokens":
                raise
            self.length_key = "max_completion_tokens"
            return create(**options, **{self.length_key: max_tokens})

    def _read(self, completion: Any) -> Reply:
        """Return the text of a completion, or the reason why there is none."""
        choices: Any = getattr(completion, "choices", None)
        message = getattr(choices[0], "message", None) if isinstance(choices, list) and choices else None
        if message is None:
            return Reply(None, "the reply is not a chat completion")
        if getattr(message, "refusal", None):
            return Reply(None, f"the judge refuses: {self._clean(str(message.refusal))}")
        if getattr(choices[0], "finish_reason", None) == "content_filter":
            return Reply(None, "the server's content filter blocked the verdict")
        text = getattr(message, "content", None)
        if not isinstance(text, str) or not text.strip():
            return Reply(None, "the reply is empty")
        return Reply(self._clean(text))

    def _take_turn(self, _: Any = None) -> None:
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

    def _told(self, error: Exception) -> str:
        return self._clean(f"{type(error).__name__}: {first_line(error)}")

    def _clean(self, text: str) -> str:
        """Remove the key from a text, because a server may repeat it."""
        key = self.client.api_key
        return text.replace(key, "[key]") if len(key) > 4 else text


def check(model: str | None = None, base_url: str | None = None, **_: Any) -> None:
    """Raise an error that would stop a judge on a server, without calling it.

    Raises:
        RecipeError: no model is named, or the address is not valid.
        ModelError: the client or the key is missing.
    """
    if not model:
        raise RecipeError("A judge on a server needs the name of its model: {name: openai, model: NAME}.")
    if base_url is not None and not re.match(r"https?://[^/\s]+", base_url):
        raise RecipeError(f"base_url: expected an address like http://localhost:8000/v1, found {base_url!r}.")
    client.check_installed()
    if not os.environ.get("OPENAI_API_KEY") and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ModelError(
            "OPENAI_API_KEY is not set. Set it in the environment, or name a server of your own: base_url."
        )


def fill(template: str, **texts: str) -> str:
    """Replace {name} by texts in one pass, so that a {name} inside a text is not replaced."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)
