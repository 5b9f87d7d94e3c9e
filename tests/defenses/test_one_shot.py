"""The one-shot patch: which rows it trains on, what it trains, and what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import tiny
from holdfast import pipeline
from holdfast.defenses.one_shot import mix
from holdfast.errors import DataError, RecipeError
from holdfast.recipe import Recipe
from runs import Stopped, run, weights


def test_rows_are_drawn_with_the_seed():
    rows = list(range(30))
    assert mix(rows, None, seed=1, shots=4) == mix(rows, None, seed=1, shots=4)
    assert len({tuple(mix(rows, None, seed=seed, shots=4)) for seed in range(5)}) > 1
    assert mix(rows, None, seed=1, shots=30) == rows, "in their order"
    with pytest.raises(DataError, match="needs shots=2 alignment rows, found 1"):
        mix(rows[:1], None, seed=1, shots=2)


TRAINING = {"learning_rate": 0.01, "num_train_epochs": 4, "logging_steps": 1}


def patched(folder, user=None, **post_hoc):
    recipe = tiny.recipe(folder)
    recipe["user"] = {"defense": "sft", "training": recipe["user"]["training"], **(user or {})}
    recipe["evaluation"] = {"prompts": 2, "max_new_tokens": 2}
    recipe["post_hoc"] = {"defense": "one_shot", "training": TRAINING, **post_hoc}
    return recipe


def test_a_recipe(tmp_path):
    """Each number of rows is a training of its own on the user's adapter; it resumes, and ends the same."""
    recipe = patched(tmp_path, shots=[1, 2])
    results, seen = run(recipe, tmp_path / "out")
    assert seen.ran.count("repair with One-shot patch") == 2
    rows = results["rows"][2:]
    assert [row["name"] for row in rows] == ["tiny, shots=1", "tiny, shots=2"]
    assert [row["repair"] for row in rows] == [{"rows": 1}, {"rows": 2}]
    user, patch = (weights(tmp_path / "out", rows[0], kind) for kind in ("user", "post_hoc"))
    assert user.keys() == patch.keys()
    assert any(not torch.equal(value, user[name]) for name, value in patch.items())
    folder = tmp_path / "out/steps" / rows[1]["steps"]["post_hoc"]
    trained = json.loads((folder / "step.json").read_text())["training"]
    assert (trained["mixed"]["rows"], trained["steps"], trained["rows_per_step"]) == (2, 4, 8), (
        "one batch an epoch"
    )
    record = [
        (tmp_path / "out/steps" / rows[0]["steps"][kind] / "adapter/holdfast_adapter.json").read_text()
        for kind in ("user", "post_hoc")
    ]
    assert record[0] == record[1], "it takes the place of the user's adapter"
    shutil.rmtree(tmp_path / "out/steps" / rows[0]["steps"]["post_hoc"])
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out", seen=Stopped("repair with One-shot patch", done=3))
    again, seen = run(recipe, tmp_path / "out")
    assert seen.resumed == ["repair with One-shot patch"]
    same = weights(tmp_path / "out", again["rows"][2], "post_hoc")
    assert all(torch.equal(value, same[name]) for name, value in patch.items())


def test_all_weights_are_trained_if_the_user_stage_did(tmp_path):
    recipe = patched(tmp_path)
    recipe["model"] |= {"dtype": "float32", "lora": "none"}
    results, _ = run(recipe, tmp_path / "out")
    user, patch = (
        weights(tmp_path / "out", results["rows"][-1], kind, "model") for kind in ("user", "post_hoc")
    )
    assert user.keys() == patch.keys()
    assert any(not torch.equal(value, user[name]) for name, value in patch.items())
    assert results["rows"][-1]["repair"] == {"rows": 1}


def test_a_continued_adapter_is_continued(tmp_path):
    """Single LoRA: the alignment's adapter, which the user stage continued, stands alone."""
    recipe = patched(tmp_path, {"adapter": "continue", "lora": None})
    recipe["alignment"]["lora"] = {"r": 3, "alpha": 3}
    steps = {step.kind: step for step in pipeline.plan(Recipe.load(recipe))}
    given = steps["post_hoc"].inputs
    assert (given["trains"], given["lora"]["r"]) == ("continue", 3)
    assert [made.step for made in given["chain"]] == [steps["user"].id]


def test_what_cannot_be_trained_is_refused(tmp_path):
    for block, words in (
        ({"shots": 9}, "shots must be from 1 to 8"),
        ({"lora": {"r": 2}}, "post_hoc.lora"),
        ({"training": {"epochs": 3}}, "unknown training argument"),
        ({"defense": "soup"}, "post_hoc.training: nothing is trained by soup"),
    ):
        recipe = patched(tmp_path, **block)
        with pytest.raises(RecipeError, match=words):
            run(recipe, tmp_path / "out")
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"


def test_the_papers_settings_are_the_defaults(tmp_path):
    recipe = patched(tmp_path)
    del recipe["post_hoc"]["training"]
    step = next(s for s in pipeline.plan(Recipe.load(recipe)) if s.kind == "post_hoc")
    training = step.inputs["training"].place
    assert (training["learning_rate"], training["num_train_epochs"]) == (2e-5, 10)
    assert Recipe.load(recipe).whole()["post_hoc"] == {
        "defense": "one_shot", "base": None, "shots": 1, "training": training,
    }  # fmt: skip
