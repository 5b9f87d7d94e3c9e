"""A short form of benchmarks/faults.py: stores that are damaged, kills, processes together, hostile input."""

from __future__ import annotations

import contextlib
import random
import sys

import pytest

import tiny
from holdfast.errors import DataError, HoldfastError
from holdfast.recipe import Recipe
from places import BENCHMARKS

sys.path.insert(0, str(BENCHMARKS))

import _fault_inputs as inputs
import _fault_stores as stores

FINE = ("as before", "refused", "ended before")
INPUTS = (
    "recipe text", "recipe values", "rows in JSONL", "values of rows", "rows in JSON", "rows in CSV",
    "adapter settings", "adapter weights", "safetensors headers", "replies of judges", "answers and verdicts",
    "step records", "markers",
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def subjects(place):
    return inputs.subjects(place)


def test_every_kind_of_input_is_tried(subjects):
    assert tuple(subjects) == INPUTS


@pytest.mark.parametrize("name", INPUTS)
def test_hostile_input_raises_only_our_errors(name, subjects):
    found = inputs.fuzz(subjects[name], 40, seed=1)
    assert found["fault"] is None
    assert found["read"] + found["refused"] >= 40


def test_control_a_foreign_exception_is_a_fault(subjects):
    make, _ = subjects["markers"]
    assert "seed 1: ZeroDivisionError" in inputs.fuzz((make, lambda _: 1 / 0), 5, seed=1)["fault"]


def test_control_an_error_that_cannot_be_printed_is_a_fault(subjects, monkeypatch):
    def refuse(_):
        raise DataError("\x1b[2J \ud800")

    make, _ = subjects["markers"]
    assert inputs.fuzz((make, refuse), 5, seed=1)["refused"] == 5, "every error of ours is printable"
    monkeypatch.setattr(DataError, "__str__", Exception.__str__)
    assert "control characters" in inputs.fuzz((make, refuse), 5, seed=1)["fault"]


def test_the_same_seed_gives_the_same_examples(subjects):
    for make, _ in subjects.values():
        assert repr(make(random.Random(7))) == repr(make(random.Random(7)))


def test_a_damaged_store_gives_the_same_numbers_or_one_sentence(place):
    made = stores.prepare(place)
    found = list(stores.damages(place, made, some=0.008, seed=1))
    assert len(found) >= 5
    assert not [one for one in found if one["outcome"] not in FINE]


def test_a_command_that_is_killed_ends_with_the_same_output(place):
    found = list(stores.killed(place, 1, names=("filter", "rate", "merge")))
    assert len(found) == 9
    assert not [one for one in found if one["outcome"] not in FINE]


def test_processes_with_one_output_end_with_it_or_one_sentence(place):
    found = list(stores.together(place, 1, names=("moderate", "combine")))
    assert [one["processes"] for one in found] == [2, 4] * 2
    assert not [one for one in found if one["outcome"] not in FINE]


def test_a_page_of_several_runs_has_all_of_them(place):
    one, three = stores.page(place, 1), stores.page(place, 3)
    assert three["bytes"] > one["bytes"]
    text = (place / "of-3.html").read_text()
    assert all(f"copy {i}" in text for i in range(3))


def test_a_recipe_may_name_what_no_file_system_accepts(tmp_path):
    recipe = tiny.recipe(tmp_path)
    recipe["model"] = {"path": "m" * 5000}
    with contextlib.suppress(HoldfastError):
        Recipe.load(recipe)
