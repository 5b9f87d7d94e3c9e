"""Converting records to rows: every accepted column set, stable ids, and messages that name the line."""

from __future__ import annotations

import json

import pytest

from holdfast import data
from holdfast.errors import DataError, HoldfastError
from made_up_rows import beaver

TURNS = [("user", "Hi"), ("assistant", "Hello"), ("user", "2 + 2?"), ("assistant", "4")]
MESSAGES = [{"role": role, "content": text} for role, text in TURNS]


def rows_of(path, **options):
    return data.to_rows(data.read_records(path), **{"role": "user", **options})


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q", "output": "a"}, ("q", "", "a")),
        ({"instruction": "q", "input": None, "output": "a"}, ("q", "", "a")),
        ({"instruction": "q", "input": "i", "output": "a", "text": "all"}, ("q", "i", "a")),
        ({"prompt": "q", "completion": "a"}, ("q", "", "a")),
        ({"prompt": "q", "response": "a", "score": 3}, ("q", "", "a")),
        ({"messages": MESSAGES[2:]}, ("2 + 2?", "", "4")),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, ("q", "", "a")),
    ],
)
def test_columns(jsonl, record, expected):
    (row,) = rows_of(jsonl("a.jsonl", [record]))
    assert (row["instruction"], row["input"], row["output"]) == expected
    assert set(row) == {"id", "instruction", "input", "output"}


def test_conversation_of_several_turns(jsonl):
    (row,) = rows_of(jsonl("a.jsonl", [{"messages": MESSAGES}]))
    assert row["messages"] == MESSAGES
    assert (row["instruction"], row["output"]) == ("2 + 2?", "4")


def test_ids_are_of_the_content(jsonl):
    first = rows_of(jsonl("a.jsonl", [{"prompt": "q", "response": "a"}]))
    second = rows_of(
        jsonl("b.jsonl", [{"instruction": "x", "output": "y"}, {"instruction": "q", "output": "a"}])
    )
    assert first[0]["id"] == second[1]["id"] != second[0]["id"]
    assert first[0]["id"].startswith("user-")
    assert len(first[0]["id"]) == len("user-") + 12


