"""Convert records to canonical rows: find the columns of prompt and answer, and give each row a stable id."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from holdfast.chat.turns import Turn, check_complete, from_lists, read_tools, read_turns, said
from holdfast.data.bad_rows import BadRows
from holdfast.data.sources import Loaded
from holdfast.errors import DataError, nearest
from holdfast.tasks import Record, Row, SafetyData, Task, beavertails, find, names

COLUMN_SETS = (
    "messages (a list of {role, content})",
    "conversations (a list of {from, value})",
    "prompt, completion (lists of {role, content})",
    "instruction[, input], output",
    "prompt, completion",
    "prompt, response",
)
UNREAD = ("images", "videos", "audios", "chat_template_kwargs")
"""Columns that change what a conversation means, and that are not read; an empty one is ignored."""

KINDS = ("safe", "unsafe", "refusal", "benign")
_DEFAULT_KIND = {"alignment": "safe", "harmful": "unsafe", "benign": "benign"}
_ANSWERS = {"response": "", "target": ""}


def to_rows(
    loaded: Loaded,
    *,
    role: str,
    task: str | Task | None = None,
    kind: str | None = None,
    prompts_only: bool = False,
    skip_bad: bool = False,
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
        skip_bad: leave out the rows that cannot be used, instead of raising an error.

    Returns:
        dicts with id, instruction, input, output; category if the file has it; and, if a conversation is
        more than one question and one answer, messages and its tools. Equal content gives an equal id.

    Raises:
        DataError: the columns are not known; a prompt or answer is missing, blank or not text (with its
            line); or there is no row of the kind.
    """
    bad = BadRows(loaded.path)
    found = convert(loaded, bad, role=role, task=task, kind=kind, prompts_only=prompts_only)
    return [one.row for one in finished(found, bad, skip_bad)]


class Converted(NamedTuple):
    """A record of a source, its canonical row, and its place ("line 3")."""

    record: Record
    row: Row
    place: str


def convert(
    loaded: Loaded,
    bad: BadRows,
    *,
    role: str,
    task: str | Task | None = None,
    kind: str | None = None,
    prompts_only: bool = False,
) -> Iterator[Converted]:
    """Yield each record with its canonical row, and add those that cannot be used to `bad`.

    Arguments are those of `to_rows`. Records of another kind are left out.

    Raises:
        DataError: no record has a row of the kind, and none is bad.
    """
    task = resolve_task(task)
    kind = kind or _DEFAULT_KIND.get(role)
    if kind is not None and kind not in KINDS:
        raise DataError(f"Unknown kind of rows '{kind}'.{nearest(kind, KINDS)}")
    known = task or _named_format(loaded) or recognised(loaded, role)
    if isinstance(known, SafetyData) and kind is None and len(known.kinds) == 1:
        kind = known.kinds[0]
    total = found = 0
    for total, placed in enumerate(loaded, 1):  # noqa: B007
        if placed.wrong:
            bad.add(placed.place, placed.wrong, placed.hint)
            continue
        try:
            row = _row(placed.record, known, kind, prompts_only)
            if row is not None and isinstance(known, Task) and known.suffix:
                row = _with_suffix(row, known.suffix)
            if row is not None:
                _check(row, prompts_only)
        except KeyError:
            bad.add(placed.place, *_wrong_columns(placed.record, known, prompts_only))
        except (ValueError, TypeError) as error:
            bad.add(placed.place, str(error))
        else:
            if row is not None:
                found += 1
                yield Converted(placed.record, {"id": row_id(role, row), **row}, placed.place)
    if not found and not bad.count:
        what = f"no row of the kind '{kind}'" if isinstance(known, SafetyData) else "no row with content"
        raise DataError(f"{loaded.path} has {what} among its {total} rows.")


def finished(found: Iterable[Converted], bad: BadRows, skip_bad: bool) -> Iterator[Converted]:
    """Yield what `convert` yields. Raises DataError at the end if there are bad rows that are not skipped."""
    count = 0
    for count, one in enumerate(found, 1):  # noqa: B007
        yield one
    if not skip_bad or not count:
        bad.refuse(count + bad.count)


def _named_format(loaded: Loaded) -> Task | None:
    """The task in whose format a file of another role was given, as in `alignment: dolly:FILE`."""
    return loaded.known if isinstance(loaded.known, Task) and loaded.known.to_row is not None else None


def recognised(loaded: Loaded, role: str) -> SafetyData | None:
    """The safety data set of the records: the one that was named, else recognised by their columns."""
    if isinstance(loaded.known, SafetyData):
        return loaded.known
    if role not in ("harmful", "alignment", "mixed", "benign"):
        return None
    columns = set(loaded.columns)
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
    tools = [row["tools"]] if row.get("tools") else []
    return [row["instruction"], row["input"], row["output"], row.get("messages"), *tools]


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
        accepted = (*known.columns, *known.copies)
        if not accepted or any(set(c) <= set(full) for c in accepted):
            return known.to_row(full, kind)
    for name in UNREAD:
        if record.get(name):
            raise ValueError(f"`{name}` is not supported, and the row would be trained without it")
    turns = _turns(record, prompts_only)
    if turns is not None:
        return _conversation(turns, read_tools(record.get("tools")), prompts_only)
    for prompt, answers in (("instruction", ("output",)), ("prompt", ("completion", "response"))):
        answer = next((name for name in answers if name in record), None)
        if prompt in record and (answer or prompts_only):
            given = record.get("input") if prompt == "instruction" else None
            row = {
                "instruction": record[prompt],
                "input": "" if _missing(given) else given,
                "output": record[answer] if answer else "",
            }
            if "category" in record:
                row["category"] = beavertails.category(record)
            return _with_talk(row, record, prompts_only)
    raise KeyError("columns")


