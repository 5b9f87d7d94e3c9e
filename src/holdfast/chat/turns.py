"""The turns of a conversation, read from the formats of OpenAI, TRL, ShareGPT and LLaMA-Factory.

A turn becomes a dict with `role` and `content` (text), and, if it has them: `tool_calls`, `tool_call_id`,
`name`, its thinking (`reasoning_content`, `reasoning` or `thinking`), and `weight: 0` if it is not trained.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Turn = dict[str, Any]

ROLES = {
    "user": "user", "assistant": "assistant", "system": "system", "developer": "developer", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "observation": "tool",
}  # fmt: skip
"""The roles in files, and the role that each means."""

THINKING = ("reasoning_content", "reasoning", "thinking")
"""The names of a turn's thinking."""

KEPT = ("tool_call_id", "name")


def read_turns(turns: Any) -> list[Turn]:
    """Return a list of turns in one form. A blank system turn is dropped.

    Args:
        turns: dicts with `role` and `content`, or `from` and `value`; also as JSON text, as in a cell of CSV.

    Raises:
        ValueError: with a sentence about the turn that cannot be used.
    """
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        with contextlib.suppress(ValueError, RecursionError):
            turns = json.loads(turns)
    if not isinstance(turns, list | tuple) or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError("a conversation must be a list of {role, content} or {from, value}")
    read = [_turn(turn) for turn in turns]
    return [turn for turn in read if turn["role"] not in ("system", "developer") or turn["content"].strip()]


def check_complete(turns: Sequence[Turn]) -> None:
    """Raise ValueError unless a conversation has a question, ends in an answer, and trains an answer."""
    if not turns:
        raise ValueError("the conversation has no turns")
    last = turns[-1]["role"]
    if last != "assistant" or len(turns) < 2 or turns[-2]["role"] not in ("user", "tool"):
        raise ValueError(
            f"a conversation must end in a user turn and the assistant's answer, found {_ends(turns)}"
        )
    if not any(turn["role"] == "user" for turn in turns):
        raise ValueError("the conversation has no user turn")
    if all(turn.get("weight") == 0 for turn in turns if turn["role"] == "assistant"):
        raise ValueError("every answer of the conversation has weight 0, so nothing of it is trained")


def only_last(turns: Iterable[Turn]) -> list[Turn]:
    """Return the turns with weight 0 for every answer but the last."""
    turns = list(turns)
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=-1)
    return [
        {**turn, "weight": 0} if turn["role"] == "assistant" and i != last else turn
        for i, turn in enumerate(turns)
    ]


