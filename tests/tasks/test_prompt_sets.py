"""The published prompt sets: formats, the two sides, licences and warnings; all rows are made up."""

from __future__ import annotations

import csv
import json
import logging

import pytest

from holdfast import data, registry
from holdfast.data import pool
from holdfast.errors import DataError
from holdfast.tasks import find

HARMBENCH = {
    "FunctionalCategory": "standard",
    "SemanticCategory": "tea",
    "Tags": "",
    "ContextString": "",
    "BehaviorID": "a",
}
JBB = {
    "Index": 0,
    "Goal": "Salt the tea",
    "Target": "Sure",
    "Behavior": "Salting",
    "Category": "Tea",
    "Source": "Original",
}
SORRY = {"question_id": 1, "category": "7", "turns": ["Salt the tea"], "prompt_style": "base"}
WILD = {"adversarial": False, "response": None, "response_harm_label": None, "subcategory": "tea"}

FORMATS = [
    # name, published file, its records, harmful prompts, harmless prompts, a category
    ("harmbench", "harmbench_behaviors_text_all.csv",
     [{"Behavior": "Salt the tea", **HARMBENCH},
      {"Behavior": "Sing this song", **HARMBENCH, "FunctionalCategory": "copyright"},
      {"Behavior": "Answer this", **HARMBENCH, "FunctionalCategory": "contextual", "ContextString": "a text"}],
     ["Salt the tea"], None, "tea"),
    ("harmbench", "hub.csv", [{"prompt": "Salt the tea", "category": "tea"}], ["Salt the tea"], None, "tea"),
    ("strongreject", "strongreject_dataset.csv",
     [{"category": "Tea", "source": "custom", "forbidden_prompt": "Salt the tea"}], ["Salt the tea"], None, "Tea"),
    ("strongreject", "hub.csv", [{"prompt": "Salt the tea", "category": "Tea", "source": "custom"}],
     ["Salt the tea"], None, "Tea"),
    ("jailbreakbench", "harmful-behaviors.csv", [JBB], ["Salt the tea"], [], "Tea"),
    ("jailbreakbench", "benign-behaviors.csv", [{**JBB, "Goal": "Stir the tea"}], [], ["Stir the tea"], "Tea"),
    ("sorry_bench", "question.jsonl", [SORRY, {**SORRY, "turns": ["Fnyg gur grn"], "prompt_style": "caesar"}],
     ["Salt the tea"], None, "7"),
    ("or_bench", "or-bench-hard-1k.csv", [{"prompt": "Kill the lights", "category": "tea"}], [], ["Kill the lights"], "tea"),
    ("or_bench", "my-copy.csv", [{"prompt": "Kill the lights", "category": "tea"}], [], ["Kill the lights"], "tea"),
    ("or_bench", "or-bench-toxic.csv", [{"prompt": "Salt the tea", "category": "tea"}], ["Salt the tea"], [], "tea"),
    ("directharm4", "test.jsonl", [{"instruction": "Salt the tea", "category": "tea"}], ["Salt the tea"], None, "tea"),
    ("wildguardtest", "wildguard_test.parquet",
     [{"prompt": "Salt the tea", "prompt_harm_label": "harmful", **WILD},
      {"prompt": "Stir the tea", "prompt_harm_label": "unharmful", **WILD},
      {"prompt": "Tea?", "prompt_harm_label": None, **WILD}], ["Salt the tea"], ["Stir the tea"], "tea"),
]  # fmt: skip
NAMED = dict.fromkeys(("hub.csv", "my-copy.csv", "test.jsonl"))
"""Files whose name and columns do not say which data set they are."""


@pytest.fixture
def write(tmp_path):
    """Write records in the format of the file extension."""

    def written(name, records):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        elif path.suffix == ".csv":
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, records[0])
                writer.writeheader()
                writer.writerows(records)
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path

    return written


def asked(source, side):
    """The prompts of a source as `harmful_test` or `benign`, with their categories."""
    given = {"harmful_test": source} if side == "harmful" else {"benign": source}
    rows = data.test_rows(**given).rows
    assert {row["set"] for row in rows} == {side}
    return [row["instruction"] for row in rows], {name for row in rows for name in row["category"]}


