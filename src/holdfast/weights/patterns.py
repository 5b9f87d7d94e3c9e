"""Limit the time of the regular expressions in an adapter's configuration.

PEFT and Holdfast match them against the names of modules, and a pattern such as `(a+)+b` can take exponential
time. Patterns that are more than a name are therefore first tried in a child process, which is ended after a
few seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from holdfast.errors import ModelError

SECONDS = 10.0
"""How long all patterns of an adapter may take on all names."""

TRY = """
import json, re, sys
sys.setrecursionlimit(2000)
wholes, names = json.load(sys.stdin)
for key, pattern in wholes:
    try:
        found = re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        sys.exit(key)
    for name in names:
        found.match(name)
"""


def check_patterns(
    where: object, settings: Mapping[str, Any], names: Collection[str], seconds: float | None = None
) -> None:
    """Check that the patterns of LoRA settings are valid and match names in a limited time.

    Args:
        where: the file or block of the settings, for the message.
        settings: the keys of a PEFT `LoraConfig`; keys without patterns are ignored.
        names: the names to match.
        seconds: the limit; `SECONDS` by default.

    Raises:
        ModelError: a pattern is not valid, or the patterns take longer.
    """
    patterns = list(_patterns(settings))
    if not patterns:
        return
    limit = SECONDS if seconds is None else seconds
    given = json.dumps([patterns, list(names)])
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY],
            input=given, capture_output=True, text=True, encoding="utf-8", timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise ModelError(
            f"{where}: its patterns ({_shown(patterns)}) take longer than {limit:g} seconds on the names "
            "of the modules. Replace them by a list of module names."
        ) from None
    if done.returncode:
        key = done.stderr.strip().split("\n")[-1][:200]
        raise ModelError(f"{where}: {key}, which is not a valid pattern. Give a list of module names.")


def matches_end(pattern: str, name: str) -> bool:
    """Whether a key of `rank_pattern` or `alpha_pattern` matches the end of a module's name, as in PEFT."""
    return re.match(_end(pattern), name) is not None


def _end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def _patterns(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a description and the whole regular expression of each pattern that is more than a name."""
    found = []
    for key in ("rank_pattern", "alpha_pattern"):
        found += [(key, pattern, _end(pattern)) for pattern in settings.get(key) or {}]
    for key in ("target_modules", "exclude_modules"):
        if isinstance(settings.get(key), str):
            found.append((key, settings[key], settings[key]))
    layers = settings.get("layers_pattern") or []
    found += [("layers_pattern", p, rf".*\.{p}\.(\d+)\.") for p in _texts(layers)]
    for key, pattern, whole in found:
        if not re.fullmatch(r"[\w.-]*", pattern):  # a dot matches any character, but takes no time
            yield f"{key} has {pattern[:80]!r}", whole


def _texts(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [part for part in value if isinstance(part, str)]


def _shown(patterns: list[tuple[str, str]]) -> str:
    more = ", ..." if len(patterns) > 3 else ""
    return ", ".join(key for key, _ in patterns[:3]) + more
