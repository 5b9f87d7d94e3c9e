"""The page on tasks: its table equals the registry, its task works, and its recipes are valid."""

from __future__ import annotations

import re
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml

from holdfast import data, registry, tasks
from holdfast.recipe import Recipe, packaged
from holdfast.tasks.graders import GRADERS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tasks.md").read_text(encoding="utf-8")
WRITTEN = re.findall(r"`(data: \{(?!task: capitals).*?\}|alignment: \{.*?\})`", PAGE)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


def test_the_table_is_that_of_the_registry():
    shown = re.findall(r"^\| `\w+@\d+` \|.*$", PAGE, re.MULTILINE)
    assert shown == [f"| `{stamp}` | {' | '.join(rest)} |" for stamp, *rest in registry.task_lines()]


def test_every_grader_and_protocol_is_named():
    for grader in GRADERS:
        assert re.search(rf"^\| `{grader}`", PAGE, re.MULTILINE), grader
    for name, protocol in packaged.protocols().items():
        if protocol.block:
            options = packaged.evaluation(name)
            (line,) = re.findall(rf"^\| `{name}` \|.*$", PAGE, re.MULTILINE)
            assert line.startswith(f"| `{name}` | {options['prompts']}, ")
            task = f", task {options['task_new_tokens']}" if "task_new_tokens" in options else ""
            assert f"| {options['max_new_tokens']}{task} |" in line
            first = options.get("take") == "first"
            assert ("the first" in line or "as in" in line) is first


@pytest.mark.parametrize("text", WRITTEN)
def test_what_to_write_is_a_recipe(text):
    given = yaml.safe_load(text.replace(", ...}", "}").replace("FILE", "my.jsonl"))
    given = given.get("data", given)
    if {"poison_ratio", "test_harmful", "benign"} & set(given):
        given.setdefault("user", "my.jsonl")
    given.setdefault("task", "sst2") if "user" not in given else None
    assert Recipe.load({"model": "m", "data": given, "alignment": "none"})


def test_the_recipe_of_ones_own_task():
    raw = yaml.safe_load(next(text for language, text in BLOCKS if language == "yaml"))
    asked = Recipe.load(raw)
    assert asked.data.columns == {"prompt": "q", "completion": "a"}
    assert asked.data.grader == "number"


def test_the_task_in_code_works(tmp_path, monkeypatch, install):
    (tmp_path / "capitals.py").write_text(next(text for language, text in BLOCKS if language == "python"))
    monkeypatch.syspath_prepend(tmp_path)
    install(EntryPoint("capitals", "capitals:TASK", "holdfast.tasks"))
    try:
        path = tmp_path / "my.csv"
        path.write_text("country,capital\nPeru,Lima\nMali,Bamako\n")
        tested = data.test_rows(user=path, task="capitals", test=path).rows
        assert {row["target"] for row in tested} == {"Lima", "Bamako"}
        assert tasks.find("capitals").grade(" lima", "Lima")
        asked = {"task": "capitals", "user": str(path)}
        assert Recipe.load({"model": "m", "data": asked, "alignment": "none"}).data.task == "capitals"
    finally:
        sys.modules.pop("capitals", None)
