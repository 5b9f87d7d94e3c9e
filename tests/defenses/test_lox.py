"""LoX against dense arithmetic: adapters, whole models, subspace iteration, recipes, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import tiny
from holdfast.defenses import lox as module
from holdfast.defenses.lox import lox
from holdfast.errors import ModelError, RecipeError
from holdfast.recipe import Recipe
from pairs import SEVEN, digest, gpt2, llama, save_adapter, save_pair, weights_of
from repairs import updates
from runs import run


def extrapolated(d, k, alpha):
    """D + alpha U_k U_k^T D by a dense SVD in float64."""
    u = torch.linalg.svd(d.double())[0][:, :k]
    return d.double() + alpha * u @ (u.T @ d.double())


@pytest.mark.parametrize(
    "options", [{"lora_alpha": 3}, {"lora_alpha": 8, "use_rslora": True}], ids=["", "rslora"]
)
@pytest.mark.parametrize("k", [1, 3, 9])
def test_an_adapter_by_dense_arithmetic(tmp_path, k, options):
    """Only B changes; with k at least the rank, the update is multiplied by 1 + alpha."""
    aligned = save_adapter(tmp_path / "aligned", r=4, target_modules=SEVEN, **options)
    before = digest(aligned)
    facts = lox(aligned, tmp_path / "out", k=k, alpha=1.25)
    old, new = updates(aligned, llama), updates(tmp_path / "out", llama)
    for name, d in old.items():
        assert (new[name] - extrapolated(d, k, 1.25)).abs().max() < 1e-6, name
        if k == 9:
            assert (new[name] - 2.25 * d).abs().max() < 1e-6, name
    weights, kept = weights_of(tmp_path / "out"), weights_of(aligned)
    assert all(torch.equal(kept[name], value) for name, value in weights.items() if "lora_A" in name)
    shares = [
        float(values[:k].square().sum() / values.square().sum())
        for values in (torch.linalg.svdvals(d) for d in old.values())
    ]
    assert facts["modules"] == facts["changed"] == 21
    assert facts["energy"] == pytest.approx(sum(shares) / 21)
    assert digest(aligned) == before
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_model_by_dense_arithmetic(tmp_path, make, dtype):
    """Every linear weight, also those stored as (in, out); embeddings and everything else byte for byte."""
    base, aligned = save_pair(tmp_path, make, (dtype, dtype), shard="60KB")
    facts = lox(aligned, tmp_path / "out", base=base, k=3, alpha=0.5)
    b, a, found = (weights_of(folder) for folder in (base, aligned, tmp_path / "out"))
    linear = {
        n for n, v in a.items() if v.ndim == 2 and not any(w in n for w in ("embed", "wte", "wpe", "head"))
    }
    assert found.keys() == a.keys()
    assert facts["changed"] == facts["modules"] == len(linear) > 5
    for name, value in found.items():
        if name not in linear:
            assert torch.equal(value, a[name]), name
            continue
        d = a[name].float() - b[name].float()
        expected = b[name] + (extrapolated(d.T, 3, 0.5).T if make is gpt2 else extrapolated(d, 3, 0.5))
        close = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(value, expected.to(dtype), **close)


def test_subspace_iteration_finds_the_same_directions(monkeypatch):
    """With a spectrum that falls off, and within its own error bound for one that does not."""
    draw = np.random.default_rng(3)
    u, _, vt = np.linalg.svd(draw.standard_normal((60, 80)), full_matrices=False)
    steep = (u * 0.7 ** np.arange(60)) @ vt
    dense = module.of_matrix(steep, 6)
    monkeypatch.setattr(module, "DENSE", 10)
    found = module.of_matrix(steep, 6)
    assert dense.error == 0 < found.error <= 1e-4
    assert found.energy == pytest.approx(dense.energy, rel=1e-6)
    assert np.abs(found.vectors @ found.vectors.T - dense.vectors @ dense.vectors.T).max() < 1e-3
    flat = draw.standard_normal((60, 80))
    found, values = module.of_matrix(flat, 6), np.linalg.svd(flat)[1]
    assert found.error <= 1e-4
    assert found.energy == pytest.approx(np.sum(values[:6] ** 2) / np.sum(values**2), rel=1e-4)
    monkeypatch.setattr(module, "ROUNDS", 1)
    assert module.of_matrix(flat, 6).error == 0, "without convergence the SVD is dense"


def test_a_matrix_of_lower_rank_has_fewer_directions():
    d = np.outer(np.arange(1.0, 6), np.arange(1.0, 4))
    assert module.of_matrix(d, 6).vectors.shape == (5, 1)
    assert module.of_matrix(np.zeros((5, 3)), 6).energy == 0
    assert module.of_product(np.zeros((5, 2)), np.ones((2, 3)), 6).energy == 0


def chain(recipe, out):
    """The row of the last state, and the folder of an adapter by the kind of its step."""
    results, _ = run(recipe, out)
    row = results["rows"][-1]
    return row, {
        kind: out / "steps" / step / "adapter" for kind, step in row["steps"].items() if isinstance(step, str)
    }


def test_a_recipe(tmp_path):
    """SFT, then LoX, then the user stage on top of the result; alpha 0 is plain SFT, bit for bit."""
    recipe = tiny.recipe(tmp_path)
    recipe["user"] = {"defense": "sft", "training": recipe["user"]["training"]}
    _, plain = chain(recipe, tmp_path / "out")
    recipe["alignment"] = {**recipe["alignment"], "defense": "lox", "alpha": 0.0}
    _, same = chain(recipe, tmp_path / "out")
    assert same["alignment"] == plain["alignment"], "the training is shared"
    ours, theirs = weights_of(same["user"]), weights_of(plain["user"])
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    recipe["alignment"] |= {"k": 1, "alpha": 2.0}
    row, found = chain(recipe, tmp_path / "out")
    make = lambda: module_of(tmp_path)  # noqa: E731
    before, after = updates(found["alignment"], make), updates(found["harden"], make)
    for name, d in before.items():
        assert (after[name] - extrapolated(d, 1, 2.0)).abs().max() < 1e-6
    assert (row["alignment"], row["labels"]["lox"], row["seconds"] > 0) == ("lox", "LoX", True)
    assert not torch.equal(*(next(iter(weights_of(part["user"]).values())) for part in (found, plain)))
    recipe["user"]["adapter"] = "continue"
    recipe["user"]["training"] = {**recipe["user"]["training"], "max_steps": 1, "learning_rate": 1e-12}
    _, continued = chain(recipe, tmp_path / "out")
    last = updates(continued["user"], make)
    assert all((last[name] - value).abs().max() < 1e-6 for name, value in after.items())


def module_of(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "model")


def test_all_weights_in_a_recipe_with_a_repair(tmp_path):
    """The repair's aligned model is the one that LoX made."""
    recipe = tiny.recipe(tmp_path)
    recipe["model"] |= {"dtype": "float32", "lora": "none"}
    recipe["alignment"] |= {"defense": "lox", "k": 2}
    recipe["user"] = {"defense": "sft", "training": recipe["user"]["training"]}
    recipe["post_hoc"] = {"defense": "soup", "lambda_": 1.0}
    results, _ = run(recipe, tmp_path / "out")
    steps = results["rows"][-1]["steps"]
    models = {
        kind: tmp_path / "out/steps" / steps[kind] / "model" for kind in ("alignment", "harden", "post_hoc")
    }
    hardened, averaged, aligned = (weights_of(models[kind]) for kind in ("harden", "post_hoc", "alignment"))
    assert all(torch.equal(value, averaged[name]) for name, value in hardened.items())
    assert any(not torch.equal(value, aligned[name]) for name, value in hardened.items())


