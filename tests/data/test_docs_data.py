"""The page on data: its files are read as described, and its Python prints the output that it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from holdfast import data
from holdfast.data.files import SUFFIXES
from holdfast.data.rows import COLUMN_SETS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
FILES = re.findall(r"<!-- file: (\S+), (.+?) -->\n```\w+\n(.*?)```", PAGE, re.DOTALL)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with every file that the page shows."""
    for name, _, text in FILES:
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "options"), [(name, options) for name, options, _ in FILES])
def test_files(folder, name, options):
    given = dict(option.split(": ") for option in options.split(", "))
    loaded = data.read_records(name)
    rows = data.to_rows(loaded, **{k: v == "true" if k == "prompts_only" else v for k, v in given.items()})
    assert len(rows) == (1 if name == "labelled.jsonl" else len(loaded.records))


def test_python(folder, capsys):
    at = next(i for i, (language, _) in enumerate(BLOCKS) if language == "python")
    exec(BLOCKS[at][1], {})
    assert capsys.readouterr().out == BLOCKS[at + 1][1]


def test_recipe_names_files_of_the_page(folder):
    recipe = yaml.safe_load(BLOCKS[0][1])["data"]
    aligned = data.alignment_rows(**recipe["alignment"], seed=1)
    assert aligned.manifest["size"] == 2
    same = {"user": recipe["user"], "harmful": recipe["harmful"]}
    assert data.test_rows(**same).manifest["harmful"] == 1
    assert 0 < recipe["poison_ratio"] < 0.34, "a third, because the files of the page have three rows"
    assert data.user_rows(**same, poison_ratio=0.34, seed=1).manifest["benign"] == 2


def test_nothing_is_left_out():
    for suffix in SUFFIXES:
        assert f"`{suffix}`" in PAGE
    for columns in COLUMN_SETS:
        for name in re.findall(r"\w+", columns.split(" (")[0]):
            assert f"`{name}`" in PAGE
