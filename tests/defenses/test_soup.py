"""Soup against dense arithmetic: adapters of both kinds, all weights, recipes, and what is refused."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

import tiny
from holdfast.defenses import Tuned
from holdfast.defenses.soup import apply
from holdfast.errors import ModelError, RecipeError
from holdfast.recipe import Recipe
from holdfast.weights.chains import check_chain, write_below
from pairs import SEVEN, TWO, digest, llama, save_adapter, save_pair, weights_of
from repairs import updates
from runs import run

COEFFICIENTS = [(0.3, 0.0), (1.0, 0.0), (0.0, 1.0), (0.25, -0.5)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The alignment's adapter on all linear modules, and a smaller one of the user."""
    folder = tmp_path_factory.mktemp("adapters")
    aligned = save_adapter(folder / "aligned", r=4, lora_alpha=3, target_modules=SEVEN)
    user = save_adapter(folder / "user", std=0.2, r=2, lora_alpha=8, target_modules=TWO)
    return aligned, user


@pytest.mark.parametrize(("lambda_", "gamma"), COEFFICIENTS)
@pytest.mark.parametrize("trains", ["new", "continue"])
def test_adapters_by_dense_arithmetic(adapters, tmp_path, trains, lambda_, gamma):
    """The model with the result, less the base: on the alignment's adapter ("new") or in its place."""
    aligned, user = adapters
    before = digest(aligned), digest(user)
    given = Tuned(user, tmp_path / "out", trains, base=tmp_path, aligned=aligned)
    facts = apply(given, lambda_=lambda_, gamma=gamma)
    guide, tuned, found = (updates(path, llama) for path in (aligned, user, tmp_path / "out"))
    # Both are updates of the base: the aligned model is A, the tuned one A + U, or U if it went on from A.
    for name in guide:
        a, u = guide[name], tuned.get(name, torch.zeros_like(guide[name]))
        whole = a + u if trains == "new" else u
        expected = lambda_ * a + (1 - lambda_) * whole + gamma * a
        mine = found.get(name, torch.zeros_like(a)) + (a if trains == "new" else 0)
        assert (mine - expected).abs().max() < 1e-6, name
    assert facts["changed"] == facts["weights"] == len(found)
    assert (digest(aligned), digest(user)) == before
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


def test_the_average_is_used_on_top_of_the_same_adapters(adapters, tmp_path):
    aligned, user = adapters
    for source, lambda_ in (("half", 0.5), ("whole", 0.0)):
        copied = shutil.copytree(user, tmp_path / source)
        write_below(copied, [aligned])
        apply(Tuned(copied, tmp_path / f"{source} out", "new", tmp_path, aligned), lambda_=lambda_, gamma=0.0)
        with pytest.raises(ModelError, match="was trained on top of"):
            check_chain([tmp_path / f"{source} out"])
        check_chain([aligned, tmp_path / f"{source} out"])