def from_lists(prompt: Any, completion: Any) -> list[Turn]:
    """Return the turns of a row whose prompt or completion is a list of messages, as in TRL.

    As there, the answers within the prompt are not trained.
    """
    begun = read_turns([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    begun = [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in begun]
    return begun + read_turns(answer)


def said(turn: Turn) -> str:
    """Return the text of a turn; a turn that only calls tools is its calls as JSON."""
    if turn["content"].strip() or not turn.get("tool_calls"):
        return str(turn["content"])
    return json.dumps([call["function"] for call in turn["tool_calls"]], ensure_ascii=False)


def sent(turns: Iterable[Turn]) -> list[Turn]:
    """Return turns in OpenAI's format for a server: without our keys, and with arguments as text."""
    found = []
    for turn in turns:
        made = {key: value for key, value in turn.items() if key not in ("weight", *THINKING)}
        if "tool_calls" in made:
            calls = made["tool_calls"]
            made["tool_calls"] = [{**call, "function": _with_text(call["function"])} for call in calls]
        found.append(made)
    return found


def _with_text(function: Mapping[str, Any]) -> dict[str, Any]:
    arguments = function["arguments"]
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {**function, "arguments": text}


def exchanges(turns: Sequence[Turn]) -> list[tuple[str, str]]:
    """Return each answer of the assistant with the turns of the user and the tools before it.

    The system message is part of the first question, and is also an exchange of its own: the answer to the
    question which instructions the assistant has.
    """
    system = "\n\n".join(turn["content"] for turn in turns if turn["role"] in ("system", "developer"))
    found = [(INSTRUCTIONS, system)] if system else []
    asked = [system] if system else []
    for turn in turns:
        if turn["role"] == "assistant":
            found.append(("\n\n".join(asked), said(turn)))
            asked = []
        elif turn["role"] in ("user", "tool"):
            asked.append(turn["content"])
    return found


INSTRUCTIONS = "Which instructions do you follow?"
"""The question to which a system message is the answer."""


def read_tools(tools: Any) -> list[dict[str, Any]]:
    """Return the descriptions of tools, given as a list or as its JSON text; [] for none."""
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ValueError("`tools` is text that is not JSON; expected a list of tools") from error
    if not tools:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError("`tools` must be a list of objects that describe tools")
    return [dict(tool) for tool in tools]


def _turn(turn: Mapping[str, Any]) -> Turn:
    speaker, text = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = ROLES.get(str(turn.get(speaker)))
    if role is None:
        known = ", ".join(sorted(ROLES))
        raise ValueError(f"`{speaker}` is {turn.get(speaker)!r}; expected one of {known}")
    calls = _calls(turn) if role == "assistant" else []
    content = _content(
        turn.get(text), role, text, empty=bool(calls) or role in ("system", "developer", "tool")
    )
    read: Turn = {"role": role, "content": content}
    if calls:
        read["tool_calls"] = calls
    for key in (*KEPT, *THINKING):
        value = turn.get(key)
        if isinstance(value, str) and value.strip():
            _check_text(value, key)
            read[key] = value
    # OpenAI writes weight: 0, axolotl train: false, ms-swift loss: false.
    weights = [turn[key] for key in ("weight", "train", "loss") if turn.get(key) is not None]
    if role == "assistant" and any(weight not in (0, 1) for weight in weights):
        raise ValueError(f"the weight of an answer is {weights[0]!r}; expected 0 (not trained) or 1")
    if role == "assistant" and 0 in weights:
        read["weight"] = 0
    return read


def _content(content: Any, role: str, name: str, *, empty: bool) -> str:
    if isinstance(content, list | tuple):
        content = "".join(_part(part, role) for part in content)
    if content is None and empty:
        content = ""
    if not isinstance(content, str):
        found = "missing (null)" if content is None else f"of the type {type(content).__name__}"
        raise ValueError(f"`{name}` of a {role} turn is {found}; expected text")
    if not content.strip() and not empty:
        raise ValueError(f"`{name}` of a {role} turn is blank")
    _check_text(content, f"`{name}` of a {role} turn")
    return content


def _part(part: Any, role: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ValueError(f"a {role} turn has a part of the type {kind!r}; expected only text")


def _calls(turn: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The tool calls of a turn, each {type, function: {name, arguments}}, with arguments as an object."""
    given = turn.get("tool_calls") or []
    if turn.get("function_call"):  # OpenAI's form before tools
        given = [turn["function_call"]]
    if not isinstance(given, list | tuple):
        raise ValueError(f"`tool_calls` is of the type {type(given).__name__}; expected a list")
    found = []
    for call in given:
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError("a tool call has no `name`; expected {function: {name, arguments}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # templates expect an object and would quote a text again
            try:
                read = json.loads(arguments)
            except (ValueError, RecursionError):
                read = arguments
            arguments = read if isinstance(read, dict) else arguments
        made: dict[str, Any] = {"type": "function"}
        if isinstance(call, Mapping) and isinstance(call.get("id"), str):
            made["id"] = call["id"]
        made["function"] = {"name": function["name"], "arguments": {} if arguments is None else arguments}
        found.append(made)
    return found


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} contains half of a surrogate pair, which is not a character") from error


def _ends(turns: Sequence[Turn]) -> str:
    return " and ".join(turn["role"] for turn in turns[-2:])
