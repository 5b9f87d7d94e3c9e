"""A fixed date for chat templates that write today's date, so that a prompt is the same on every day."""

from __future__ import annotations

import json
import re
from datetime import datetime
from functools import cache
from typing import Any

FIXED = "2024-07-26"
"""The date if none is given: the one that Llama 3's templates write without a clock."""

CODES = "aAbBcdDeFgGhHIjmMpRSTuUVwWxXyYzZ"
"""The codes of `strftime`."""


def fix_date(tokenizer: Any, date: str | None) -> None:
    """Make the chat template of `tokenizer` write `date` (as in "2026-03-01") instead of today's date."""
    if "strftime_now" in str(getattr(tokenizer, "chat_template", None)):
        tokenizer.apply_chat_template = _Dated(tokenizer, date or FIXED)


class _Dated:
    """`apply_chat_template` of a tokenizer, with a fixed date."""

    def __init__(self, tokenizer: Any, date: str):
        self.tokenizer, self.plain, self.date = tokenizer, tokenizer.apply_chat_template, date

    def __call__(
        self, conversation: Any, tools: Any = None, *, chat_template: str | None = None, **options: Any
    ) -> Any:
        template = self.tokenizer.get_chat_template(chat_template, tools)
        return self.plain(conversation, tools=tools, chat_template=with_date(template, self.date), **options)


@cache
def with_date(template: str, date: str) -> str:
    """Return a template in which `strftime_now` is a macro that knows one date; nothing else changes.

    transformers passes only plain values to a template, and no function.
    """
    day = datetime.fromisoformat(date)
    values = [[f"%{code}", day.strftime(f"%{code}")] for code in CODES] + [["%%", "%"]]
    macro = (
        "{%- macro strftime_now(form) -%}{%- set written = namespace(text=form) -%}"
        f"{{%- for code, value in {json.dumps(values)} -%}}"
        "{%- set written.text = written.text | replace(code, value) -%}{%- endfor -%}"
        "{{- written.text -}}{%- endmacro +%}"
    )
    # The environment removes spaces before a block at the start of a line, where the template no longer is.
    return macro + re.sub(r"^[ \t]+(?=\{[%#])", "", template)
