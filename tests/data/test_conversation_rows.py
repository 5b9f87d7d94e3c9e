"""Conversations in the formats of today's files, as canonical rows."""

from __future__ import annotations

import pytest

from holdfast import data
from holdfast.data.pool import read_pool
from holdfast.errors import DataError

HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
ONE = [USER, ANSWER]


@pytest.fixture
def row(jsonl):
    def read(record, **options):
        (found,) = data.to_rows(data.read_records(jsonl("x.jsonl", [record])), role="user", **options)
        assert (found["instruction"], found["input"]) == ("a", "")
        return found

    return read


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [HUMAN, GPT]}, None),
        ({"conversations": ONE}, None),
        ({"messages": [HUMAN, GPT]}, None),
        ({"conversations": [{"from": "system", "value": ""}, HUMAN, GPT]}, None),
        ({"conversations": [GPT, HUMAN, GPT]}, [ANSWER, *ONE]),
        ({"system": "Be brief.", "conversations": [HUMAN, GPT]}, [SYSTEM, *ONE]),
        ({"system": "Other.", "messages": [SYSTEM, *ONE]}, [SYSTEM, *ONE]),
        ({"system": "", "instruction": "a", "output": "b"}, None),
        ({"system": "Be brief.", "instruction": "a", "output": "b"}, [SYSTEM, *ONE]),
        ({"system_prompt": "Be brief.", "prompt": "a", "response": "b"}, [SYSTEM, *ONE]),
        (
            {"instruction": "a", "input": None, "output": "b", "history": [["x", "y"]]},
            [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, *ONE],
        ),
        ({"instruction": "a", "input": float("nan"), "output": "b", "history": []}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWER]}, None),
        (
            {"messages": [{"role": "developer", "content": "x"}, *ONE]},
            [{"role": "developer", "content": "x"}, *ONE],
        ),
        ({"messages": None, "prompt": "a", "response": "b"}, None),
        ({"messages": [], "prompt": "a", "response": "b"}, None),
        ({"prompt": [USER], "completion": [ANSWER]}, None),
        ({"prompt": [USER], "completion": "b"}, None),
        ({"prompt": "a", "completion": [ANSWER]}, None),
        ({"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]'}, None),
        ({"messages": [USER, {**ANSWER, "weight": 1, "train": None}], "images": []}, None),
        ({"prompt": [*ONE, USER], "completion": [ANSWER]}, [USER, {**ANSWER, "weight": 0}, *ONE]),
        (
            {"messages": [USER, {**ANSWER, "reasoning_content": "hm"}]},
            [USER, {**ANSWER, "reasoning_content": "hm"}],
        ),
    ],
)
def test_formats(row, record, messages):
    found = row(record)
    assert found["output"] == "b"
    assert found.get("messages") == messages


def test_tools(row):
    turns = [
        USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "content": "3"}, ANSWER,
    ]  # fmt: skip
    found = row({"messages": turns, "tools": '[{"type": "function"}]'})
    assert found["tools"] == [{"type": "function"}]
    assert found["messages"][1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {}}
    called = row({"messages": turns[:2]})
    assert called["output"] == '[{"name": "f", "arguments": {}}]'
    assert called["id"] != row({"messages": turns[:2], "tools": [{"type": "function"}]})["id"]


def test_prompts_alone_end_in_the_question(row):
    found = row({"messages": [SYSTEM, USER]}, prompts_only=True)
    assert found["messages"][-1] == {"role": "assistant", "content": ""}
    assert row({"prompt": [USER]}, prompts_only=True)["output"] == ""


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": [HUMAN, GPT, HUMAN]}, "found assistant and user"),
        ({"messages": []}, "the conversation has no turns"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "the weight of an answer is 0.5; expected 0"),
        ({"messages": ONE, "images": ["x.png"]}, "`images` is not supported"),
        ({"prompt": [USER], "completion": "b", "chat_template_kwargs": {"x": 1}}, "is not supported"),
        ({"instruction": "a", "output": "b", "system": {"x": 1}}, "`system` is of the type dict"),
        ({"prompt": [USER], "completion": []}, "the prompt is of the type list|no prompt and answer"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "every answer of the conversation has weight 0"),
        ({"messages": [USER, ANSWER], "tools": "x"}, "`tools` is text that is not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "of the type 'image'"),
        ({"instruction": "a", "output": "b", "history": ["x"]}, "`history` must be a list of"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Columns seen: prompt, chosen, rejected"),
    ],
)
def test_rows_that_are_refused(row, record, reason):
    with pytest.raises(DataError, match=reason) as caught:
        row(record)
    assert "x.jsonl, line 1: " in str(caught.value)


@pytest.mark.parametrize("role", ["user", "alignment", "harmful", "benign"])
def test_a_named_format_works_in_every_role(jsonl, role):
    dolly = jsonl("d.jsonl", [{"instruction": "q", "context": "c", "response": "r", "category": "open_qa"}])
    (row,) = read_pool(f"dolly:{dolly}", role=role, prompts_only=role == "benign").rows
    assert (row["instruction"], row["input"], row["output"]) == ("q", "c", "r")
    sums = jsonl("g.jsonl", [{"question": "2 + 2?", "answer": "#### 4"}])
    assert len(read_pool(f"gsm8k:{sums}", role=role).rows) == 1


def test_only_the_last_answer_is_trained(jsonl):
    talk = {
        "messages": [USER, ANSWER, {"role": "user", "content": "c"}, {"role": "assistant", "content": "d"}]
    }
    path = jsonl("x.jsonl", [talk, {"messages": ONE}])
    both = [data.alignment_rows(source=path, seed=1, loss_on=loss_on) for loss_on in ("all", "last")]
    plain, last = ([row for row in made.rows if "messages" in row] for made in both)
    assert [turn.get("weight") for turn in plain[0]["messages"]] == [None] * 4
    assert [turn.get("weight") for turn in last[0]["messages"]] == [None, 0, None, None]
    assert plain[0]["id"] == last[0]["id"], "the rows are drawn alike"
    assert [made.manifest["loss_on"] for made in both] == ["all", "last"]
