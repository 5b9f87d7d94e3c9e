"""SafeMERGE against dense arithmetic, its reductions to the identity and to plain merging, and recipes."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from holdfast import pipeline
from holdfast.defenses import Tuned
from holdfast.defenses.safemerge import apply
from holdfast.defenses.soup import apply as soup
from holdfast.errors import ModelError, RecipeError
from holdfast.recipe import Recipe
from pairs import SEVEN, TWO, digest, llama, save_adapter, save_pair, weights_of
from repairs import dense, updates
from runs import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an aligned model, and adapters: the user's, the alignment's and a safe one."""
    folder = tmp_path_factory.mktemp("folders")
    base, aligned = save_pair(folder)
    torch.manual_seed(9)
    model = llama()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.save_pretrained(folder / "tuned", max_shard_size="60KB")
    return {
        "base": base,
        "aligned": aligned,
        "tuned": folder / "tuned",
        "user": save_adapter(folder / "user", std=0.2, r=2, lora_alpha=8, target_modules=TWO),
        "guide": save_adapter(folder / "guide", r=4, lora_alpha=3, target_modules=SEVEN),
        "safe": save_adapter(folder / "safe", std=0.3, r=3, lora_alpha=3, target_modules=SEVEN),
    }


load = AutoModelForCausalLM.from_pretrained


