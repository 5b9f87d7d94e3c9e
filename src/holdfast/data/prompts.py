"""Rows as text: the Alpaca prompt for base models, the tokenizer's own template for chat models.

Both texts contain every special token: tokenise them with `add_special_tokens=False`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast.chat.limits import apply_template
from holdfast.chat.rendering import Rendered, apply, check_nothing_lost, conversation
from holdfast.errors import DataError, ModelError, RecipeError, nearest

# Stanford Alpaca's prompts, word for word; the answer follows "### Response:" without a line break. In
# T-Vaccine's and Booster's code a line break follows it: the template "alpaca_newline".
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
ALPACA_NO_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
TEMPLATES = ("alpaca", "alpaca_newline", "chat")


def resolve_template(tokenizer: Any, asked: str = "auto") -> str:
    """Return a name of `TEMPLATES`; "auto" means "chat" if the tokenizer has a chat template, else "alpaca".

    Raises:
        RecipeError: `asked` is neither "auto" nor one of `TEMPLATES`.
        ModelError: the result is "chat" but the tokenizer has no chat template, or it is one of the Alpaca
            prompts but the tokenizer has no end-of-sequence token.
    """
    if asked not in ("auto", *TEMPLATES):
        raise RecipeError(f"Unknown template '{asked}'.{nearest(asked, ('auto', *TEMPLATES))}")
    has_chat = bool(getattr(tokenizer, "chat_template", None))
    if asked == "chat" and not has_chat:
        raise ModelError(
            "The template 'chat' was requested, but the model's tokenizer has no chat template. "
            "Use 'alpaca' (or 'auto'), or add a chat template to the tokenizer."
        )
    chosen = ("chat" if has_chat else "alpaca") if asked == "auto" else asked
    if chosen != "chat" and not tokenizer.eos_token:
        raise ModelError(
            "The model's tokenizer has no end-of-sequence token, so no answer could end. "
            "Set eos_token in its tokenizer_config.json."
        )
    return chosen


def render(row: Mapping[str, Any], tokenizer: Any, template: str, prefix: str = "") -> tuple[str, str]:
    """Return the text of the prompt and that of the completion (the last answer with its end tokens).

    Works on training rows (`output`) and on test rows (`target`; without a target, the completion is that
    of an empty answer). Tokenise both with `add_special_tokens=False`.

    Args:
        prefix: text before the question, followed by a blank line. With Alpaca it precedes the whole prompt.
            With a chat template it becomes the system message, or precedes the text of the row's own system
            message; if the template does not support system messages, it precedes the first user turn.

    Raises:
        DataError: the row is a conversation of several turns and the template is Alpaca, or the chat
            template refuses the row or leaves out a part of it.
        ModelError: the chat template's text with an answer does not begin with its prompt.
    """
    if template == "chat":
        text, spans = _rendered(row, tokenizer, prefix, "last")
        border = spans[-1][0] if spans else len(text)
        return text[:border], text[border:]
    answer = row["output"] if "output" in row else row.get("target") or ""
    return _begun(alpaca(row, prefix, template), tokenizer), answer + tokenizer.eos_token


def training_row(row: Mapping[str, Any], tokenizer: Any, template: str, prefix: str = "") -> dict[str, Any]:
    """Return a row for a trainer: `prompt` and `completion`, or `text` and `spans` for several answers.

    Every answer of a conversation is trained, except those with `weight: 0`. Arguments and errors are those
    of `render`; `spans` are those of `holdfast.chat.rendering.conversation`.
    """
    if template == "chat":
        text, spans = _rendered(row, tokenizer, prefix, "all")
        if len(spans) != 1 or spans[0][1] != len(text):
            return {"text": text, "spans": [list(span) for span in spans]}
        return {"prompt": text[: spans[0][0]], "completion": text[spans[0][0] :]}
    prompt, completion = render(row, tokenizer, template, prefix)
    return {"prompt": prompt, "completion": completion}


def render_prompt(row: Mapping[str, Any], tokenizer: Any, template: str, prefix: str = "") -> str:
    """Return the text of the prompt alone; arguments and errors are those of `render`.

    A template that renders a question differently if an answer follows is not refused.
    """
    if template == "chat":
        where = f"Row {row.get('id', '')}: "
        turns = _messages(row, "", tokenizer, prefix)[:-1]
        text = apply(turns, tokenizer, where, row.get("tools"), add_generation_prompt=True)
        # The model's own earlier answers may hold anything.
        check_nothing_lost([turn for turn in turns if turn["role"] != "assistant"], text, where)
        return text
    return _begun(alpaca(row, prefix, template), tokenizer)


def alpaca(row: Mapping[str, Any], prefix: str = "", template: str = "alpaca") -> str:
    """The question in the Alpaca prompt, without special tokens. Raises DataError like `render`."""
    if row.get("messages"):
        raise DataError(
            f"Row {row.get('id', '')} is a conversation of several turns, or with a system message, tools or "
            "thinking, which the Alpaca template does not support. Use a model with a chat template, or rows "
            "of one question and one answer."
        )
    text = (ALPACA_INPUT if row["input"] else ALPACA_NO_INPUT).format_map(row)
    return _after(prefix, text + ("\n" if template == "alpaca_newline" else ""))


def _begun(text: str, tokenizer: Any) -> str:
    """`text` with the beginning-of-sequence token, if the tokenizer adds one by default."""
    bos = tokenizer.bos_token
    whole = tokenizer(text)["input_ids"]
    if not bos or not whole or whole[0] != tokenizer.bos_token_id:
        return text
    # Some Llama tokenizers add a space before the first word of a text, but not after a special token.
    for begun in (bos + text, f"{bos} {text}"):
        ids = tokenizer(begun, add_special_tokens=False)["input_ids"]
        if ids == whole[: len(ids)]:
            return begun
    return bos + text


def _after(prefix: str, text: str) -> str:
    return f"{prefix}\n\n{text}" if prefix else text


def _messages(row: Mapping[str, Any], answer: str, tokenizer: Any, prefix: str) -> list[dict[str, Any]]:
    messages = [dict(turn) for turn in row.get("messages") or []]
    if not messages:
        question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    if prefix and messages[0]["role"] != "system" and _takes_system(tokenizer):
        messages.insert(0, {"role": "system", "content": prefix})
    elif prefix:
        first = next(turn for turn in messages if turn["role"] in ("system", "user"))
        first["content"] = _after(prefix, first["content"])
    return messages


def _rendered(row: Mapping[str, Any], tokenizer: Any, prefix: str, loss_on: str) -> Rendered:
    answer = row["output"] if "output" in row else row.get("target") or ""
    messages = _messages(row, answer, tokenizer, prefix)
    return conversation(
        messages, tokenizer, where=f"Row {row.get('id', '')}: ", tools=row.get("tools"), loss_on=loss_on
    )


def _takes_system(tokenizer: Any) -> bool:
    """Whether the chat template renders system messages: some templates raise an error, some drop them."""
    from jinja2 import TemplateError

    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    try:
        return "Be brief." in apply_template(tokenizer, turns)
    except TemplateError:
        return False
