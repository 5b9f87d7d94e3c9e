"""Conversations in a chat template: the text, and the parts of it that are trained."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.chat.limits import apply_template
from holdfast.chat.turns import THINKING, Turn
from holdfast.errors import DataError, ModelError

LOSS_ON = ("all", "last")
"""The answers of a conversation that are trained: all of the assistant's, or the last only."""


class Rendered(NamedTuple):
    """A text, and the characters of it that are trained: (start, end) of each answer with its end."""

    text: str
    spans: list[tuple[int, int]]


def apply(
    messages: Sequence[Turn],
    tokenizer: Any,
    where: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> str:
    """Return the rendered messages. Templates of multimodal models may expect content as a list of parts.

    Args:
        where: the row, for messages.

    Raises:
        DataError: the template refuses the messages, or leaves out the question that is to be answered.
        ModelError: the template takes too long, or writes too much.
    """
    from jinja2 import TemplateError

    shown = [{key: value for key, value in turn.items() if key != "weight"} for turn in messages]
    options = {**options, **({"tools": list(tools)} if tools else {})}
    last = str(shown[-1]["content"]).strip()
    refused: Exception | None = None
    text = ""
    try:
        text = apply_template(tokenizer, shown, **options)
    except TemplateError as error:
        refused = error
    if refused is not None or last not in text:
        parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in shown]
        with contextlib.suppress(TemplateError):
            in_parts = apply_template(tokenizer, parts, **options)
            if last in in_parts and "'type'" not in in_parts:  # else the template printed the list
                return in_parts
    if refused is not None:
        raise DataError(f"{where}the model's chat template refuses it: {refused}.") from refused
    if options.get("add_generation_prompt") and not any(form in text for form in _forms(last)):
        raise DataError(
            f"{where}the model's chat template leaves out the question. Use a model whose template writes "
            "it, or drop the row."
        )
    return text


def conversation(
    messages: Sequence[Turn],
    tokenizer: Any,
    *,
    where: str = "",
    tools: Sequence[Mapping[str, Any]] | None = None,
    loss_on: str = "all",
) -> Rendered:
    """Render a conversation and find the answers in it, from how the template renders its beginnings.

    An answer begins after the generation prompt for the turns before it, and ends where the text of the turns
    up to it ends: with the template's own end of a turn. After the last answer, the eos token is added if the
    template ends no answer; an earlier one then ends with the token that begins the next turn. Answers with
    `weight: 0` and answers before the first user turn are not trained.

    Args:
        where: the row, for messages ("my.jsonl, line 3: ").
        loss_on: "all" or "last": the answers that are trained.

    Raises:
        DataError: the template refuses the conversation, leaves out a part of it, or renders its beginning
            differently if more turns follow.
        ModelError: the template renders the last question differently if an answer follows.
    """
    whole = apply(messages, tokenizer, where, tools)
    asked = next((i for i, turn in enumerate(messages) if turn["role"] == "user"), 0)
    answers = [
        i
        for i, turn in enumerate(messages)
        if i > asked and turn["role"] == "assistant" and turn.get("weight") != 0
    ]
    spans = []
    for i in answers if loss_on == "all" else answers[-1:]:
        last = i == len(messages) - 1
        prompt = apply(messages[:i], tokenizer, where, tools, add_generation_prompt=True)
        if not whole.startswith(prompt):
            raise _one_question() if last else _inconsistent(where)
        if last:
            ended = whole[: len(prompt)] + closed(whole[len(prompt) :], messages[i], tokenizer)
        else:
            ended = apply(messages[: i + 1], tokenizer, where, tools)
            if not whole.startswith(ended):
                ended = _before_the_end(ended, whole, str(messages[i]["content"]), tokenizer)
            if not ended:
                raise _inconsistent(where)
            if closed(ended[len(prompt) :], messages[i], tokenizer) != ended[len(prompt) :]:
                ended += _next_token(tokenizer, whole[len(ended) :])
        spans.append((len(prompt), len(ended)))
        if last:
            whole = ended
        _check_thinking(messages[i], whole[slice(*spans[-1])], where)
    check_nothing_lost(messages, whole, where)
    return Rendered(whole, spans)


def closed(completion: str, answer: Turn, tokenizer: Any) -> str:
    """Return a completion that ends: with the eos token if the template writes nothing after an answer."""
    text = str(answer["content"]).strip()
    if not text or not completion.rstrip().endswith(text):
        return completion
    known = "Kestrel 7 answers"
    turns = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": known}]
    if not apply(turns, tokenizer).rstrip().endswith(known):  # the answer itself ends like the template's end
        return completion
    return completion.rstrip() + str(tokenizer.eos_token)


def _one_question() -> ModelError:
    return ModelError(
        "The model's chat template renders a question differently if an answer follows, so prompt "
        "and answer cannot be separated. Use the template 'alpaca', or another chat template."
    )


def _inconsistent(where: str) -> DataError:
    return DataError(
        f"{where}the model's chat template renders an answer differently if more turns follow (for example, "
        "it removes earlier thinking), so the earlier answers cannot be trained. Train on the last answer "
        "only (loss_on: last), or use a template that keeps earlier turns."
    )


def _before_the_end(ended: str, whole: str, answer: str, tokenizer: Any) -> str:
    """The text of some turns without a token that ends a whole conversation (Phi-3); "" if that is not it."""
    for token in {str(token) for token in tokenizer.added_tokens_decoder.values()}:
        if token and ended.endswith(token) and whole.endswith(token):
            shorter = ended.removesuffix(token)
            if whole.startswith(shorter) and not shorter.rstrip().endswith(answer.strip()):
                return shorter
    return ""


def _next_token(tokenizer: Any, following: str) -> str:
    """The white space and the added token at the start of `following`, which end the answer before it."""
    known = {str(token) for token in tokenizer.added_tokens_decoder.values()} | {
        *tokenizer.all_special_tokens
    }
    start = following[len(following) - len(following.lstrip()) :]
    fitting = sorted((token for token in known if token and start.startswith(token)), key=len)
    if not fitting:
        return ""
    return following[: len(following) - len(start)] + fitting[-1]


def check_nothing_lost(messages: Sequence[Turn], text: str, where: str) -> None:
    """Raise DataError if the template has left out a turn or a tool call; `text` is what it made."""
    for number, turn in enumerate(messages, 1):
        # Templates may remove the thinking of earlier answers.
        content = turn["content"].rpartition("</think>")[2].strip()
        written = any(form in text for form in _forms(content))
        names = [call["function"]["name"] for call in turn.get("tool_calls", ())]
        if not written or not all(name in text for name in names):
            what = "the content" if not written else "the tool calls"
            raise DataError(
                f"{where}the model's chat template leaves out {what} of turn {number} (role "
                f"{turn['role']}). Use a model whose template supports it, or drop the row."
            )


def _forms(content: str) -> Iterator[str]:
    """A text as it is and as JSON, in which some templates write it."""
    yield content
    yield json.dumps(content, ensure_ascii=False)[1:-1]
    yield json.dumps(content)[1:-1]


def _check_thinking(turn: Turn, text: str, where: str) -> None:
    """Raise DataError if the thinking of a trained answer is not part of its text."""
    for key in THINKING:
        if turn.get(key) and turn[key].strip() not in text:
            raise DataError(
                f"{where}the model's chat template leaves out the thinking (`{key}`) of an answer that is "
                "trained. Use a model whose template supports it, or remove it from the row."
            )