def middle(values):
    """A threshold with half of the values below it."""
    values = sorted(values)
    return (values[len(values) // 2 - 1] + values[len(values) // 2]) / 2


@pytest.mark.parametrize("safe", [True, False], ids=["safe adapter", "the alignment's update"])
def test_an_adapter_by_dense_arithmetic(folders, tmp_path, safe):
    """Cosines with C as a matrix; w dW + (1 - w) dW_safe below the threshold, dW above it."""
    user, other = folders["user"], folders["safe" if safe else "guide"]
    tuned, merged = updates(user, llama), updates(other, llama)
    if safe:  # V is the difference of two models
        aligned = folders["aligned"]
        cosines = {name: one["cosine"] for name, one in dense(folders["base"], aligned, user).items()}
    else:  # V is the alignment adapter's update
        aligned, cosines = folders["guide"], {}
        for name, delta in tuned.items():
            moved = merged[name] @ merged[name].T @ delta
            cosines[name] = float((delta * moved).sum() / (delta.norm() * moved.norm()))
    threshold = middle(cosines.values())
    before = {name: digest(path) for name, path in folders.items()}
    given = Tuned(user, tmp_path / "out", "new", base=folders["base"], aligned=aligned)
    facts = apply(given, threshold=threshold, weight=0.7, safe=str(other) if safe else None)
    assert facts == {"modules": 6, "merged": 3}
    found = updates(tmp_path / "out", llama)
    assert found.keys() == tuned.keys()
    for name, delta in tuned.items():
        expected = 0.7 * delta + 0.3 * merged[name] if cosines[name] < threshold else delta
        assert (found[name] - expected).abs().max() < 1e-6, name
    assert {name: digest(path) for name, path in folders.items()} == before
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("safe", [True, False], ids=["safe model", "the alignment's update"])
def test_all_weights_by_dense_arithmetic(folders, tmp_path, blocks_of, safe):
    blocks_of(2000)
    torch.manual_seed(3)
    model = llama()
    model.save_pretrained(tmp_path / "safe")
    base, aligned, tuned = (weights_of(folders[name]) for name in ("base", "aligned", "tuned"))
    other = weights_of(tmp_path / "safe")
    cosines = {}
    for name, weight in tuned.items():
        if weight.ndim == 2 and "embed" not in name:
            v, delta = (aligned[name] - base[name]).double(), (weight - aligned[name]).double()
            moved = v @ v.T @ delta
            cosines[name] = float((delta * moved).sum() / (delta.norm() * moved.norm()))
    threshold = middle(cosines.values())
    given = Tuned(folders["tuned"], tmp_path / "out", "full", folders["base"], folders["aligned"])
    facts = apply(given, threshold=threshold, weight=0.7, safe=tmp_path / "safe" if safe else None)
    chosen = {name for name, cosine in cosines.items() if cosine < threshold}
    assert facts == {"modules": len(cosines), "merged": len(chosen)}
    for name, value in weights_of(tmp_path / "out").items():
        if name not in chosen:
            assert torch.equal(value, tuned[name]), name
            continue
        towards = other[name] - aligned[name] if safe else aligned[name] - base[name]
        expected = aligned[name] + 0.7 * (tuned[name] - aligned[name]) + 0.3 * towards
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trains", ["new", "full"])
def test_a_threshold_above_every_cosine_is_plain_merging(folders, tmp_path, trains):
    """Soup with lambda = gamma = 1 - w over the modules that have a cosine."""
    source, aligned = ("user", "guide") if trains == "new" else ("tuned", "aligned")
    given = folders[source], folders["base"], folders[aligned]
    apply(Tuned(given[0], tmp_path / "ours", trains, *given[1:]), threshold=1.0, weight=0.75)
    soup(Tuned(given[0], tmp_path / "soup", trains, *given[1:]), lambda_=0.25, gamma=0.25)
    if trains == "full":
        ours, theirs = weights_of(tmp_path / "ours"), weights_of(tmp_path / "soup")
        linear = [name for name, value in ours.items() if value.ndim == 2 and "embed" not in name]
        assert all(torch.equal(ours[name], theirs[name]) for name in linear)
    else:  # soup also adds the alignment's update to modules that the user's adapter does not have
        ours, theirs = updates(tmp_path / "ours", llama), updates(tmp_path / "soup", llama)
        assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in ours)


@pytest.mark.parametrize("trains", ["new", "full"])
@pytest.mark.parametrize("same", [{"weight": 1.0, "threshold": 1.0}, {"weight": 0.5, "threshold": -1.0}])
def test_weight_1_and_a_threshold_below_every_cosine_change_nothing(folders, tmp_path, trains, same):
    source, aligned = ("user", "guide") if trains == "new" else ("tuned", "aligned")
    given = Tuned(folders[source], tmp_path / "out", trains, folders["base"], folders[aligned])
    assert apply(given, **same)["merged"] == 0
    before, after = weights_of(folders[source]), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


def test_a_safe_adapter_on_other_modules_is_refused(folders, tmp_path):
    other = save_adapter(tmp_path / "other", r=2, target_modules=["down_proj"])
    given = Tuned(folders["user"], tmp_path / "out", "new", folders["base"], folders["guide"])
    with pytest.raises(ModelError, match=r"adapts none of the 6 modules to merge"):
        apply(given, threshold=1.0, weight=0.8, safe=other)
    assert not (tmp_path / "out").exists()


def test_recipes(tmp_path):
    """With the alignment's update, and with the same as a safe adapter in a folder beside the recipe file.

    A method of 2026 at every stage: the safe update is the one that LoX made, and GuardSpace trains on top of it.
    """
    recipe = {**tiny.recipe(tmp_path), "post_hoc": {"defense": "safemerge", "threshold": 1.0}}
    recipe["alignment"] |= {"defense": "lox", "k": 1}
    recipe["user"] = {"defense": "guardspace", "tolerance": 0.1, "training": recipe["user"]["training"]}
    recipe["user"] |= {"initialisation": "subspace"}
    results, _ = run(recipe, tmp_path / "out")
    row = results["rows"][2]
    assert (row["name"], row["repair"]) == ("tiny + SafeMERGE", {"modules": 4, "merged": 4})
    assert (row["alignment"], row["user"], row["post_hoc"]) == ("lox", "guardspace", "safemerge")
    adapters = [tmp_path / "out/steps" / row["steps"][s] / "adapter" for s in ("harden", "user", "post_hoc")]
    aligned, user, merged = (updates(path, lambda: load(tmp_path / "model")) for path in adapters)
    for name, delta in user.items():
        assert (merged[name] - 0.8 * delta - 0.2 * aligned[name]).abs().max() < 1e-6
    shutil.copytree(adapters[0], tmp_path / "safe")
    block = {**recipe["post_hoc"], "safe": "safe"}
    (tmp_path / "mine.yaml").write_text(json.dumps({**recipe, "post_hoc": block}))
    given = Recipe.load(tmp_path / "mine.yaml")
    again, _ = run(given.to_dict(), tmp_path / "out")
    row = again["rows"][2]
    same = updates(
        tmp_path / "out/steps" / row["steps"]["post_hoc"] / "adapter", lambda: load(tmp_path / "model")
    )
    assert all(torch.equal(value, same[name]) for name, value in merged.items())
    assert row["steps"]["user"] == results["rows"][2]["steps"]["user"]


def test_a_step_is_named_by_the_content_of_the_safe_adapter(folders, tmp_path):
    def repair(safe):
        block = {"defense": "safemerge", "safe": str(safe)}
        recipe = Recipe.load({**tiny.recipe(tmp_path), "post_hoc": block})
        return next(step.id for step in pipeline.plan(recipe) if step.kind == "post_hoc")

    copied = shutil.copytree(folders["safe"], tmp_path / "copy")
    assert repair(copied) == repair(folders["safe"])
    changed = save_adapter(tmp_path / "changed", std=0.4, r=3, lora_alpha=3, target_modules=SEVEN)
    assert repair(changed) != repair(folders["safe"])


@pytest.mark.parametrize(
    ("block", "words"),
    [
        ({"weight": 1.5}, ["weight must be from 0 to 1", "1.5"]),
        ({"threshold": 2.0}, ["threshold must be a cosine", "2.0"]),
        ({"safe": "nowhere/here/x"}, ["nowhere/here/x"]),
    ],
)
def test_what_would_stop_it_is_found_before_training(tmp_path, block, words):
    recipe = {**tiny.recipe(tmp_path), "post_hoc": {"defense": "safemerge", **block}}
    with pytest.raises((RecipeError, ModelError)) as caught:
        run(recipe, tmp_path / "out")
    assert all(word in str(caught.value) for word in words)
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"