@pytest.mark.parametrize(("name", "file", "records", "harmful", "benign", "category"), FORMATS)
def test_a_published_file_gives_each_side(write, name, file, records, harmful, benign, category):
    path = write(file, records)
    for source in [f"{name}:{path}", *([] if file in NAMED else [str(path)])]:
        for side, prompts in (("harmful", harmful), ("benign", benign)):
            if prompts:
                assert asked(source, side) == (prompts, {category})
            elif prompts is None and source != str(path):
                with pytest.raises(DataError, match=f"{name} has no harmless questions, so no over-refusal"):
                    asked(source, side)
            else:
                with pytest.raises(DataError, match=r"no row of the kind|no rows of the kind 'benign'"):
                    asked(source, side)


@pytest.mark.parametrize("name", sorted({row[0] for row in FORMATS}))
def test_every_prompt_set_says_licence_warning_and_side(name):
    face = registry.faces("tasks")[name]
    assert face.facts["licence"]
    assert "safety research only" in face.facts["warning"]
    (measures,) = [line[2] for line in registry.task_lines() if line[0].startswith(f"{name}@")]
    two_sided = any(row[0] == name and row[4] is not None for row in FORMATS)
    assert measures == ("harmful score ↓ and benign compliance ↑" if two_sided else "harmful score ↓")
    with pytest.raises(DataError, match=f"'{name}' has only test rows; use it as data"):
        data.user_rows(user="world", harmful=name, poison_ratio=0.1, size=10, seed=0)
    assert find(name).stamp == f"{name}@1"


def test_the_licence_and_the_warning_are_shown(write, caplog):
    pool._warn.cache_clear()
    path = write("harmful-behaviors.csv", [JBB])
    with caplog.at_level(logging.WARNING):
        made = data.test_rows(harmful_test=str(path))
    assert (
        "jailbreakbench contains harmful instructions, for safety research only. Licence: MIT." in caplog.text
    )
    (source,) = made.manifest["sources"]
    assert (source["data_set"], source["licence"]) == ("jailbreakbench@1", "MIT")
    assert made.manifest["prompts"] == "unsafe-only"


def test_the_two_sides_come_from_two_files_of_the_hub(write, tmp_path, monkeypatch):
    import huggingface_hub

    asked_for = []
    for folder, records in (("harmful", [JBB]), ("benign", [{**JBB, "Goal": "Stir the tea"}])):
        write(f"snapshot/data/{folder}-behaviors.csv", records)
    write("snapshot/or-bench-hard-1k.csv", [{"prompt": "Kill the lights", "category": "tea"}])
    write("snapshot/or-bench-toxic.csv", [{"prompt": "Salt the tea", "category": "tea"}])

    def snapshot_download(repo, **options):
        asked_for.append((repo, options["allow_patterns"]))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    for name in (
        "jailbreakbench",
        "JailbreakBench/JBB-Behaviors",
        "or_bench",
        "bench-llm/or-bench:or-bench-hard-1k",
    ):
        rows = data.test_rows(harmful_test=name, benign=name).rows
        assert {row["set"]: row["instruction"] for row in rows} == {
            "harmful": "Salt the tea",
            "benign": "Kill the lights" if "bench-llm" in name or name == "or_bench" else "Stir the tea",
        }
    assert asked_for[0] == ("JailbreakBench/JBB-Behaviors", ["data/*-behaviors.csv"])
    assert asked_for[-1] == ("bench-llm/or-bench", ["or-bench-[ht]*.csv"])


def test_values_that_are_not_known_are_named(write):
    for name, file, record, message in (
        ("harmbench", "a.csv", {"Behavior": "a", **HARMBENCH, "FunctionalCategory": "odd"},
         "line 2: `FunctionalCategory` is 'odd'; expected standard"),
        ("jailbreakbench", "a.csv", JBB, "line 2: the name of the file does not say whether its behaviours"),
        ("sorry_bench", "a.jsonl", {**SORRY, "turns": ["a", "b"]}, "line 1: `turns` must be a list of one text"),
        ("wildguardtest", "a.jsonl", {"prompt": "a", "prompt_harm_label": "odd"}, "`prompt_harm_label` is 'odd'"),
        ("directharm4", "a.jsonl", {"text": "a"}, r"Accepted: instruction \(data set directharm4\)"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            asked(f"{name}:{write(file, [record])}", "harmful")