@pytest.mark.parametrize(("lambda_", "gamma"), COEFFICIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_weights_by_dense_arithmetic(tmp_path, blocks_of, dtype, lambda_, gamma):
    """In several files, by blocks of a few rows, rounded once."""
    blocks_of(2000)
    base, aligned = save_pair(tmp_path, dtypes=(dtype, dtype))
    model = llama()
    torch.manual_seed(9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.to(dtype).save_pretrained(tmp_path / "tuned", max_shard_size="60KB")
    assert len(list((tmp_path / "tuned").glob("*.safetensors"))) > 1
    apply(Tuned(tmp_path / "tuned", tmp_path / "out", "full", base, aligned), lambda_=lambda_, gamma=gamma)
    b, a, t, found = (weights_of(tmp_path / name) for name in ("base", "aligned", "tuned", "out"))
    assert found.keys() == t.keys()
    for name, value in found.items():
        expected = lambda_ * a[name].double() + (1 - lambda_) * t[name].double()
        expected += gamma * (a[name].double() - b[name].double())
        assert value.dtype == dtype
        torch.testing.assert_close(
            value, expected.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
        if (lambda_, gamma) == (1.0, 0.0):
            assert torch.equal(value, a[name]), name
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_memory_is_that_of_a_block(tmp_path, blocks_of, monkeypatch):
    """No tensor is read as a whole."""
    from holdfast.weights.reader import Tensor

    blocks_of(4000)
    base, aligned = save_pair(tmp_path)
    save_pair(tmp_path / "other")
    most, read = [], Tensor.read
    monkeypatch.setattr(Tensor, "read", lambda *a: most.append(read(*a).nbytes) or read(*a))
    apply(
        Tuned(tmp_path / "other" / "aligned", tmp_path / "out", "full", base, aligned), lambda_=0.5, gamma=1.0
    )
    largest = max(value.nbytes for value in load_file(base / "model.safetensors").values())
    assert max(most) <= 4000 < largest


def test_what_does_not_fit_is_refused(adapters, tmp_path):
    base, aligned = save_pair(tmp_path)
    tiny.llama(400, layers=2).save_pretrained(tmp_path / "small")
    given = Tuned(aligned, tmp_path / "out", "full", base, tmp_path / "small")
    with pytest.raises(ModelError, match=r"layers\.2\..*no such tensor"):
        apply(given, lambda_=0.5, gamma=0.0)
    _, user = adapters
    whole = save_adapter(tmp_path / "whole", r=2, target_modules=TWO, modules_to_save=["norm"])
    with pytest.raises(ModelError, match="modules_to_save"):
        apply(Tuned(whole, tmp_path / "out", "new", base, user), lambda_=0.5, gamma=0.0)
    assert not (tmp_path / "out").exists()


def test_another_shape_is_refused(tmp_path):
    base, aligned = save_pair(tmp_path)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] = np.zeros(3, np.float32)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ModelError, match=r"'model\.norm\.weight' has shape .* of shape \[3\]"):
        apply(Tuned(aligned, tmp_path / "out", "full", base, base), lambda_=0.5, gamma=0.0)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Double LoRA: three averages in one run, on top of a defense at the user stage."""
    folder = tmp_path_factory.mktemp("soup")
    recipe = {**tiny.recipe(folder / "in"), "post_hoc": {"defense": "soup", "lambda_": [0.0, 0.5, 1.0]}}
    results, _ = run(recipe, folder / "out", page=True)
    return folder / "out", {row["name"]: row for row in results["rows"]}


def adapter(out, row, stage):
    return load_file(out / "steps" / row["steps"][stage] / "adapter" / "adapter_model.safetensors")


def test_a_sweep_in_a_recipe(swept):
    out, rows = swept
    assert list(rows) == ["aligned", "tiny", "tiny, lambda_=0", "tiny, lambda_=0.5", "tiny, lambda_=1"]
    same, half, none = (rows[f"tiny, lambda_={value}"] for value in ("0", "0.5", "1"))
    assert same["repair"] == {"weights": 4, "changed": 0}
    assert half["repair"] == none["repair"] == {"weights": 4, "changed": 4}
    before = adapter(out, half, "user")
    assert all(np.array_equal(value, before[name]) for name, value in adapter(out, same, "post_hoc").items())
    names = [name for name in before if "lora_B" in name]
    for row, share in ((half, 0.5), (none, 0.0)):
        after = adapter(out, row, "post_hoc")
        for b in names:
            a = b.replace(
                "lora_B", "lora_A"
            )  # scaling 2 (alpha 4, r 2) in the tuned adapter, 1 in the result
            np.testing.assert_allclose(after[b] @ after[a], share * 2 * before[b] @ before[a], atol=1e-7)
            assert after[b].any() == bool(share), "lambda 1 is the aligned model: no update at all"
    page = (out / "report.html").read_text()
    assert "SFT → Lisa → Soup (4 of 4 weights averaged)" in page
    assert "SFT → Lisa → Soup (0 of 4 weights averaged)" in page


@pytest.mark.parametrize("kind", ["continue", "full"])
def test_the_other_kinds_in_a_recipe(tmp_path, kind):
    """Single LoRA, and all weights at both stages, with a safety vector (RESTA)."""
    recipe = tiny.recipe(tmp_path / "in")
    recipe["user"] = {"defense": "sft", "training": recipe["user"]["training"]}
    if kind == "continue":
        recipe["user"]["adapter"] = "continue"
    else:
        recipe["model"] |= {"dtype": "float32", "lora": "none"}
        recipe["alignment"] = {**recipe["alignment"], "lora": "none"}
        recipe["user"]["lora"] = "none"
    recipe["post_hoc"] = {"defense": "soup", "lambda_": 0.0, "gamma": 1.0}
    results, _ = run(recipe, tmp_path / "out")
    row = results["rows"][2]
    assert row["name"] == "tiny + Soup"
    folders = [
        tmp_path / "out" / "steps" / row["steps"][stage] / ("adapter" if kind == "continue" else "model")
        for stage in ("alignment", "user", "post_hoc")
    ]
    if kind == "continue":
        make = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "in" / "model")  # noqa: E731
        aligned, tuned, found = (updates(folder, make) for folder in folders)
        base = {name: torch.zeros_like(value) for name, value in aligned.items()}
    else:
        aligned, tuned, found = map(weights_of, folders)
        base = weights_of(tmp_path / "in" / "model")
    assert any((tuned[name] - aligned[name]).abs().max() > 1e-4 for name in tuned)
    for name, value in found.items():
        expected = tuned[name] + aligned[name] - base[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["post_hoc.lambda_=half"], ["post_hoc.lambda_", "float", "'half'"]),
        (["user=none"], ["user is none"]),
        (["user.lora=none"], ["does not save", "lora: none"]),
        (["alignment.lora.use_dora=true"], ["DoRA", "alignment"]),
    ],
)
def test_recipes_that_are_refused(overrides, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("world", ["post_hoc=soup", *overrides])
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("changes", "block", "words"),
    [
        ({}, {"lambda_": 1.5}, ["lambda_ must be from 0 to 1", "1.5"]),
        ({"alignment": "none"}, {"gamma": 1.0}, ["alignment is none", "post_hoc.base"]),
        ({"alignment": {"lora": "none"}}, {"gamma": 1.0}, ["changed all weights", "user.lora: none"]),
    ],
)
def test_what_would_stop_it_is_found_before_training(tmp_path, changes, block, words):
    recipe = tiny.recipe(tmp_path)
    recipe["model"] |= {"dtype": "float32"}
    recipe["user"] = {"defense": "sft", "training": recipe["user"]["training"]}
    for key, value in changes.items():
        recipe[key] = value if isinstance(value, str) else {**recipe[key], **value}
    recipe["post_hoc"] = {"defense": "soup", **block}
    with pytest.raises(RecipeError) as caught:
        run(recipe, tmp_path / "out")
    assert all(word in str(caught.value) for word in words)
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"
