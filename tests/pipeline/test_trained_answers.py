"""Conversations in a run: which answers are trained, and rows that are dropped."""

from __future__ import annotations

import json

import pytest

import tiny
from holdfast import pipeline
from holdfast.data import read_rows
from holdfast.errors import RecipeError
from holdfast.recipe import Recipe
from runs import run


def talk(i):
    texts = f"Fold boat {i}?", f"Crease {i}.", "And then?", f"Tuck {i}."
    roles = ("user", "assistant") * 2
    return {"messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]}


@pytest.fixture
def recipe(tmp_path):
    tiny.save_lively_model(tmp_path / "in" / "model", chat=True)
    made = tiny.recipe(tmp_path / "in", alignment="none")
    user = tiny.write_jsonl(tmp_path / "in" / "user.jsonl", [*map(talk, range(12)), {"messages": []}])
    made["user"] = {"defense": "sft", "training": {"max_steps": 2, "per_device_train_batch_size": 2}}
    made["data"] = {"user": str(user), "skip_bad": True}
    made["evaluation"] = {"prompts": 2, "max_new_tokens": 2}
    return made


def data_steps(recipe):
    return {step.id for step in pipeline.plan(Recipe.load(recipe)) if step.kind == "data"}


def test_a_run_on_conversations(recipe, tmp_path):
    losses = {}
    for loss_on in ("all", "last"):
        recipe["data"]["loss_on"] = loss_on
        results, _ = run(recipe, tmp_path / "out")
        steps = tmp_path / "out" / "steps"
        state = steps / results["rows"][1]["steps"]["user"] / "trainer_state.json"
        losses[loss_on] = json.loads(state.read_text())["log_history"][-1]["train_loss"]
    assert results["bad_rows_dropped"] == {"user.jsonl": 1}
    (made,) = [steps / one["id"] for one in results["steps"] if one["title"] == "user rows"]
    rows = read_rows(made / "rows.jsonl")
    assert len(rows) == 11, "one prompt is held out"
    assert all([turn.get("weight") for turn in row["messages"]] == [None, 0, None, None] for row in rows)
    assert losses["all"] != losses["last"]


def test_the_trained_answers_are_part_of_the_identity(recipe):
    plain = data_steps(recipe)
    recipe["data"]["loss_on"] = "last"
    assert len(data_steps(recipe) - plain) == 1, "the user rows, and not the test rows"
    recipe["user"]["training"]["loss_on"] = "last"
    with pytest.raises(RecipeError, match=r"write data\.loss_on"):
        Recipe.load(recipe)
