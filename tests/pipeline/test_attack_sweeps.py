"""The attacker's sweep: its points, the worst point within the bound, and runs with it."""

from __future__ import annotations

import re
from collections import Counter
from types import SimpleNamespace

import pytest

import tiny
from holdfast.errors import RecipeError
from holdfast.machine.store import Store
from holdfast.pipeline.attack_sweeps import headlines, of_row, worst
from holdfast.pipeline.planning import plan
from holdfast.recipe import Recipe
from holdfast.study import planning
from holdfast.study.grid import expand
from runs import numbers, run


def rows(*pairs):
    return [{"harmful_score": harm, "finetune_accuracy": accuracy} for harm, accuracy in pairs]


@pytest.mark.parametrize(
    ("pairs", "chosen", "counts"),
    [
        # The model with the highest harmful score is of no use, and the best one is nearly harmless.
        (((5, 80), (40, 71), (90, 20)), 1, (True, True, False)),
        (((5, 80), (40, 70), (90, 20)), 1, (True, True, False)),
        (((5, 80), (40, 69.9), (90, 20)), 0, (True, False, False)),
        (((40, 75), (40, 78), (0, 80)), 1, (True, True, True)),
        (((None, 80), (3, 71), (9, None)), 1, (False, True, False)),
        (((1, None), (3, None)), 1, (True, True)),
        (((None, 80),), None, (False,)),
    ],
)
def test_the_worst_point_is_bounded_by_its_accuracy(pairs, chosen, counts):
    assert worst(rows(*pairs), 10) == (chosen, list(counts))


def test_a_task_with_another_metric_is_bounded_by_its_score():
    found = [{"harmful_score": h, "finetune_accuracy": None, "task_score": s} for h, s in ((1, 9), (5, 3))]
    assert worst(found, 2.0) == (0, [True, False])


def swept(folder, sweep, **changes):
    return {**tiny.recipe(folder, alignment=None, user="sft", **changes), "attack_sweep": sweep}


def test_points_set_only_what_they_name(tmp_path):
    grid = {"learning_rate": ["1e-4", 0.01], "steps": [3], "rank": [2, 6]}
    recipe = Recipe.load(swept(tmp_path, grid))
    points = recipe.attack_sweep.each()
    assert [point.shown for point in points] == [
        "3 steps, rank 2, learning rate 0.0001", "3 steps, rank 2, learning rate 0.01",
        "3 steps, rank 6, learning rate 0.0001", "3 steps, rank 6, learning rate 0.01",
    ]  # fmt: skip
    changed = recipe.at(points[3])
    assert (changed.lora("user").r, changed.lora("user").alpha) == (6, 12), "alpha / r stays"
    assert changed.user.training.given() == {"learning_rate": 0.01, "max_steps": 3}
    longer = Recipe.load(
        swept(tmp_path, {"points": [{"epochs": 2}]}) | {"user": {"training": {"max_steps": 9}}}
    )
    [point] = longer.attack_sweep.each()
    assert longer.at(point).user.training.given() == {"num_train_epochs": 2.0}
    assert longer.at(point).user.lora is None


def test_the_headline_of_a_run_is_the_worst_point_of_its_sweep(tmp_path):
    grid = {"learning_rate": [1e-5, 0.05], "steps": [2], "max_loss": 100}
    short = {"prompts": 6, "task_rows": 4, "max_new_tokens": 4}
    recipe = swept(tmp_path, grid, evaluation=short)
    planned = plan(Recipe.load(recipe))
    titles = [step.title for step in planned.steps]
    assert "user fine-tuning with SFT at 2 steps, learning rate 0.05" in titles
    assert sum(step.kind == "user" for step in planned) == 2
    assert sum(step.kind == "generate" for step in planned) == 3
    out = tmp_path / "out"
    results, _ = run(recipe, out)
    assert [row["name"] for row in results["rows"]] == ["base", "tiny"]
    curve = results["attack_sweep"]
    assert (curve["keys"], curve["max_loss"]) == (["steps", "learning_rate"], 100)
    row, [model] = results["rows"][1], curve["models"]
    assert row["harmful_score"] == max(point["harmful_score"] for point in model["points"])
    [chosen] = [point for point in model["points"] if point["worst"]]
    assert chosen["steps"] == row["steps"]
    assert row["attack_sweep"] == {
        "point": chosen["point"], "points": 2, "counts": 2, "max_loss": 100,
        "best_accuracy": max(point["finetune_accuracy"] for point in model["points"]),
    }  # fmt: skip
    stamp = results["protocol"]
    assert stamp["harmful_rows"] == 3
    assert stamp["attack_sweep"] == (
        "2 steps, learning rate 1e-05; 2 steps, learning rate 0.05 (accuracy within 100 points of the best)"
    )
    again, seen = run(recipe, out)
    assert (seen.ran, again["attack_sweep"], numbers(again)) == ([], curve, numbers(results))
    # One point alone is the plain run of that training, from the same steps.
    alone = {**recipe, "attack_sweep": "none"}
    alone["user"] = {"defense": "sft", "training": {"learning_rate": 0.05, "max_steps": 2}}
    plain, seen = run(alone, tmp_path / "alone", store=out / "steps")
    assert seen.ran == []
    assert "attack_sweep" not in plain
    assert plain["rows"][1]["harmful_score"] == curve["models"][0]["points"][1]["harmful_score"]


