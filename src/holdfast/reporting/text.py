"""Format values as text for the page: cleaned, shortened, with units."""

from __future__ import annotations

import unicodedata
from typing import Any

NOT_MEASURED = "not measured"
NOT_GIVEN = "not given"

JOINERS = "\u200c\u200d"
"""Format characters that real scripts and emoji need; all other format characters are made visible."""


def clean(text: str) -> str:
    """Replace every control, direction-changing or invalid character in `text` by a visible sign.

    A NUL becomes U+2400, a right-to-left override becomes ⟨U+202E⟩: they have no effect on the page, and
    a reader sees that they were there. Newlines and tabs are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(char) for char in text.replace("\r\n", "\n"))


def _visible(char: str) -> str:
    if char in "\n\t" or char in JOINERS:
        return char
    code = ord(char)
    if code < 0x20:
        return chr(0x2400 + code)
    if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return f"⟨U+{code:04X}⟩"
    return char


def shorten(text: str, characters: int = 600, lines: int = 12) -> str:
    """The beginning of `text`, followed by the number of characters left out."""
    kept = "\n".join(text[:characters].split("\n")[:lines])
    left_out = len(text) - len(kept)
    if left_out <= 0:
        return text
    return f"{kept.rstrip()} … ({left_out:,} more characters)"


def one_line(text: str, characters: int) -> str:
    """`text` as a short name: cleaned, on one line, at most `characters` long."""
    flat = " ".join(clean(text).split())
    return flat if len(flat) <= characters else f"{flat[: characters - 1].rstrip()}…"


def method_name(name: str) -> str:
    """The display name of a defense whose results give no label: "lisa" becomes Lisa, "bso" becomes BSO."""
    return name.upper() if len(name) <= 3 else name[:1].upper() + name[1:].replace("_", " ")


def small(title: str) -> str:
    """A heading inside a sentence: "Finetune accuracy" becomes "finetune accuracy"; "ROUGE-1 F1" stays."""
    return title if title[1:2].isupper() else title[:1].lower() + title[1:]


def score_text(value: float) -> str:
    """Format a percentage or a number of points with one decimal; never "-0.0"."""
    return f"{round(value, 1) + 0.0:.1f}"


def signed(value: float) -> str:
    """Format a difference in points with its sign."""
    text = score_text(value)
    return text if text.startswith("-") or text == "0.0" else f"+{text}"


def p_text(p: float) -> str:
    """A p-value with its relation sign: "= 0.012" or "< 0.0001"."""
    return "< 0.0001" if p < 0.0001 else f"= {p:.2g}"


def share_text(ratio: float) -> str:
    """Format a ratio from 0 to 1 as a percentage without trailing zeros: 0.1 is "10 %", 0.005 is "0.5 %"."""
    return f"{ratio * 100:.4g} %"


def bytes_text(size: float) -> str:
    """Format a number of bytes in binary units."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.2f} {unit}" if unit == "GiB" else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} B"


def duration_text(seconds: float) -> str:
    """Format a duration as seconds, minutes or hours, with a readable precision."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 120:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def plain(value: Any) -> str:
    """Format any JSON value as text: yes and no, lists with commas, null as "not given"."""
    if value is None:
        return NOT_GIVEN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items()) or "none"
    return str(value)