def _with_suffix(row: Row, suffix: str) -> Row:
    """The row with `suffix` after its question, which is the last user turn of a conversation."""
    row = {**row, "instruction": row["instruction"] + suffix}
    if row.get("messages"):
        last = max(i for i, turn in enumerate(row["messages"]) if turn["role"] == "user")
        asked = {**row["messages"][last], "content": row["messages"][last]["content"] + suffix}
        row["messages"] = [*row["messages"][:last], asked, *row["messages"][last + 1 :]]
    return row


def _missing(value: Any) -> bool:
    """Whether a value stands for no value: null, or NaN, as pandas writes it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _turns(record: Mapping[str, Any], prompts_only: bool) -> list[Turn] | None:
    """The turns of a record that holds a conversation; None for another record."""
    for name in ("messages", "conversations"):
        given = record.get(name)
        if given is not None and (given != [] or len(record) == 1):
            turns = read_turns(given)
            return turns if turns and turns[0]["role"] == "system" else _system(record) + turns
    prompt = record.get("prompt")
    answer = next((record[name] for name in ("completion", "response") if record.get(name)), None)
    lists = isinstance(prompt, list) or isinstance(answer, list)  # TRL's rows
    if prompt and lists and (answer is not None or prompts_only):
        turns = from_lists(prompt, answer or [])
        return turns if turns and turns[0]["role"] == "system" else _system(record) + turns
    return None


def _system(record: Mapping[str, Any]) -> list[Turn]:
    """The system turn in a column beside the conversation, as LLaMA-Factory and OpenOrca have it."""
    for name in ("system", "system_prompt"):
        text = record.get(name)
        if not _missing(text) and not isinstance(text, str):
            raise ValueError(f"`{name}` is {_kind_of(text)}; expected text")
        if text and text.strip():
            return [{"role": "system", "content": text}]
    return []


def _with_talk(row: Row, record: Mapping[str, Any], prompts_only: bool) -> Row:
    """The row with its system turn and its `history` (a list of [question, answer]), as in LLaMA-Factory."""
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(h, list | tuple) and len(h) == 2 for h in history):
        raise ValueError("`history` must be a list of [question, answer]")
    system = _system(record)
    if not system and not history:
        return row
    _check(row, prompts_only)
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    spoken = [*(text for pair in history for text in pair), question]
    roles = ("user", "assistant") * len(spoken)
    turns = system + read_turns([{"role": r, "content": c} for r, c in zip(roles, spoken, strict=False)])
    if row["output"] or not prompts_only:
        turns += read_turns([{"role": "assistant", "content": row["output"]}])
    made = _conversation(turns, [], prompts_only)
    return {**made, **({"category": row["category"]} if "category" in row else {})}


def _renamed(record: Mapping[str, Any], rename: Mapping[str, str]) -> Mapping[str, Any]:
    """The record with the task's column names added to the user's names."""
    missing = [theirs for theirs in rename.values() if theirs not in record]
    if missing:
        seen = ", ".join(map(str, record)) or "none"
        raise ValueError(f"there is no column '{missing[0]}'. Columns seen: {seen}")
    return {**record, **{ours: record[theirs] for ours, theirs in rename.items()}}


def _conversation(turns: list[Turn], tools: list[dict[str, Any]], prompts_only: bool) -> Row:
    if prompts_only and turns and turns[-1]["role"] in ("user", "tool"):
        turns = [*turns, {"role": "assistant", "content": ""}]
    check_complete(turns)
    asked = next(turn["content"] for turn in reversed(turns) if turn["role"] == "user")
    row: Row = {"instruction": asked, "input": "", "output": said(turns[-1])}
    plain = [turn["role"] for turn in turns] == ["user", "assistant"]
    if not plain or tools or any(set(turn) != {"role", "content"} for turn in turns):
        row["messages"] = turns
    if tools:
        row["tools"] = tools
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
    record: Mapping[str, Any], task: Task | SafetyData | None, prompts_only: bool
) -> tuple[str, str]:
    """The columns found as a reason, and the columns accepted and the fitting task as a hint."""
    seen = list(record)
    accepted = list(COLUMN_SETS)
    if task is not None and (task.columns or task.copies):
        what = "task" if isinstance(task, Task) else "data set"
        read = (*task.columns, *task.copies)
        accepted[:0] = [f"{', '.join(columns)} ({what} {task.name})" for columns in read]
    if prompts_only:
        accepted += ["prompt alone", "instruction alone"]
    reason = f"no prompt and answer found. Columns seen: {', '.join(map(str, seen)) or 'none'}"
    message = f"Accepted: {'; '.join(accepted)}."
    for name in names():
        known = find(name)
        if known is None or known == task or not any(set(c) <= set(seen) for c in known.columns):
            continue
        if isinstance(known, SafetyData):
            return reason, f"{message} These look like the columns of {name}, which has no user rows."
        return reason, f"{message} These look like the columns of {name}: add `task: {name}`."
    if len(seen) == 1 and isinstance(seen[0], str) and (";" in seen[0] or "\t" in seen[0]):
        return reason, f"{message} The file's separator does not seem to match its file extension."
    return reason, message
