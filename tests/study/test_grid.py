"""Grids: which recipes a recipe with lists stands for."""

from __future__ import annotations

import pytest

from holdfast import registry
from holdfast.errors import RecipeError
from holdfast.study import packaged
from holdfast.study.grid import expand, is_grid

BASE = {"extends": "world", "name": "study"}


def shown(runs):
    return [(run.recipe.user.defense, run.recipe.data.poison_ratio, run.recipe.seed) for run in runs]


def test_every_combination_is_one_recipe():
    user = ["sft", {"defense": "lisa", "rho": [0.1, 1]}]
    grid = {"user": user, "data.poison_ratio": [0, 0.05, 0.1], "seed": [1, 2, 3]}
    runs = expand({**BASE, "grid": grid})
    assert len(runs) == 3 * 3 * 3
    assert shown(runs[:4]) == [("sft", 0, 1), ("sft", 0, 2), ("sft", 0, 3), ("sft", 0.05, 1)]
    assert [run.recipe.user.parameters().get("rho") for run in runs[::9]] == [None, 0.1, 1]
    assert runs[13].folder == "lisa-rho-0.1-poison_ratio-0.05-seed-2"
    assert runs[13].recipe.name == "lisa rho 0.1 poison_ratio 0.05", (
        "the report takes means over seeds by name"
    )
    assert len({run.folder for run in runs}) == len(runs)


def test_a_list_in_a_list_is_one_value():
    first, second = expand(
        {**BASE, "grid": {"evaluation.judges": [["keyword"], ["keyword_published", "keyword"]]}}
    )
    assert [j.name for j in first.recipe.evaluation.judges] == ["keyword"]
    assert [j.name for j in second.recipe.evaluation.judges] == ["keyword_published", "keyword"]


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ({"user": "sft", "seed": 1}, [("sft", 2), ("lisa", 1), ("lisa", 2), ("lisa", 1), ("lisa", 2)]),
        ({"user": {"defense": "lisa", "rho": 1}}, [("sft", 1), ("sft", 2), ("lisa", 1), ("lisa", 2)]),
        ({"user.rho": [0.1, 1]}, [("sft", 1), ("sft", 2)]),
        ({"user": "lisa"}, [("sft", 1), ("sft", 2)]),
    ],
)
def test_exclude_removes_the_runs_that_have_all_its_values(exclude, left):
    grid = {"user": ["sft", {"defense": "lisa", "rho": [0.1, 1]}], "seed": [1, 2]}
    runs = expand({**BASE, "grid": grid, "exclude": [exclude]})
    assert [(user, seed) for user, _, seed in shown(runs)] == left


def test_include_adds_runs_with_the_values_of_the_recipe_for_other_keys():
    grid = {"data.poison_ratio": [0.05], "seed": [1, 2]}
    runs = expand({**BASE, "user": "sft", "grid": grid, "include": [{"user": ["ewc"], "seed": [7, 8]}]})
    ratio = runs[-1].recipe.data.poison_ratio
    assert ratio not in (None, 0.05)
    assert shown(runs) == [("sft", 0.05, 1), ("sft", 0.05, 2), ("ewc", ratio, 7), ("ewc", ratio, 8)]


def test_overrides_hold_for_every_run_and_keys_of_the_grid_come_on_top():
    runs = expand({**BASE, "grid": {"seed": [1, 2]}}, ["user=sft", "seed=9", "evaluation.prompts=5"])
    assert shown(runs) == [("sft", runs[0].recipe.data.poison_ratio, seed) for seed in (1, 2)]
    assert {run.recipe.evaluation.prompts for run in runs} == {5}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"grid": {"seed": []}}, "seed is an empty list"),
        ({"grid": [1]}, "expected recipe keys with lists of values"),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 2}]}, "no run of the grid has"),
        ({"grid": {"seed": [1]}, "exclude": {"seed": 1}}, "expected a list of mappings"),
        ({"grid": {"seed": [1]}, "exclude": [{"seed": 1}]}, "no run is left"),
        ({"seed": 1}, r"has no block grid: \{KEY: \[VALUE, ...\]\}. It is one run"),
        ({"grid": {"seed": [1, 1]}}, "two runs have the same name"),
        ({"grid": {"user": ["liza"]}}, "Did you mean 'lisa'"),
        ({"grid": {"usr": ["lisa"]}}, "usr"),
    ],
)
def test_a_grid_that_cannot_be_used_is_refused(keys, words):
    with pytest.raises(RecipeError, match=words):
        expand({**BASE, **keys})


def test_a_recipe_without_lists_is_no_grid(tmp_path):
    assert not is_grid("world")
    assert not is_grid(BASE)
    path = tmp_path / "study.yaml"
    path.write_text("extends: world\ngrid: {seed: [1, 2]}\n")
    assert is_grid(path)
    assert [run.folder for run in expand(path)] == ["study-seed-1", "study-seed-2"]


def test_the_packaged_study_of_the_world_has_36_runs():
    runs = expand("world-study")
    assert len(runs) == 4 * 3 * 3
    methods = {
        (r.alignment.defense, r.user.defense, r.post_hoc.defense if r.post_hoc else None)
        for r in (run.recipe for run in runs)
    }
    assert methods == {
        ("sft", "sft", None),
        ("sft", "lisa", None),
        ("vaccine", "sft", None),
        ("sft", "sft", "safe_lora"),
    }
    assert {run.recipe.data.poison_ratio for run in runs} == {0, 0.05, 0.1}
    assert {run.recipe.seed for run in runs} == {1, 2, 3}
    assert len({run.recipe.name for run in runs}) == 12, "the report takes means over seeds by name"
    own = {
        m: registry.face("defenses", m).facts["protocols"]["world"] for m in ("lisa", "vaccine", "safe_lora")
    }
    for run in runs:
        for stage in ("alignment", "user", "post_hoc"):
            part = getattr(run.recipe, stage)
            if part is not None and part.defense in own:
                assert part.parameters() == own[part.defense][stage]


@pytest.mark.parametrize("name", packaged.grids())
def test_a_packaged_grid_is_found_by_its_name_and_has_a_description(name, tmp_path, monkeypatch):
    assert is_grid(name)
    assert expand(name)
    assert packaged.about(packaged.grids()[name]).endswith(".")
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text("extends: world\n")
    assert not is_grid(name), "a file comes first"


def test_a_misspelt_grid_has_a_hint():
    with pytest.raises(RecipeError, match=r"No such grid: world-studdy\. Did you mean 'world-study'"):
        expand("world-studdy")
    with pytest.raises(RecipeError, match=r"No such recipe file: lisa-sst3\. Did you mean 'lisa-sst2'"):
        is_grid("lisa-sst3")
