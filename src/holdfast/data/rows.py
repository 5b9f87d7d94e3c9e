"""Records to canonical rows: which columns hold the prompt and the answer, and a stable id for each row."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from holdfast.data.sources import Loaded
from holdfast.errors import DataError, nearest
from holdfast.tasks import Row, SafetyData, Task, beavertails, find, names

COLUMN_SETS = (
    "messages (a list of {role, content})",
    "conversations (a list of {from, value})",
    "instruction[, input], output",
    "prompt, completion",
    "prompt, response",
)
KINDS = ("safe", "unsafe", "refusal")
_DEFAULT_KIND = {"alignment": "safe", "harmful": "unsafe"}
_SPEAKERS = {role: role for role in ("user", "assistant", "system")} | {"human": "user", "gpt": "assistant"}


def to_rows(
    loaded: Loaded,
    *,
    role: str,
    task: str | Task | None = None,
    kind: str | None = None,
    prompts_only: bool = False,
) -> list[Row]:
    """The canonical rows of what was read, in its order.

    Args:
        loaded: from `read_records`.
        role: "user", "alignment", "harmful", "task" or "benign"; the first part of each row's id.
        task: also accepts the columns of this task.
        kind: which rows of a BeaverTails-like file to take ("safe", "unsafe", "refusal"); by default
            "safe" for alignment, "unsafe" for harmful rows, and all rows for any other role. Files
            without a label are taken whole.
        prompts_only: an answer is not needed (`output` is then ""), as for test prompts.

    Returns:
        dicts with id, instruction, input, output, category where the file has it, and messages where a
        conversation is more than one question and one answer. Equal content has an equal id.

    Raises:
        DataError: other columns; a prompt or answer that is missing, blank or not text (with its line);
            no row of the kind.
    """
    task = resolve_task(task)
    kind = kind or _DEFAULT_KIND.get(role)
    if kind is not None and kind not in KINDS:
        raise DataError(f"Unknown kind of rows '{kind}'.{nearest(kind, KINDS)}")
    rows = []
    for i, record in enumerate(loaded.records):
        try:
            row = _row(record, task, kind, prompts_only)
            if row is not None:
                _check(row, prompts_only)
        except KeyError as error:
            raise DataError(_wrong_columns(loaded.place(i), record, task, prompts_only)) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{loaded.place(i)}: {error}.") from error
        if row is not None:
            rows.append({"id": row_id(role, row), **row})
    if not rows:
        raise DataError(
            f"{loaded.path} holds no row of the kind '{kind}' among its {len(loaded.records)} rows "
            "(by the column `is_safe`)."
        )
    return rows


def resolve_task(task: str | Task | None) -> Task | None:
    """The task that is meant by its name. Raises DataError for a name that no task has."""
    if task is None or isinstance(task, Task):
        return task
    found = find(task)
    if not isinstance(found, Task):
        known = [name for name in names() if isinstance(find(name), Task)]
        raise DataError(f"Unknown task '{task}'.{nearest(task, known)}")
    return found


def row_id(role: str, row: Mapping[str, Any]) -> str:
    """The role and 12 hex digits of the sha256 of the row's content."""
    return f"{role}-{hashlib.sha256(json.dumps(content(row)).encode()).hexdigest()[:12]}"


def content(row: Mapping[str, Any]) -> list[Any]:
    """What makes a row the same as another one."""
    return [row["instruction"], row["input"], row["output"], row.get("messages")]


def prompt_key(row: Mapping[str, Any]) -> str:
    """Equal for prompts that differ in case and whitespace alone; the answer does not count."""
    if row.get("messages"):
        texts = [part for turn in row["messages"][:-1] for part in (turn["role"], turn["content"])]
    else:
        texts = [row["instruction"], row["input"]]
    return "\n".join(" ".join(text.split()).casefold() for text in texts)


def labelled(loaded: Loaded) -> bool:
    """Whether the records say of themselves which are harmful."""
    return all("is_safe" in record for record in loaded.records)


