"""Convert records to canonical rows: find the columns of prompt and answer, and give each row a stable id."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
KINDS = ("safe", "unsafe", "refusal", "benign")
_DEFAULT_KIND = {"alignment": "safe", "harmful": "unsafe", "benign": "benign"}
_ANSWERS = {"response": "", "target": ""}
_SPEAKERS = {role: role for role in ("user", "assistant", "system")} | {"human": "user", "gpt": "assistant"}


def to_rows(
    loaded: Loaded,
    *,
    role: str,
    task: str | Task | None = None,
    kind: str | None = None,
    prompts_only: bool = False,
) -> list[Row]:
    """Convert the records to canonical rows, in the same order.

    Args:
        loaded: from `read_records`.
        role: "user", "alignment", "harmful", "task" or "benign"; the first part of each row's id.
        task: a task whose columns are also accepted and renamed.
        kind: the rows to take ("safe", "unsafe", "refusal", "benign") from a safety data set, which is
            recognised by its name or its columns. The default is "safe" for alignment, "unsafe" for harmful
            and "benign" for benign rows, and all rows for any other role. All rows of other files are taken.
        prompts_only: no answer is required (`output` is then ""), as for test prompts.

    Returns:
        dicts with id, instruction, input, output; category if the file has it; and messages if a
        conversation is more than one question and one answer. Equal content gives an equal id.

    Raises:
        DataError: the columns are not known; a prompt or answer is missing, blank or not text (with its
            line); or there is no row of the kind.
    """
    task = resolve_task(task)
    kind = kind or _DEFAULT_KIND.get(role)
    if kind is not None and kind not in KINDS:
        raise DataError(f"Unknown kind of rows '{kind}'.{nearest(kind, KINDS)}")
    known = task or recognised(loaded, role)
    if isinstance(known, SafetyData) and kind is None and len(known.kinds) == 1:
        kind = known.kinds[0]
    rows = []
    for i, record in enumerate(loaded.records):
        try:
            row = _row(record, known, kind, prompts_only)
            if row is not None and isinstance(known, Task) and known.suffix:
                row = _with_suffix(row, known.suffix)
            if row is not None:
                _check(row, prompts_only)
        except KeyError as error:
            raise DataError(_wrong_columns(loaded.place(i), record, known, prompts_only)) from error
        except (ValueError, TypeError) as error:
            raise DataError(f"{loaded.place(i)}: {error}.") from error
        if row is not None:
            rows.append({"id": row_id(role, row), **row})
    if not rows:
        what = f"no row of the kind '{kind}'" if isinstance(known, SafetyData) else "no row with content"
        raise DataError(f"{loaded.path} has {what} among its {len(loaded.records)} rows.")
    return rows


def recognised(loaded: Loaded, role: str) -> SafetyData | None:
    """The safety data set of the records: the one that was named, else recognised by their columns."""
    if isinstance(loaded.known, SafetyData):
        return loaded.known
    if role not in ("harmful", "alignment", "mixed", "benign"):
        return None
    columns = set(loaded.records[0])
    for name in names():
        known = find(name)
        if isinstance(known, SafetyData) and any(set(c) <= columns for c in known.columns):
            return known
    return None


def resolve_task(task: str | Task | None) -> Task | None:
    """Return the task with this name. Raises DataError if there is none."""
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
    """The content of a row: two rows with equal content are the same."""
    return [row["instruction"], row["input"], row["output"], row.get("messages")]


def prompt_key(row: Mapping[str, Any]) -> str:
    """A key of the prompt that ignores case and whitespace; it does not depend on the answer."""
    if row.get("messages"):
        texts = [part for turn in row["messages"][:-1] for part in (turn["role"], turn["content"])]
    else:
        texts = [row["instruction"], row["input"]]
    return "\n".join(" ".join(text.split()).casefold() for text in texts)


def _row(
    record: Mapping[str, Any], known: Task | SafetyData | None, kind: str | None, prompts_only: bool
) -> Row | None:
    """The row of one record, or None if it is not of the kind. Raises KeyError: columns not known."""
    if isinstance(known, Task):
        record = _renamed(record, known.rename)
        if known.to_row is not None and any(set(c) <= set(record) for c in known.columns):
            found = known.to_row(record)
            return None if found is None else dict(found)
    elif known is not None and kind is not None:
        if kind not in known.kinds:
            raise ValueError(f"{known.name} has no rows of the kind '{kind}', only {_listed(known.kinds)}")
        full = {**_ANSWERS, **record} if prompts_only else record
        if not known.columns or any(set(c) <= set(full) for c in known.columns):
            return known.to_row(full, kind)
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


def _renamed(record: Mapping[str, Any], rename: Mapping[str, str]) -> Mapping[str, Any]:
    """The record with the task's column names added to the user's names."""
    missing = [theirs for theirs in rename.values() if theirs not in record]
    if missing:
        seen = ", ".join(map(str, record)) or "none"
        raise ValueError(f"there is no column '{missing[0]}'. Columns seen: {seen}")
    return {**record, **{ours: record[theirs] for ours, theirs in rename.items()}}


def _with_suffix(row: Row, suffix: str) -> Row:
    """The row with `suffix` after its question: the last user turn of a conversation."""
    row = {**row, "instruction": row["instruction"] + suffix}
    if row.get("messages"):
        *before, asked, answer = row["messages"]
        row["messages"] = [*before, {**asked, "content": asked["content"] + suffix}, answer]
    return row


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
    """Raise ValueError unless every part is text that UTF-8 can encode, and prompt and answer not blank."""
    shown = {"instruction": "the prompt", "input": "the input", "output": "the answer"}
    for part, name in shown.items():
        if not isinstance(row[part], str):
            raise ValueError(f"{name} is {_kind_of(row[part])}; expected text")
        try:
            row[part].encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name} contains half of a surrogate pair, which is not a character") from error
    if not row["instruction"].strip() and not row["input"].strip():
        raise ValueError("the prompt is blank")
    if not row["output"].strip() and not prompts_only:
        raise ValueError("the answer is blank; expected text (drop the row if it has none)")


def _kind_of(value: Any) -> str:
    return "missing (null)" if value is None else f"of the type {type(value).__name__}"


def _listed(words: Sequence[str]) -> str:
    return " and ".join(words)


def _wrong_columns(
    place: str, record: Mapping[str, Any], task: Task | SafetyData | None, prompts_only: bool
) -> str:
    """The message with the columns found, the columns accepted, and the task that has these columns."""
    seen = list(record)
    accepted = list(COLUMN_SETS)
    if task is not None and task.columns:
        what = "task" if isinstance(task, Task) else "data set"
        accepted[:0] = [f"{', '.join(columns)} ({what} {task.name})" for columns in task.columns]
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
            return f"{message} These look like the columns of {name}, which has no user rows."
        return f"{message} These look like the columns of {name}: add `task: {name}`."
    if len(seen) == 1 and isinstance(seen[0], str) and (";" in seen[0] or "\t" in seen[0]):
        return f"{message} The file's separator does not seem to match its file extension."
    return message
