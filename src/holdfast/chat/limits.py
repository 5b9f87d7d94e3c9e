"""Apply a chat template, which is a program in a model's folder, with limits on its time and its text.

Templates run in the sandbox of Jinja. In the main thread of a process, a timer ends a rendering that needs
more than `SECONDS` of processor time; elsewhere, and on systems without such a timer, the time has no limit.
Expressions that one operation could make endless or huge are refused before: powers, and multiplication,
padding or repetition by large numbers. Memory has no other limit.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from holdfast.errors import ModelError, first_line

SECONDS = 5.0
"""Maximum processor time of one rendering; real templates need about a millisecond."""

LARGEST = 16 * 2**20
"""Maximum number of characters that one rendering adds to the texts in it."""

NUMBER = 10_000
"""The largest number that a template may multiply with, pad to or count to."""


def apply_template(tokenizer: Any, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Return the messages as the tokenizer's chat template renders them.

    Raises:
        TemplateError: the template refuses the messages, or fails in any other way.
        ModelError: the template needs too much time, writes too much, or holds an expression that could.
    """
    from jinja2 import TemplateError

    template = getattr(tokenizer, "chat_template", None)
    for one in template.values() if isinstance(template, dict) else [template]:
        if isinstance(one, str):
            _check(one)
    try:
        with _limit():
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except (TemplateError, ModelError):
        raise
    except Exception as error:  # a template can raise anything that an expression of Python raises
        raise TemplateError(f"{type(error).__name__}: {first_line(error)}") from error
    if len(text) > LARGEST + sum(len(str(message.get("content"))) for message in messages):
        raise ModelError(
            f"The model's chat template wrote {len(text):,} characters around a row, more than {LARGEST:,}. "
            "Use another chat template, or the template 'alpaca'."
        )
    return text


@contextmanager
def _limit() -> Iterator[None]:
    """End the block after `SECONDS` of processor time, in the main thread."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def over(*_: Any) -> None:
        raise ModelError(
            f"The model's chat template needs more than {SECONDS:g} seconds for one row. Use another chat "
            "template, or the template 'alpaca'."
        )

    earlier = signal.signal(signal.SIGVTALRM, over)
    left = signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, *left)
        signal.signal(signal.SIGVTALRM, earlier)


@lru_cache(maxsize=64)
def _check(template: str) -> None:
    """Refuse expressions that a timer cannot end, because they are one operation of the interpreter."""
    from jinja2 import TemplateSyntaxError, nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        # transformers adds loop controls and the block `generation`.
        known = ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"])
        tree = known.parse(re.sub(r"\{%-?\s*(end)?generation\s*-?%\}", "", template))
    except (TemplateSyntaxError, RecursionError):
        return  # the rendering says what is wrong
    wrong: nodes.Node | None = next(iter(tree.find_all(nodes.Pow)), None)
    for node in tree.find_all((nodes.Mul, nodes.Call, nodes.Filter)):
        numbers = [one.value for one in node.find_all(nodes.Const) if isinstance(one.value, int | float)]
        if any(abs(number) > NUMBER for number in numbers):
            wrong = wrong or node
    for text in tree.find_all(nodes.Const):
        if isinstance(text.value, str) and re.search(r"[%:]\D{0,3}\d{6,}", text.value):  # a width of a format
            wrong = wrong or text
    for node in tree.find_all(nodes.Mul):
        # A text times a number that the template computes could grow without limit in a loop.
        if not any(isinstance(side, nodes.Const) for side in (node.left, node.right)):
            wrong = wrong or node
    if wrong is not None:
        raise ModelError(
            f"The model's chat template has an expression in line {wrong.lineno} that could need endless "
            "time or memory (a power, or a product or a call with a large number). Use another chat "
            "template, or the template 'alpaca'."
        )