def _row(record: Mapping[str, Any], task: Task | None, kind: str | None, prompts_only: bool) -> Row | None:
    """The row of one record, or None if it is not of the kind. Raises KeyError: no known columns."""
    if task is not None and task.to_row is not None and any(set(c) <= set(record) for c in task.columns):
        return dict(task.to_row(record))
    if kind == "refusal" and ("refusal" in record or "is_safe" in record):
        return beavertails.to_row(record, kind)
    if kind is not None and "is_safe" in record and ("response" in record or prompts_only):
        return beavertails.to_row({"response": "", **record} if prompts_only else record, kind)
    if record.get("messages") is not None:
        return _conversation(record["messages"], "role", "content")
    if record.get("conversations") is not None:
        return _conversation(record["conversations"], "from", "value")
    for prompt, answers in (("instruction", ("output",)), ("prompt", ("completion", "response"))):
        answer = next((name for name in answers if name in record), None)
        if prompt in record and (answer or prompts_only):
            given = record.get("input") if prompt == "instruction" else None
            row = {
                "instruction": record[prompt],
                "input": "" if given is None else given,
                "output": record[answer] if answer else "",
            }
            if "category" in record:
                row["category"] = beavertails.category(record)
            return row
    raise KeyError("columns")


def _conversation(turns: Any, speaker: str, text: str) -> Row:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError(f"a conversation must be a list of {{{speaker}, {text}}}")
    messages = []
    for turn in turns:
        role, said = _SPEAKERS.get(str(turn.get(speaker))), turn.get(text)
        if role is None:
            known = ", ".join(sorted(_SPEAKERS))
            raise ValueError(f"`{speaker}` is {turn.get(speaker)!r}; expected one of {known}")
        if not isinstance(said, str):
            raise ValueError(f"`{text}` of a {role} turn is {_kind_of(said)}; expected text")
        if not said.strip():
            raise ValueError(f"`{text}` of a {role} turn is blank")
        messages.append({"role": role, "content": said})
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or messages[-2]["role"] != "user":
        raise ValueError("a conversation must end in a user turn and the assistant's answer")
    row: Row = {"instruction": messages[-2]["content"], "input": "", "output": messages[-1]["content"]}
    if len(messages) > 2:
        row["messages"] = messages
    return row


def _check(row: Row, prompts_only: bool) -> None:
    """Every part is text that UTF-8 can hold; prompt and answer say something."""
    shown = {"instruction": "the prompt", "input": "the input", "output": "the answer"}
    for part, name in shown.items():
        if not isinstance(row[part], str):
            raise ValueError(f"{name} is {_kind_of(row[part])}; expected text")
        try:
            row[part].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} holds half of a surrogate pair, which is no character") from error
    if not row["instruction"].strip() and not row["input"].strip():
        raise ValueError("the prompt is blank")
    if not row["output"].strip() and not prompts_only:
        raise ValueError("the answer is blank; expected text (drop the row if it has none)")


def _kind_of(value: Any) -> str:
    return "missing (null)" if value is None else f"of the type {type(value).__name__}"


def _wrong_columns(place: str, record: Mapping[str, Any], task: Task | None, prompts_only: bool) -> str:
    """What was seen, what is accepted, and the task whose columns these are."""
    seen = list(record)
    accepted = list(COLUMN_SETS)
    if task is not None and task.columns:
        accepted[:0] = [f"{', '.join(columns)} (task {task.name})" for columns in task.columns]
    if prompts_only:
        accepted += ["prompt alone", "instruction alone"]
    message = (
        f"{place}: no prompt and answer found. Columns seen: {', '.join(map(str, seen)) or 'none'}. "
        f"Accepted: {'; '.join(accepted)}."
    )
    for name in names():
        known = find(name)
        if known is None or known == task or not any(set(c) <= set(seen) for c in known.columns):
            continue
        if isinstance(known, SafetyData):
            return f"{message} These look like {name}'s, which hold harmful or alignment rows."
        return f"{message} These look like {name}'s: add `task: {name}`."
    if len(seen) == 1 and isinstance(seen[0], str) and (";" in seen[0] or "\t" in seen[0]):
        return f"{message} The columns seem to be separated by something else than the file's ending says."
    return message
