"""Break up control strings in the text of a judged model, so that it cannot speak for the judge.

A control string is found by its shape: chat formats are added every month, and no list of them is complete.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_HTML = (
    "a|abbr|address|article|aside|audio|b|blockquote|body|br|button|canvas|caption|center|cite|code|col|"
    "colgroup|dd|del|details|dfn|div|dl|dt|em|embed|fieldset|figcaption|figure|font|footer|form|h[1-6]|head|"
    "header|hr|html|i|iframe|img|input|ins|kbd|label|legend|li|link|main|map|mark|meta|nav|noscript|object|"
    "ol|optgroup|option|p|param|picture|pre|progress|q|ruby|samp|script|section|select|small|source|span|"
    "strong|style|sub|summary|sup|svg|table|tbody|td|template|textarea|tfoot|th|thead|time|title|tr|tt|u|ul|"
    "var|video|wbr"
)
SHAPES = (
    r"[<＜][|｜][^\s<>＜＞][^<>＜＞\n]{0,60}",  # <|im_start|>, <｜User｜>, <|turn>
    r"[<＜][^\s<>＜＞|｜][^<>＜＞\n]{0,60}[|｜][>＞]",  # <turn|>
    rf"<(?!/?(?i:{_HTML})>)/?[A-Za-z_][\w.:-]{{0,60}}>",  # <s>, <think>, <start_of_turn>, </tool_call>
    r"<</?\w{1,40}>>",  # <<SYS>>
    r"\[/\w[\w ]{0,40}\]|\[\w{0,20}[A-Z][A-Z_]\w{0,40}\]",  # [/INST], [SYSTEM_PROMPT], [gMASK]
    r"\[\[[^\[\]\n]{1,60}\]\]",  # [[10]], the verdict of MT-Bench
    r"[◁◀]/?\w{1,40}[▷▶]",  # ◁think▷
    r"\][~!]{1,2}\w?[\[\]~]|\[\w~\[",  # ]~b], [e~[
    r">>\w{1,40}<<",  # >>QUESTION<<
    r"(?<!#)#{2,}+[ \t]{0,8}[A-Za-z][\w' ]{0,40}:",  # ### Response:
    # USER:, GPT4 Correct User: and user: at the start of a line
    r"(?<![^\n])(?:(?:[\w-]+ ){0,2}(?:User|USER|Assistant|ASSISTANT|Human|HUMAN|System|SYSTEM)|"
    r"user|assistant|human|system)[ \t]{0,4}:",
)
"""Shapes of control strings and role markers: one pattern for a family of chat formats. Case matters."""

MARKERS = (
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "<s>", "</s>", "<unk>",
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<|eom_id|>", "<|header_start|>", "<|header_end|>", "<|eot|>",
    "<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>",
    "### Instruction:", "### Input:", "### Response:", "### Answer:", "### User:", "### Assistant",
)  # fmt: skip
"""Control strings of Llama 2 to 4, Mistral, ChatML, Gemma and Alpaca, in any case ("[/inst]")."""


def neutralise(text: str, markers: Sequence[str]) -> str:
    """Break up control strings in the text of a judged model, so that it cannot imitate other speakers."""
    for marker in markers:
        if marker and marker in text:
            text = text.replace(marker, f"{marker[0]} {marker[1:]}")
    return text


def neutralise_all(text: str, markers: Sequence[str] = ()) -> str:
    """Like `neutralise`, for judges that are chat models: with `SHAPES` and `MARKERS`, and ignoring case.

    A space is added after the first character: "[/INST]" becomes "[ /INST]". Plain words in the text ("this
    is what you should never do") and HTML are not changed.
    """
    pattern = _pattern(tuple(markers))
    while pattern.search(text):
        text = pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


@lru_cache(maxsize=64)
def _pattern(markers: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern for all shapes and markers; a space does not break up a single character."""
    known = {marker.strip() for marker in (*MARKERS, *markers)}
    named = "|".join(map(re.escape, sorted((m for m in known if len(m) > 1), key=len, reverse=True)))
    return re.compile(f"{named}|(?-i:{'|'.join(SHAPES)})", re.IGNORECASE)
