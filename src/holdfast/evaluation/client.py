"""The client of OpenAI-compatible servers, for answers and judges; retries are those of the `openai` client.

The client repeats a call after a timeout, a broken connection, a busy server (408, 409, 429) or a server
error (5xx). It waits as long as the server asks (Retry-After, up to two minutes), otherwise half a second,
doubled each time up to eight seconds. It repeats no other call: a reply that cannot be read is a failed row
or an unparsed verdict.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from holdfast.errors import ModelError

RETRIES = 6
"""Maximum number of repetitions of one call."""

NO_KEY = "none"
"""Sent as the key if none is given: the client requires one, and a server of one's own does not."""


def check_installed() -> None:
    """Raise ModelError if the `openai` package is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise ModelError("A server needs the openai client. Install it: pip install 'holdfast[openai]'.")


def is_address(text: str) -> bool:
    """Whether a text is the address of a server, as http://localhost:8000/v1 is."""
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname, parts.port  # which refuses a port above 65535
    except ValueError:
        return False
    return bool(host) and re.fullmatch(r"https?://[^/\s]+(/\S*)?", text) is not None


def default_address() -> str | None:
    """Return the address in OPENAI_BASE_URL, or None."""
    return os.environ.get("OPENAI_BASE_URL") or None


def connect(
    base_url: str | None, *, timeout: float, before_call: Callable[[], None] = lambda: None
) -> tuple[Any, str]:
    """Return a client for one server, and the server's address.

    The key is OPENAI_API_KEY.

    Args:
        base_url: the address, ending in /v1; OPENAI_BASE_URL or OpenAI itself by default.
        timeout: the time limit of one whole call in seconds.
        before_call: called before every call, including repetitions; an exception from it ends the question.

    Raises:
        ModelError: the client is not installed, or the address is not valid.
    """
    check_installed()
    import openai

    from holdfast.evaluation.transport import GuardedClient, http_library

    address = base_url or default_address() or "https://api.openai.com/v1"
    key = (os.environ.get("OPENAI_API_KEY") or "").strip() or NO_KEY
    if not (key.isascii() and key.isprintable()):
        raise ModelError("OPENAI_API_KEY has characters that no key has. Set it again.")
    try:
        http_library().URL(address)
        return openai.OpenAI(
            api_key=key,
            base_url=address,
            max_retries=RETRIES,
            timeout=timeout,
            http_client=GuardedClient(address, timeout, before_call),
        ), address
    except (http_library().InvalidURL, ValueError, UnicodeError):
        raise ModelError(
            "The address of the server is not valid. Expected one like http://localhost:8000/v1."
        ) from None
