"""Buffer and Reinforce in recipes: what is trained above which adapter, and the merge by dense arithmetic."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from holdfast import pipeline
from holdfast.defenses import Tuned
from holdfast.defenses.reinforce import ReinforceConfig, apply
from holdfast.errors import RecipeError
from holdfast.recipe import Recipe
from holdfast.weights.merge import merge
from pairs import SEVEN, TWO, llama, save_adapter, weights_of
from repairs import updates
from runs import run


def merged(user, refusal, weight, alpha):
    """w dW_user + (1 - w) (I - alpha Q Q^T) dW_refusal of one module, with Q from an SVD of dW_user."""
    q, values, _ = torch.linalg.svd(user, full_matrices=False)
    q = q[:, values > 1e-6 * values[0]]
    return weight * user + (1 - weight) * (refusal - alpha * q @ (q.T @ refusal))


@pytest.mark.parametrize(("weight", "alpha"), [(0.5, 0.1), (0.75, 1.0), (0.5, 0.0)])
def test_the_merge_by_dense_arithmetic(tmp_path, weight, alpha):
    user = save_adapter(tmp_path / "user", r=2, lora_alpha=8, target_modules=TWO)
    refusal = save_adapter(tmp_path / "refusal", std=0.3, r=3, lora_alpha=3, target_modules=SEVEN)
    facts = apply(Tuned(user, tmp_path / "out", refusal=refusal), weight=weight, alpha=alpha)
    first, second, found = (updates(path, llama) for path in (user, refusal, tmp_path / "out"))
    assert found.keys() == second.keys()
    for name, delta in second.items():
        expected = merged(first[name], delta, weight, alpha) if name in first else (1 - weight) * delta
        assert (found[name] - expected).abs().max() < 1e-6, name
    assert facts["modules"] == facts["changed"] == 21
    assert 0 < facts["overlap"] < 1
    assert "not measured" in (tmp_path / "out" / "README.md").read_text()


def both(folder, **changes):
    recipe = tiny.recipe(folder)
    recipe["user"] = {"defense": "buffer", "training": recipe["user"]["training"]}
    recipe["data"]["alignment"] = {
        "source": recipe["data"]["alignment"],
        "harmful": {"source": recipe["data"]["harmful"], "size": 12},
    }
    recipe["post_hoc"] = {"defense": "reinforce", "alpha": 1.0}
    return {**recipe, **changes}


def test_a_recipe(tmp_path):
    """The user's adapter is that of SFT on the model with the harmful adapter, and is used without it."""
    results, _ = run(both(tmp_path), tmp_path / "out")
    row = results["rows"][-1]
    made = {step["kind"]: tmp_path / "out/steps" / step["id"] / "adapter" for step in results["steps"]}
    harmful, refusal, aligned = (
        made[f"{kind}"] for kind in ("harmful_adapter", "refusal_adapter", "alignment")
    )
    assert (row["name"], row["user"], row["post_hoc"]) == ("tiny + Reinforce", "buffer", "reinforce")
    merge(tmp_path / "model", [aligned, harmful], tmp_path / "jailbroken")
    sft = both(tmp_path, alignment="none", post_hoc=None)
    sft["model"] = {**sft["model"], "path": str(tmp_path / "jailbroken")}
    sft["user"] = {**sft["user"], "defense": "sft"}
    plain, _ = run(sft, tmp_path / "out")
    ours = weights_of(made["user"])
    theirs = weights_of(tmp_path / "out/steps" / plain["rows"][-1]["steps"]["user"] / "adapter")
    assert all((ours[name] - value).abs().max() < 1e-5 for name, value in theirs.items())
    records = [
        json.loads((made[kind] / "holdfast_adapter.json").read_text())
        for kind in ("user", "refusal_adapter", "post_hoc")
    ]
    assert records[0] == records[1] == records[2], "on the alignment adapter, without the harmful one"
    assert len(records[0]["trained_on_top_of"]) == 1
    assert "used without it" in (made["user"] / "README.md").read_text()
    load = lambda: AutoModelForCausalLM.from_pretrained(tmp_path / "model")  # noqa: E731
    first, second, found = (updates(path, load) for path in (made["user"], refusal, made["post_hoc"]))
    for name, delta in second.items():
        assert (found[name] - merged(first[name], delta, 0.5, 1.0)).abs().max() < 1e-6
    assert row["repair"]["modules"] == len(second)


def test_the_adapters_are_shared(tmp_path):
    """Another poison ratio trains the user's adapter again; Reinforce alone needs the same two."""

    def steps(*overrides):
        planned = pipeline.plan(Recipe.load(both(tmp_path), overrides))
        return {step.kind: step.id for step in planned if "adapter" in step.kind or step.kind == "user"}

    first, second = steps(), steps("data.poison_ratio=0.2")
    assert first["user"] != second["user"]
    assert first.keys() == {"harmful_adapter", "refusal_adapter", "user"}
    assert all(first[kind] == second[kind] for kind in ("harmful_adapter", "refusal_adapter"))
    alone = steps("user.defense=sft")
    assert {**alone, "user": first["user"]} == first
    assert "refusal_adapter" not in steps("post_hoc=none")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["user.lora=none", "post_hoc=none"], ["user", "needs a new LoRA above it"]),
        (["user.adapter=continue", "post_hoc=none"], ["user", "needs a new LoRA above it"]),
        (["data.harmful=null", "data.alignment.harmful=null", "data.poison_ratio=0"], ["needs harmful rows"]),
        (["user.defense=sft", "user.lora=none"], ["reinforce does not repair all weights"]),
        (["user.lora.use_dora=true", "alignment=none", "post_hoc=none"], ["DoRA"]),
    ],
)
def test_recipes_that_are_refused(tmp_path, overrides, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(both(tmp_path), overrides)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("name", ["weight", "alpha"])
def test_values_that_cannot_be_used(name):
    with pytest.raises(ValueError, match=f"{name} must be from 0 to 1"):
        ReinforceConfig(**{name: 1.5})
