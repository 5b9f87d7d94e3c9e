"""Keys and passwords: no message, file or stamp of ours contains one, or a part of one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import unquote, urlsplit

FRAGMENT = 8
"""Length from which a part of a secret is also removed."""


def shown(address: str) -> str:
    """Return an address as it may be written: without user name, password, query and fragment."""
    return re.sub(r"//[^/?#\s]*@", "//", address).partition("?")[0].partition("#")[0]


def password_of(address: str) -> str | None:
    """Return the password in an address, or None."""
    try:
        found = urlsplit(address).password
    except ValueError:
        return None
    return unquote(found) if found else None


def redacted(text: str, secrets: Iterable[str | None]) -> str:
    """Return a text without the secrets, without parts of them, and without passwords of addresses.

    Call this before a text is cut: a secret across the cut is no longer complete.
    """
    text = re.sub(r"(?<=://)[^/?#\s@]*@", "", text)
    for secret in secrets:
        if secret and len(secret) > 4:
            text = _redact(text, secret)
    return text


def _redact(text: str, secret: str) -> str:
    length = min(FRAGMENT, len(secret))
    parts = {secret[i : i + length] for i in range(len(secret) - length + 1)}
    spans: list[list[int]] = []
    for i in range(len(text) - length + 1):
        if text[i : i + length] in parts:
            if spans and i <= spans[-1][1]:
                spans[-1][1] = i + length
            else:
                spans.append([i, i + length])
    for start, end in reversed(spans):
        text = f"{text[:start]}[key]{text[end:]}"
    return text