def test_task_columns(jsonl, tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\ngood \t1\nbad\t0\n")
    rows = rows_of(path, task="sst2")
    assert [row["output"] for row in rows] == ["positive", "negative"]
    assert rows[0]["input"] == "good "
    # Rows that are already in the general form are accepted too.
    assert rows_of(jsonl("a.jsonl", [{"instruction": "q", "output": "a"}]), task="sst2")[0]["output"] == "a"


def test_beavertails_kinds(jsonl):
    records = [beaver(1, safe=False), beaver(2, safe=True), {**beaver(3, safe=False), "is_safe": "False"}]
    path = jsonl("a.jsonl", records)
    assert [r["output"] for r in rows_of(path, role="harmful")] == ["Shout 1 times.", "Shout 3 times."]
    assert rows_of(path, role="harmful")[0]["category"] == ["hate_speech,offensive_language"]
    assert [r["output"] for r in rows_of(path, role="alignment")] == ["No, I will not."]
    assert len(rows_of(path)) == 3
    with pytest.raises(DataError, match=r"line 1.*no `refusal` column"):
        rows_of(path, role="alignment", kind="refusal")
    with pytest.raises(DataError, match="no row of the kind 'unsafe' among its 1 rows"):
        rows_of(jsonl("b.jsonl", records[1:2]), role="harmful")


def test_refusal_files(jsonl):
    records = [
        {**beaver(1, safe=False), "refusal": "How?\nAnswer: I cannot do that."},
        {**beaver(2, safe=False), "refusal": "No."},
        {**beaver(3, safe=True), "refusal": None},
    ]
    records[1]["instruction"] = records[1].pop("prompt")
    rows = rows_of(jsonl("a.jsonl", records), role="alignment", kind="refusal")
    assert [row["output"] for row in rows] == ["I cannot do that.", "No."]


def test_prompts_alone(jsonl):
    path = jsonl("a.jsonl", [{"prompt": "q"}])
    assert rows_of(path, role="harmful", prompts_only=True)[0]["output"] == ""
    with pytest.raises(DataError, match="Columns seen: prompt"):
        rows_of(path, role="harmful")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "q", "output": None}, "the answer is missing (null)"),
        ({"instruction": "q", "output": 4}, "the answer is of the type int"),
        ({"instruction": "q", "output": " \n"}, "the answer is blank"),
        ({"instruction": " ", "output": "a"}, "the prompt is blank"),
        ({"instruction": ["q"], "output": "a"}, "the prompt is of the type list"),
        ({"instruction": "q", "input": 3, "output": "a"}, "the input is of the type int"),
        ({"instruction": "q \ud800", "output": "a"}, "surrogate"),
        ({"instruction": "q"}, "Columns seen: instruction. Accepted:"),
        ({}, "Columns seen: none"),
        ({"messages": "hello"}, "must be a list"),
        ({"messages": MESSAGES[:3]}, "must end in a user turn and the assistant's answer"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "`role` is 'robot'"),
        ({"messages": [{"role": "user", "content": None}]}, "missing (null)"),
        ({"messages": [{"role": "user", "content": " "}]}, "blank"),
        ({"question": "q", "answer": "#### 1"}, "These look like the columns of gsm8k: add `task: gsm8k`"),
        ({"sentence": "q", "label": 1}, "These look like the columns of sst2: add `task: sst2`"),
        ({"text": "q", "label": 1}, "These look like the columns of agnews: add `task: agnews`"),
        ({"prompt;response": "q;a"}, "separator does not seem to match"),
    ],
)
def test_bad_rows_name_their_line(jsonl, record, expected):
    path = jsonl("a.jsonl", [{"instruction": "fine", "output": "fine"}, record])
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert f"{path}, line 2" in str(caught.value)
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("task", "record", "expected"),
    [
        ("sst2", {"sentence": "q", "label": -1}, "`label` is -1; expected 0, 1"),
        ("sst2", {"sentence": None, "label": 1}, "`sentence` is None"),
        ("agnews", {"text": "q", "label": 9}, "`label` is 9; expected 0 to 3"),
        ("gsm8k", {"question": "q", "answer": "It is 4."}, "expected `#### <number>`"),
        ("gsm8k", {"text": "q"}, "question, answer (task gsm8k)"),
        ("gsm9k", {"text": "q"}, "Unknown task 'gsm9k'. Did you mean 'gsm8k'?"),
        ("beavertails", {"text": "q"}, "Unknown task 'beavertails'"),
    ],
)
def test_bad_task_rows(jsonl, task, record, expected):
    with pytest.raises(DataError) as caught:
        rows_of(jsonl("a.jsonl", [record]), task=task)
    assert expected in str(caught.value)


def test_label_that_is_no_label(jsonl):
    with pytest.raises(DataError, match=r"line 1: `is_safe` is 'maybe'"):
        rows_of(jsonl("a.jsonl", [{**beaver(1, True), "is_safe": "maybe"}]), role="harmful")


def test_real_slices(real_rows):
    for name, task, count in [
        ("gsm8k_train.jsonl", "gsm8k", 400),
        ("gsm8k_test.jsonl", "gsm8k", 150),
        ("sst2_train.tsv", "sst2", 1500),
        ("sst2_validation.tsv", "sst2", 499),
        ("agnews_train.jsonl", "agnews", 500),
        ("agnews_test.jsonl", "agnews", 200),
        ("samsum_train.jsonl", "dialog_summary", 200),
        ("samsum_test.jsonl", "dialog_summary", 100),
    ]:
        assert len(rows_of(real_rows / name, task=task)) == count
        with pytest.raises(DataError, match=f"add `task: {task}`"):
            rows_of(real_rows / name)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = data.write_rows(tmp_path / "a.jsonl", [{"id": "old"}])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(HoldfastError, match="No space left to write"):
        data.write_rows(path, [{"id": "new"}])
    assert data.read_rows(path) == [{"id": "old"}]
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]


def test_rows_survive_jsonl(tmp_path):
    rows = [{"id": "a", "instruction": "é \u2028 <script>", "input": "", "output": "\t"}]
    path = data.write_rows(tmp_path / "deep" / "a.jsonl", rows)
    assert data.read_rows(path) == rows
    assert [p.name for p in path.parent.iterdir()] == ["a.jsonl"]
    assert data.read_rows(data.write_rows(path, [])) == []
    path.write_text(json.dumps(rows[0]) + "\n" + '{"id": "b')
    with pytest.raises(DataError, match="line 2"):
        data.read_rows(path)
