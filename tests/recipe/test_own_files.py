"""Methods and judges in files of the user's own, the whole recipe of a run, and older names of arguments."""

from __future__ import annotations

import os
import stat

import pytest
import yaml

import judge_files
import tiny
from holdfast import Recipe, pipeline
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import mode
from runs import run

METHOD = '''"""Halved: the plain loss, with every gradient multiplied by a factor."""

from dataclasses import dataclass, field

from holdfast.defenses import Defense
from holdfast.training.trainer import MethodConfig, RowTrainer


@dataclass
class HalvedConfig(MethodConfig):
    factor: float = field(default=0.5, metadata={"help": "Factor of the gradients."})


class HalvedTrainer(RowTrainer):
    pass


DEFENSE = Defense(
    name="halved", label="Halved", stages=("user",), paper="none", config=HalvedConfig, trainer=HalvedTrainer,
)
'''


def test_files_of_the_users_own_are_found_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "halved.py").write_text(METHOD)
    judge_files.flagging(tmp_path, "paper")
    given = tiny.recipe(tmp_path, alignment=None)
    given["user"] = {"defense": "halved.py", "factor": 0.25, "training": {"max_steps": 2}}
    given["evaluation"] = {"prompts": 2, "max_new_tokens": 2, "judges": ["keyword", "flags.py"]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump(given))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    recipe = Recipe.load(path)
    assert recipe.user.defense == str(tmp_path / "halved.py")
    assert [judge.shown for judge in recipe.evaluation.judges] == ["keyword", "flags.py"]
    steps = {step.kind: step for step in pipeline.plan(recipe)}
    assert steps["user"].title == "user fine-tuning with Halved"
    assert "factor=0.25" in steps["user"].detail
    results, _ = run(recipe, tmp_path / "out")
    assert results["rows"][1]["labels"] == {recipe.user.defense: "Halved"}
    assert set(results["rows"][1]["judges"]) == {"keyword", "flags.py"}
    (tmp_path / "halved.py").write_text(METHOD.replace("0.5", "0.75"))
    assert {s.kind: s.id for s in pipeline.plan(recipe)}["user"] != steps["user"].id, (
        "its content names the step"
    )
    given["user"] = "missing.py"
    path.write_text(yaml.safe_dump(given))
    with pytest.raises(
        RecipeError, match=r"line \d+: user.defense: There is no file missing\.py with a defense"
    ):
        Recipe.load(path)


def test_the_recipe_of_a_run_holds_every_default_and_names_the_same_steps(tmp_path):
    given = tiny.recipe(tmp_path, user="lisa", post_hoc={"defense": "safe_lora", "threshold": [0.1, 0.2]})
    recipe = Recipe.load(given)
    whole = recipe.whole()
    assert {k: whole["user"][k] for k in ("rho", "alignment_steps", "finetune_steps")} == {
        "rho": 1.0, "alignment_steps": 100, "finetune_steps": 900,
    }  # fmt: skip
    assert whole["user"]["training"]["learning_rate"] == 1e-5
    assert whole["user"]["training"]["num_train_epochs"] == 20
    assert whole["alignment"]["training"]["learning_rate"] == 1e-2, "as the recipe says"
    assert whole["post_hoc"]["projection"] == "approx"
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    planned = pipeline.plan(recipe)
    assert [s.id for s in pipeline.plan(Recipe.load(path))] == [s.id for s in planned]
    detail = next(s.detail for s in planned if s.kind == "user")
    assert "learning rate 1e-05" in detail
    assert all(
        f"{name}, " in f"{detail}, " for name in ("alignment_steps=100", "finetune_steps=900", "rho=1")
    )


def stage(**training):
    return {"model": "world", "data": {"task": "world", "alignment": "world"}, "user": {"training": training}}


def test_warmup_ratio_is_a_fraction_in_warmup_steps():
    assert Recipe.load(stage(warmup_ratio=0.03)).user.training.given() == {"warmup_steps": 0.03}
    assert Recipe.load(stage(warmup_ratio=0)).user.training.given() == {"warmup_steps": 0}
    with pytest.raises(RecipeError, match="give warmup_steps alone; a fraction below 1 there means the same"):
        Recipe.load(stage(warmup_ratio=0.03, warmup_steps=10))
    with pytest.raises(
        RecipeError, match=r"user\.training\.warmup_ratio: expected a share from 0 to below 1"
    ):
        Recipe.load(stage(warmup_ratio=100))


def test_answers_to_a_task_have_a_length_of_their_own(tmp_path):
    given = tiny.recipe(tmp_path, alignment=None, user=None)
    default = next(s for s in pipeline.plan(Recipe.load(given)) if s.kind == "generate")
    asked = Recipe.load(given, ["evaluation.task_new_tokens=7"])
    step = next(s for s in pipeline.plan(asked) if s.kind == "generate")
    assert step.inputs["max_new_tokens"] == {**default.inputs["max_new_tokens"], "task": 7}


def test_files_obey_the_umask(tmp_path):
    from holdfast.machine.files import write_text

    before = os.umask(0o027)
    try:
        assert mode(0o777) == 0o750
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640


def test_a_recipe_of_a_model_that_is_not_here_is_planned(tmp_path):
    given = tiny.recipe(tmp_path)
    whole = pipeline.plan(Recipe.load(given))
    given["model"] = {**given["model"], "path": "nobody/no-such-model"}
    recipe = Recipe.load(given)
    with pytest.raises(ModelError, match="neither a local folder nor in the local Hub cache"):
        pipeline.plan(recipe)
    planned = pipeline.plan(recipe, partial=True)
    assert [step.title for step in planned] == [step.title for step in whole]
    assert "nobody/no-such-model" in planned.elsewhere[0]
    assert whole.elsewhere == ()
    for stage in ("user", "post_hoc"):  # nor is the model before its alignment
        more = {"user": {"defense": "asft"}, "post_hoc": {"defense": "safe_lora", "threshold": 0.5}}
        recipe = {**tiny.recipe(tmp_path), "alignment": "none", "user": "sft", stage: more[stage]}
        recipe[stage]["base"] = "nobody/no-such-base"
        (missing,) = pipeline.plan(Recipe.load(recipe), partial=True).elsewhere
        assert "nobody/no-such-base" in missing
    given["model"] = {**given["model"], "path": str(tmp_path / "no-such-folder")}
    with pytest.raises(ModelError, match="No such model folder"):
        pipeline.plan(Recipe.load(given), partial=True)
