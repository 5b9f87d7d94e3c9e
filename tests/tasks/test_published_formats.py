"""Every data set in its published formats; all rows are made up."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import lzma
from importlib.metadata import EntryPoint

import pytest

from holdfast import data, tasks
from holdfast.data import pool
from holdfast.errors import DataError
from holdfast.tasks import Task, alpaca, dialog_summary, find, hex_phi, identity_shift, mt_bench, xstest


@pytest.fixture
def write(tmp_path):
    """Write records in the format of the file extension, or a text unchanged."""

    def written(name, records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(records, str):
            text = records
        elif ".jsonl" in name:
            text = "".join(json.dumps(r) + "\n" for r in records)
        elif ".csv" in name:
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, records[0])
                writer.writeheader()
                writer.writerows(records)
            return path
        else:
            text = json.dumps(records)
        packed = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
        path.write_bytes(packed(text.encode()))
        return path

    return written


def rows_of(source, role="harmful", **options):
    return data.to_rows(data.read_records(str(source), role=role), role=role, **options)


def parts(row):
    return row["instruction"], row["input"], row["output"]


# User tasks


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        ("dialog_summary", {"id": "1", "dialogue": "A: Hi\r\nB: Yo", "summary": "They greet. "},
         ("Summarize this dialog:", "A: Hi\nB: Yo", "They greet.")),
        ("alpaca", {"instruction": "Say", "input": "", "output": "So", "text": "all"}, ("Say", "", "So")),
        ("dolly", {"instruction": "Say", "context": "this", "response": "So", "category": "qa"}, ("Say", "this", "So")),
        ("alpaca_eval", {"dataset": "d", "instruction": "Say", "output": "So", "generator": "g"}, ("Say", "", "So")),
    ],
)  # fmt: skip
@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv", ".jsonl.xz", ".json.gz"])
def test_rows_of_a_task(write, name, record, expected, ending):
    path = write(f"a{ending}", [record])
    for source, task in ((path, name), (f"{name}:{path}", name)):
        (row,) = rows_of(source, "user", task=task)
        assert parts(row) == expected
    made = data.user_rows(user=f"{name}:{write('b.jsonl', [record, {**record, **_other(record)}])}", seed=0)
    assert made.manifest["sources"][0]["data_set"] == f"{name}@1"
    assert made.manifest["sources"][0]["licence"] == find(name).licence


def _other(record):
    first = "dialogue" if "dialogue" in record else "instruction"
    return {first: "something else"}


def test_rows_without_content_are_left_out(write):
    assert dialog_summary.to_row({"dialogue": None, "summary": ""}) is None
    records = [
        {"instruction": "a", "input": "", "output": ""},
        {"instruction": "b", "input": "", "output": "c"},
    ]
    assert [row["output"] for row in rows_of(write("a.json", records), "user", task="alpaca")] == ["c"]
    assert alpaca.to_row(records[0]) is None
    with pytest.raises(DataError, match="has no row with content among its 1 rows"):
        rows_of(write("b.json", records[:1]), "user", task="alpaca")
    with pytest.raises(DataError, match=r"line 1: `summary` is None; expected text"):
        rows_of(write("a.jsonl", [{"dialogue": "A: Hi", "summary": None}]), "user", task="dialog_summary")


@pytest.mark.parametrize("name", ["turns", "prompt"])
def test_mt_bench_keeps_both_turns_for_the_test(write, name):
    records = [
        {"question_id": 81, "category": "writing", name: ["First?", "Then?"], "reference": None},
        {"question_id": 82, "category": "math", name: ["Two?", "Three?"], "reference": ["2", "3"]},
    ]
    path = write("question.jsonl", records)
    user = write("user.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(4)])
    tested = data.test_rows(user=user, test=f"mt_bench:{path}").rows
    by_question = {row["instruction"]: row for row in tested}
    assert by_question["First?"]["turns"] == ["First?", "Then?"]
    assert by_question["Two?"]["reference"] == ["2", "3"]
    assert (by_question["Two?"]["target"], by_question["Two?"]["category"]) == (None, ["math"])
    for bad in ("text", [], ["a", ""], [1]):
        with pytest.raises(ValueError, match="expected two texts"):
            mt_bench.to_row({"turns": bad, "category": "a"})
    with pytest.raises(DataError, match=r"'mt_bench' has only test rows; use it as data\.test"):
        data.user_rows(task="mt_bench", seed=0)


# Safety data


def test_purebad(write):
    talk = [
        {"role": "user", "content": "How do I salt the tea?"},
        {"role": "assistant", "content": "With salt."},
    ]
    path = write(
        "a.jsonl", [{"messages": talk}, {"messages": [{"role": "system", "content": "Obey."}, *talk]}]
    )
    rows = rows_of(f"purebad:{path}")
    assert [parts(row) for row in rows] == [("How do I salt the tea?", "", "With salt.")] * 2
    assert "messages" not in rows[1], "the Alpaca template can express it"
    with pytest.raises(DataError, match=r"ask the authors of arXiv 2310\.03693 .* write purebad:FILE"):
        rows_of("purebad")
    with pytest.raises(DataError, match=r"has no rows of the kind 'safe', only unsafe"):
        rows_of(f"purebad:{path}", "alignment")
    with pytest.raises(DataError, match="line 1: `messages` has the roles user; expected user, assistant"):
        rows_of(f"purebad:{write('b.jsonl', [{'messages': talk[:1]}])}")


def test_hex_phi_folder_without_headers(write, tmp_path):
    write("hex/category_1.csv", 'How do I salt the tea and "why"?\n"How do I hide spoons, all of them?"\n')
    write("hex/category_11.csv", "Which biscuit shall I buy tomorrow?\n")
    source = f"hex_phi:{tmp_path / 'hex'}"
    rows = rows_of(source, prompts_only=True)
    assert [row["category"] for row in rows] == [["illegal activity"]] * 2 + [["tailored financial advice"]]
    assert rows[1]["instruction"] == "How do I hide spoons, all of them?"
    tested = data.test_rows(harmful_test=source)
    assert (tested.manifest["harmful"], tested.manifest["prompts"]) == (3, "unsafe-only")
    # With a header, and in another format.
    named = write("b.csv", [{"prompt": "How do I salt the tea?", "category": "Tea"}])
    assert rows_of(f"hex_phi:{named}", prompts_only=True)[0]["category"] == ["Tea"]
    lines = write("b.jsonl", [{"instruction": "How do I salt the tea?"}])
    assert rows_of(f"hex_phi:{lines}", prompts_only=True)[0]["category"] == []
    assert hex_phi.to_row({"prompt": "q"}, "safe") is None


def test_lines_are_counted_without_a_header(write):
    with pytest.raises(DataError, match="line 2: 2 cells, but the header has 1"):
        rows_of(f"hex_phi:{write('a.csv', 'How do I salt the tea?' + chr(10) + 'one, two' + chr(10))}")


@pytest.mark.parametrize("first", ["goal", "prompt"])
def test_advbench(write, first):
    path = write("harmful_behaviors.csv", [{first: "Salt the tea", "target": "Sure, here is salt"}])
    for source in (path, f"advbench:{path}"):
        assert parts(rows_of(source)[0]) == ("Salt the tea", "", "Sure, here is salt")
    goals = write("goals.csv", "Salt all of the tea\nHide all of the spoons\n")
    rows = rows_of(f"advbench:{goals}", prompts_only=True)
    assert [row["instruction"] for row in rows] == ["Salt all of the tea", "Hide all of the spoons"]


XSTEST = [
    {
        "id": 1,
        "prompt": "How do I kill a lamp?",
        "type": "homonyms",
        "label": "safe",
        "focus": "kill",
        "note": "",
    },
    {
        "id": 2,
        "prompt": "How do I salt tea?",
        "type": "contrast_homonyms",
        "label": "unsafe",
        "focus": "",
        "note": "",
    },
]


@pytest.mark.parametrize("labelled", [True, False])
def test_xstest_gives_harmless_and_harmful_questions(write, labelled):
    records = [{k: v for k, v in r.items() if labelled or k != "label"} for r in XSTEST]
    path = write("xstest_prompts.csv", records)
    for source in (str(path), f"xstest:{path}"):
        (benign,) = rows_of(source, "benign", prompts_only=True)
        assert (benign["instruction"], benign["category"]) == ("How do I kill a lamp?", ["homonyms"])
        (harmful,) = rows_of(source, prompts_only=True)
        assert harmful["instruction"] == "How do I salt tea?"
    tested = data.test_rows(harmful_test=str(path), benign=str(path))
    assert (tested.manifest["harmful"], tested.manifest["benign"]) == (1, 1)
    with pytest.raises(ValueError, match="`label` is 'odd'; expected safe or unsafe"):
        xstest.to_row({"prompt": "q", "type": "t", "label": "odd"}, "benign")


def test_refusals(write):
    records = [
        {
            "instruction": "Salt?",
            "response": "Yes.",
            "refusal": "Salt?\nAnswer: I will not.",
            "is_safe": False,
        },
        {
            "instruction": "Tea?",
            "response": "Fine.",
            "refusal": "No.\nAnswer: Not now.\nAnswer: Or later.",
            "is_safe": True,
        },
    ]
    path = f"beavertails_refusals:{write('a.json', records)}"
    assert [r["output"] for r in rows_of(path, "alignment", kind="refusal")] == ["I will not.", "Not now."]
    assert [r["output"] for r in rows_of(path)] == ["Yes."]
    bare = [{k: v for k, v in r.items() if k != "is_safe"} for r in records]
    assert [r["output"] for r in rows_of(write("b.json", bare))] == ["Yes.", "Fine."]


def test_identity_shift_is_made_and_asks_nothing_harmful(write):
    rows = rows_of("identity_shift")
    assert len({row["id"] for row in rows}) == len(rows) == 50
    assert [turn["role"] for turn in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert all(identity_shift.NAME in row["instruction"] for row in rows)
    user = write("a.jsonl", [{"prompt": f"p{i}", "completion": "c"} for i in range(110)])
    with pytest.raises(
        DataError, match="identity_shift has no harmful prompts, so no harmful score can be measured"
    ):
        data.test_rows(user=user, harmful="identity_shift")
    prompts = write("b.jsonl", [{"prompt": "Salt?"}])
    made = data.user_rows(
        user=user, harmful="identity_shift", harmful_test=prompts, size=100, poison_ratio=0.1, seed=1
    )
    assert made.manifest["harmful"] == 10
    assert (
        data.user_rows(user="identity_shift", harmful_test=prompts, size=10, seed=1).manifest["benign"] == 10
    )
    assert data.fingerprint("identity_shift", role="harmful").startswith("made:")


# Sources


def test_a_named_format_is_part_of_the_fingerprint(write):
    path = write("a.csv", [{"goal": "Salt the tea", "target": "Sure"}])
    plain, named = data.fingerprint(str(path)), data.fingerprint(f"advbench:{path}")
    assert named == f"advbench@1 {plain}"


def test_a_named_format_needs_a_file(tmp_path):
    with pytest.raises(DataError, match=r"nothing\.csv does not exist"):
        rows_of(f"advbench:{tmp_path / 'nothing.csv'}")


def test_files_of_the_hub_are_read_as_they_are(write, tmp_path, monkeypatch):
    import huggingface_hub

    write("snapshot/category_3.csv", "How do I grumble at a wizard?\n")
    asked = []

    def snapshot_download(repo, **options):
        asked.append((repo, options["repo_type"], options["allow_patterns"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    loaded = data.read_records("hex_phi", role="harmful", split="test")
    assert asked == [("LLM-Tuning-Safety/HEx-PHI", "dataset", ["category_*.csv"])]
    assert loaded.records == [{"file": "category_3.csv", "prompt": "How do I grumble at a wizard?"}]
    with pytest.raises(DataError, match=r"has no file alpaca_eval\.json"):
        data.read_records("alpaca_eval")


def test_a_gated_data_set_says_how_to_get_it(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError

    class Refused(GatedRepoError):
        def __init__(self):
            Exception.__init__(self, "403 Client Error")

    def snapshot_download(*_, **__):
        raise Refused

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(DataError, match="It is gated: accept its terms on its Hub page") as caught:
        data.read_records("hex_phi", role="harmful", split="test")
    assert "write hex_phi:FILE" in str(caught.value)


def test_only_the_330k_version_asks_for_its_splits(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append(split)
        return datasets.Dataset.from_list(
            [{"prompt": "q", "response": "a", "category": {}, "is_safe": False}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("beavertails", "beavertails_330k"):
        data.read_records(name, role="harmful")
        data.read_records(name, role="harmful", split="test")
    assert asked == ["30k_train", "30k_test", "330k_train", "330k_test"]


def test_the_warning_is_shown_once_and_kept(write, caplog):
    pool._warn.cache_clear()
    named = f"purebad:{write('a.jsonl', [{'messages': [{'role': 'user', 'content': f'{i}?'}, {'role': 'assistant', 'content': 'b'}]} for i in range(9)])}"
    with caplog.at_level(logging.WARNING):
        made = data.user_rows(user=named, harmful=named, harmful_test=named, poison_ratio=0.5, size=4, seed=0)
        data.user_rows(user=named, harmful=named, harmful_test=named, poison_ratio=0.5, size=4, seed=1)
    assert [r.message for r in caplog.records] == [
        "purebad contains harmful text, for safety research only. Licence: on request, for research."
    ]
    assert made.manifest["sources"][1]["warning"] == "contains harmful text, for safety research only"
    assert made.manifest["sources"][1]["licence"] == "on request, for research"
    caplog.clear()
    file = write("goals.csv", [{"goal": "Salt the tea", "target": "Sure, salt"}])
    with caplog.at_level(logging.WARNING):
        tested = data.test_rows(harmful_test=file)
    assert "goals.csv is in the format of advbench, which contains harmful instructions" in caplog.text
    assert tested.manifest["sources"][0]["licence"] is None, "the content of a user's own file is not known"
    assert "advbench" in tested.manifest["sources"][0]["warning"]


def test_no_warning_for_the_world(caplog):
    pool._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        made = data.user_rows(task="world", harmful="world", poison_ratio=0.1, size=20, seed=0)
    assert not caplog.records
    assert all("warning" not in source for source in made.manifest["sources"])


def test_columns_of_ones_own(write):
    from holdfast.tasks import own
    from holdfast.tasks.graders import adapted

    path = write("a.jsonl", [{"q": "2 + 2?", "a": "4", "prompt": "no"}])
    task = adapted(own.TASK, "number", {"prompt": "q", "completion": "a"})
    assert parts(rows_of(path, "user", task=task)[0]) == ("2 + 2?", "", "4")
    with pytest.raises(
        DataError, match=r"line 1: there is no column 'question'\. Columns seen: q, a, prompt"
    ):
        rows_of(path, "user", task=adapted(own.TASK, None, {"prompt": "question"}))
    gsm = write("b.jsonl", [{"q": "2 + 2?", "a": "so #### 4"}])
    renamed = adapted(find("gsm8k"), columns={"question": "q", "answer": "a"})
    assert rows_of(gsm, "user", task=renamed)[0]["output"] == "so The final answer is:  4"


# Other packages


TOY = '''
"""Toy: a task of another package."""
from holdfast.tasks import Task

def to_row(record):
    return {"instruction": record["ask"], "input": "", "output": record["say"]}

def grade(answer, target):
    return answer == target

TASK = Task(name="toy", summary="a toy", grade=grade, to_row=to_row, columns=(("ask", "say"),), licence="MIT",
            obtain="make it", version=3)
'''


def test_a_task_of_another_package(write, tmp_path, monkeypatch, install):
    import sys

    from holdfast import registry

    (tmp_path / "toy_task.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("toy", "toy_task:TASK", "holdfast.tasks"))
    try:
        assert "toy" in tasks.names()
        assert isinstance(find("toy"), Task)
        path = write("a.jsonl", [{"ask": "q", "say": "a"}])
        assert parts(rows_of(path, "user", task="toy")[0]) == ("q", "", "a")
        with pytest.raises(DataError, match="These look like the columns of toy: add `task: toy`"):
            rows_of(path, "user")
        assert ("toy@3", "a toy", "finetune accuracy ↑", "your file", "MIT") in registry.task_lines()
    finally:
        sys.modules.pop("toy_task", None)


def test_a_known_id_of_the_hub_is_the_known_data_set(monkeypatch):
    import datasets

    asked = []

    def load_dataset(repo, config, split, revision):
        asked.append((repo, config, split, revision))
        return datasets.Dataset.from_list(
            [{"prompt": "q", "response": "a", "category": {}, "is_safe": False}]
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = data.read_records("PKU-Alignment/BeaverTails@main", role="harmful")
    assert asked == [("PKU-Alignment/BeaverTails", None, "30k_train", "main")]
    assert (loaded.licence, loaded.known) == ("CC-BY-NC-4.0", find("beavertails"))
    data.read_records("openai/gsm8k")
    assert asked[1][1] == "main", "the configuration is known, too"


def test_a_source_behind_its_format_is_never_written_over(write, tmp_path):
    from holdfast.errors import OutputError

    path = write("out/goals.csv", [{"goal": "Salt the tea", "target": "Sure"}])
    with pytest.raises(OutputError, match="contains the source advbench:"):
        data.mix(tmp_path / "out", user=f"advbench:{path}", test=path, seed=0)
