"""A judge behind an OpenAI-compatible server: OpenAI, vLLM, SGLang, TGI, llama.cpp, `transformers serve`.

The key comes from OPENAI_API_KEY, the address from the recipe or OPENAI_BASE_URL; the `openai` client reads
both. The key is sent to that address and written nowhere. Temperature 0. A call that fails in transit is
tried again with back-off; a reply that cannot be read in the end is reported, never guessed.
"""

from __future__ import annotations

import importlib.util
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from holdfast.errors import ModelError, RecipeError, StepFailed

PROMPTS = Path(__file__).parent / "prompts"
TRIES = 5
"""Number of calls for one question before it counts as failed."""
PATIENCE = 120.0
"""Maximum wait in seconds that a server may ask for (Retry-After)."""
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
        model: the server's name for the model.
        base_url: the server's address, ending in /v1; by default OPENAI_BASE_URL or OpenAI itself.
        requests_per_minute: maximum rate of calls; None for no limit.
        max_calls: maximum number of calls of this process, including retries; None for no limit.
        timeout: seconds after which a call counts as lost.
        sleep: function that waits, in seconds; for tests.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        requests_per_minute: float | None = None,
        max_calls: int | None = None,
        timeout: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        check(model=model, base_url=base_url)
        import openai

        # A local server needs no key, but the client does.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.client = openai.OpenAI(api_key=key, base_url=base_url, max_retries=0, timeout=timeout)
        self.model, self.max_calls, self.sleep = model, max_calls, sleep
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

        reason = ""
        for attempt in range(TRIES):
            self._take_turn()
            wait: float | None = None
            try:
                return self._read(self._call(messages, max_tokens))
            except (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError) as error:
                raise StepFailed(f"The server refuses {self.model}: {self._told(error)}") from None
            except (openai.APITimeoutError, openai.APIConnectionError) as error:
                reason = self._told(error)
            except openai.APIStatusError as error:
                reason = self._told(error)
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    return Reply(None, reason)  # an error of this question, for example too long
                wait = _retry_after(error.response.headers)
                if "insufficient_quota" in reason or (wait or 0) > PATIENCE:
                    raise StepFailed(
                        f"The server has no capacity for {self.model} now: {reason}. Run again later."
                    ) from None
            except (ValueError, openai.OpenAIError) as error:  # includes damaged JSON
                reason = f"the reply cannot be read: {self._told(error)}"
            if attempt + 1 < TRIES:
                self.sleep(min(0.5 * 2**attempt, 8.0) if wait is None else wait)
        return Reply(None, f"{reason} ({TRIES} tries)", lost=True)

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

    def _take_turn(self) -> None:
        """Take one call from the budget and wait for its turn."""
        with self.lock:
            if self.max_calls is not None and self.calls >= self.max_calls:
                raise self._spent()  # retries used the budget; an unasked question gets no verdict
            self.calls += 1
            now = time.monotonic()
            turn = max(now, self.next_call)
            self.next_call = turn + self.pause
        if turn > now:
            self.sleep(turn - now)

    def _spent(self) -> StepFailed:
        return StepFailed(
            f"The budget of {self.max_calls} calls to {self.model} is not enough ({self.calls} are used). "
            "The verdicts so far are kept; raise max_calls and run again to continue."
        )

    def _told(self, error: Exception) -> str:
        return self._clean(
            f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] or 'no message'}"
        )

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
    if importlib.util.find_spec("openai") is None:
        raise ModelError(
            "A judge on a server needs the openai client. Install it: pip install 'holdfast[openai]'."
        )
    if not os.environ.get("OPENAI_API_KEY") and not (base_url or os.environ.get("OPENAI_BASE_URL")):
        raise ModelError(
            "OPENAI_API_KEY is not set. Set it in the environment, or name a server of your own: base_url."
        )


def fill(template: str, **texts: str) -> str:
    """Replace {name} by texts in one pass, so that a {name} inside a text is not replaced."""
    return re.sub(r"\{(\w+)\}", lambda found: texts.get(found[1], found[0]), template)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    try:
        return max(0.0, float(headers.get("retry-after", "")))
    except ValueError:
        return None
