"""The client of OpenAI-compatible servers, for answers and judges; retries are those of the `openai` client.

The client repeats a call after a timeout, a broken connection, a busy server (408, 409, 429) or a server
error (5xx). It waits as long as the server asks (Retry-After, up to two minutes), otherwise half a second,
doubled each time up to eight seconds. It repeats no other call: a reply that cannot be read is a failed row
or an unparsed verdict.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from holdfast.errors import ModelError

RETRIES = 6
"""Maximum number of repetitions of one call."""


def check_installed() -> None:
    """Raise ModelError if the `openai` package is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise ModelError("A server needs the openai client. Install it: pip install 'holdfast[openai]'.")


def connect(
    base_url: str | None,
    *,
    timeout: float,
    key: str | None = None,
    before_call: Callable[[Any], None] | None = None,
) -> Any:
    """Return a client for one server.

    Args:
        base_url: the address, ending in /v1; OPENAI_BASE_URL or OpenAI itself by default.
        timeout: the time limit of one call in seconds.
        key: the key of the server; OPENAI_API_KEY by default.
        before_call: called before every call, including repetitions; an exception from it ends the question.

    Raises:
        ModelError: the client is not installed, or there is no key.
    """
    check_installed()
    import openai

    hooks = {"request": [] if before_call is None else [before_call]}
    try:
        return openai.OpenAI(
            api_key=key,
            base_url=base_url,
            max_retries=RETRIES,
            timeout=timeout,
            http_client=openai.DefaultHttpxClient(event_hooks=hooks),
        )
    except openai.OpenAIError:
        raise ModelError(
            f"No key for {base_url}: set OPENAI_API_KEY (any text, if the server asks for none)."
        ) from None