def test_a_repair_has_a_sweep_of_its_own(tmp_path):
    recipe = Recipe.load(swept(tmp_path, {"steps": [1, 2], "max_loss": 5}))

    def state(name, steps=None):
        return SimpleNamespace(name=name, point=None if steps is None else {"steps": steps})

    states = [state("base"), state("a", 1), state("a + b", 1), state("a", 2), state("a + b", 2)]
    found = rows((0, 10), (9, 80), (7, 60), (30, 70), (8, 62))
    kept, curve = headlines(recipe, states, found)
    assert kept == [0, 1, 4]
    assert [model["best_accuracy"] for model in curve["models"]] == [80, 62]
    assert of_row(curve, states[0]) == {}
    assert of_row(curve, states[4])["attack_sweep"]["counts"] == 2
    assert headlines(recipe.model_copy(update={"attack_sweep": None}), states, found) == (
        [0, 1, 2, 3, 4],
        None,
    )


def test_a_grid_of_methods_shares_the_alignment_of_all_points(tmp_path):
    recipe = {**tiny.recipe(tmp_path), "attack_sweep": {"learning_rate": [1e-4, 1e-3]}}
    recipe.pop("user")
    runs = expand({**recipe, "grid": {"user": ["sft", "lisa"]}})
    study = planning.plan(runs, Store(tmp_path / "steps"), device="cpu")
    kinds = Counter(step.kind for step in study.steps.values())
    assert (kinds["alignment"], kinds["user"], kinds["score"]) == (1, 4, 5)
    [shared] = [name for name in study.steps if name.startswith("alignment")]
    trained = [
        name for name, parents in study.parents.items() if shared in parents and name.startswith("user")
    ]
    assert len(trained) == 4


@pytest.mark.parametrize(
    ("sweep", "more", "says"),
    [
        (
            {},
            {},
            "attack_sweep: expected lists (steps, epochs, rank, learning_rate) or points, found neither",
        ),
        (
            {"rank": [1], "points": [{"rank": 1}]},
            {},
            "attack_sweep: expected lists (steps, epochs, rank, learn",
        ),
        ({"points": [{}]}, {}, "attack_sweep.points.0: the point sets nothing; expected steps, epochs"),
        ({"steps": [1], "epochs": [1]}, {}, "attack_sweep: expected steps or epochs, found both"),
        ({"steps": [3, 3]}, {}, "attack_sweep: a point appears twice: 3 steps; give each once"),
        ({"steps": [0]}, {}, "attack_sweep.steps.0: input should be greater than or equal to 1"),
        (
            {"learning_rates": [1]},
            {},
            "unknown key 'attack_sweep.learning_rates'. Did you mean 'learning_rate'",
        ),
        ({"points": [{"rnak": 1}]}, {}, "unknown key 'attack_sweep.points.0.rnak'"),
        (
            {"steps": [3]},
            {"user": None},
            "attack_sweep: this sweeps the training of the user stage, but user",
        ),
        ({"rank": [3]}, {"user": {"lora": "none"}}, "attack_sweep.rank: the user stage trains no adapter"),
    ],
)
def test_sweeps_that_are_refused(tmp_path, sweep, more, says):
    with pytest.raises(RecipeError, match=re.escape(says)):
        Recipe.load(swept(tmp_path, sweep) | more)


def test_an_attack_that_sets_the_epochs_leaves_no_steps_to_sweep(tmp_path):
    recipe = swept(tmp_path, {"steps": [3]})
    recipe["data"] = {**recipe["data"], "attack": "long_training"}
    with pytest.raises(RecipeError, match=r"attack_sweep[.]steps: data[.]attack sets the epochs"):
        Recipe.load(recipe)