def test_what_cannot_be_extrapolated_is_refused(tmp_path):
    base, aligned = save_pair(tmp_path)
    with pytest.raises(ModelError, match="also needs the model before its alignment"):
        lox(aligned, tmp_path / "out")
    with pytest.raises(ModelError, match="are the same"):
        lox(base, tmp_path / "out", base=base)
    zero = save_adapter(tmp_path / "zero", std=0.0, r=2, target_modules=SEVEN)
    with pytest.raises(ModelError, match=r"No linear module of .* differs"):
        lox(zero, tmp_path / "out")
    broken = save_adapter(tmp_path / "broken", r=2, target_modules=["q_proj"])
    factors = load_file(broken / "adapter_model.safetensors")
    next(value for name, value in factors.items() if "1.self_attn.q_proj.lora_A" in name)[0, 0] = np.nan
    save_file(factors, broken / "adapter_model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.self_attn\.q_proj.* not finite"):
        lox(broken, tmp_path / "out")
    tensors = load_file(aligned / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
    save_file(tensors, aligned / "model.safetensors")
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.* not finite"):
        lox(aligned, tmp_path / "out", base=base)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 6e4
    save_file(
        {name: value.astype(np.float16) for name, value in tensors.items()}, aligned / "model.safetensors"
    )
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.* does not fit into F16"):
        lox(aligned, tmp_path / "out", base=base)
    with pytest.raises(ValueError, match="k must be at least 1, found 0"):
        lox(aligned, tmp_path / "out", base=base, k=0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["alignment.lora.use_dora=true"], ["alignment.lora.use_dora", "DoRA"]),
        (["alignment.alpha=far"], ["alignment.alpha", "float", "'far'"]),
        (["user.defense=lox"], ["does not act at the user stage"]),
    ],
)
def test_recipes_that_are_refused(overrides, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.load("world", ["alignment.defense=lox", *overrides])
    assert all(word in str(caught.value) for word in words)


def test_a_wrong_value_is_found_before_training(tmp_path):
    recipe = tiny.recipe(tmp_path)
    recipe["alignment"] |= {"defense": "lox", "k": 0}
    with pytest.raises(RecipeError, match=r"alignment\.lox: k must be at least 1, found 0"):
        run(recipe, tmp_path / "out")
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"
