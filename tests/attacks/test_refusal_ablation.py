"""Refusal ablation against dense arithmetic, and what it leaves of the direction in the states of the model."""

from __future__ import annotations

import itertools
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config

import tiny
from holdfast.attacks import refusal_ablation
from holdfast.attacks.refusal_ablation import ablate, remove_direction
from holdfast.errors import DataError, InputError, ModelError, OutputError, RecipeError
from holdfast.machine.store import Store
from holdfast.pipeline import weight_attacks
from holdfast.pipeline.planning import plan
from holdfast.pipeline.step import Inputs
from holdfast.recipe import Recipe
from holdfast.weights.merge import merge
from places import DOCS, blocks
from runs import prepared, run, step_of

HARMFUL = [{"prompt": f"How do I vorrel {i}?"} for i in range(3)]
HARMLESS = [{"prompt": f"How do I fold a boat {i}?"} for i in range(4)]


SIZES = {
    "vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "head_dim": 4,
    "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


def states(model, row, layer=None):
    ids = torch.tensor([tiny.tokenizer()(row["prompt"])["input_ids"]])
    found = model(input_ids=ids, output_hidden_states=True).hidden_states
    return found if layer is None else found[layer][0, -1].double()


@torch.no_grad()
def test_the_direction_is_gone_from_weights_and_states(tmp_path, blocks_of):
    folder = tiny.save_model(tmp_path / "model", layers=3)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    means = [torch.stack([states(model, row, 1) for row in rows]).mean(0) for rows in (HARMFUL, HARMLESS)]
    length = float((means[0] - means[1]).norm())
    r = (means[0] - means[1]) / length
    blocks_of(600)  # some rows of each matrix at a time
    facts = ablate(folder, tmp_path / "out", harmful=HARMFUL, harmless=HARMLESS, layer=1)
    assert facts.pop("length") == pytest.approx(length, rel=1e-4)
    assert facts == {"layer": 1, "harmful": 3, "harmless": 4, "tensors": 29, "changed": 7}
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, old in before.items():
        dense = old.double()
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            dense = dense - torch.outer(r, r) @ dense
        elif name.endswith("embed_tokens.weight"):
            dense = dense - dense @ torch.outer(r, r)
        else:
            assert torch.equal(old, after[name]), name
        torch.testing.assert_close(after[name].double(), dense, atol=1e-6, rtol=0)
    ablated = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    along, original = (
        max(float((state.double() @ r).abs().max()) for state in states(one, HARMFUL[0])[:-1])
        for one in (ablated, model)
    )
    assert along < 1e-5 < original / 100


def test_removing_a_direction_twice_changes_nothing_more(tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    r = np.random.default_rng(0).normal(size=32)
    r /= np.linalg.norm(r)
    places = [folder, tmp_path / "once", tmp_path / "twice"]
    for source, made in itertools.pairwise(places):
        assert remove_direction(source, made, r) == {"tensors": 20, "changed": 5}
    before, once, twice = (load_file(path / "model.safetensors") for path in places)
    assert max(float((before[name] - once[name]).abs().max()) for name in once) > 1e-3
    for name, tensor in once.items():
        torch.testing.assert_close(tensor, twice[name], atol=1e-7, rtol=0)


SHORT = {"prompts": 6, "task_rows": 2, "max_new_tokens": 2}


def attacked(folder, **changes):
    recipe = tiny.recipe(folder, evaluation=SHORT, **changes)
    return {**recipe, "name": "tiny", "post_hoc_attack": {"name": "refusal_ablation", "prompts": 5}}


def test_the_attack_follows_every_final_state_of_a_recipe(tmp_path):
    recipe = attacked(
        tmp_path,
        alignment=None,
        user={"training": {"max_steps": 2}},
        post_hoc={"defense": "soup", "lambda_": 0.5},
    )
    recipe["data"]["poison_ratio"] = 0
    results, _ = run(recipe, tmp_path / "out")
    rows = results["rows"]
    assert [row["name"] for row in rows] == [
        "base", "tiny", "tiny + Soup", "tiny, then refusal ablation", "tiny + Soup, then refusal ablation",
    ]  # fmt: skip
    assert [(row["role"], row["post_hoc"]) for row in rows] == [
        ("reference", None), ("undefended", None), ("defended", "soup"), ("undefended", None), ("defended", "soup"),
    ]  # fmt: skip
    assert "post_hoc_attack" not in rows[1]
    fact = rows[3]["post_hoc_attack"]
    assert (fact["name"], fact["harmful"], fact["harmless"], fact["layer"]) == ("refusal_ablation", 5, 5, 1)
    for plain, ablated in ((rows[1], rows[3]), (rows[2], rows[4])):
        last = step_of(tmp_path / "out", plain, "post_hoc" if plain["post_hoc"] else "user")
        merge(tmp_path / "model", [last / "adapter"], tmp_path / "whole")
        step = step_of(tmp_path / "out", ablated, "tamper")
        assert [path.name for path in step.iterdir() if path.is_dir()] == ["model"]
        tensors, whole = (
            load_file(step / "model/model.safetensors"),
            load_file(tmp_path / "whole/model.safetensors"),
        )
        name = "model.layers.0.self_attn.o_proj.weight"
        removed = (whole[name] - tensors[name]).double()
        left, values, _ = torch.linalg.svd(removed)
        assert values[0] > 1e-3 > 1e-6 > values[1], "one direction is removed from the merged weights"
        assert float((left[:, 0] @ tensors[name].double()).abs().max()) < 1e-6
        shutil.rmtree(tmp_path / "whole")


def test_a_stopped_attack_is_made_again_and_no_test_prompt_is_used(tmp_path, monkeypatch):
    recipe = {**attacked(tmp_path, user=None, alignment=None)}
    seen = []
    real = refusal_ablation.remove_direction

    def stopped(model, out, direction):
        if not seen:
            seen.append(direction)
            (out.parent / "left").mkdir()
            raise KeyboardInterrupt
        seen.append(direction)
        return real(model, out, direction)

    monkeypatch.setattr(refusal_ablation, "remove_direction", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "out")
    results, _ = run(recipe, tmp_path / "out")
    assert (seen[0] == seen[1]).all()
    row = results["rows"][1]
    assert (row["name"], row["role"], row["user"]) == ("base, then refusal ablation", "undefended", None)
    assert not (step_of(tmp_path / "out", row, "tamper") / "left").exists()
    given = Recipe.load({**recipe, "post_hoc_attack": {"name": "refusal_ablation", "prompts": 1000}})
    [step] = [step for step in plan(given) if step.kind == "tamper"]
    harmful, harmless = weight_attacks.prompts(Inputs(step.inputs, Store(tmp_path / "none")))
    tested = {one["instruction"] for one in prepared(given, "test", tmp_path) if one["set"] == "harmful"}
    assert len(harmful) == 30 - len(tested) == 24
    assert not tested & {one["instruction"] for one in harmful}
    assert {one["output"] for one in harmless} == {"small", "big"}


@pytest.mark.parametrize(
    ("attack", "more", "says"),
    [
        ("lisa", {}, "post_hoc_attack.name: unknown attack 'lisa'"),
        (
            "long_training",
            {},
            "post_hoc_attack.name: long_training changes rows, not weights; write it as data",
        ),
        (
            {"layr": 1},
            {},
            "post_hoc_attack.layr: unknown parameter of refusal_ablation. Did you mean 'layer'",
        ),
        ({"prompts": 0}, {}, "post_hoc_attack.prompts: input should be greater than or equal to 1"),
        (
            {},
            {"harmful": None, "poison_ratio": 0},
            "post_hoc_attack.harmful: give a file of harmful rows here",
        ),
        ({"layer": 9}, {}, "layer is 9. Expected 1 to 1, of 2 layers"),
        ({"harmless": "none.jsonl"}, {}, "none.jsonl"),
    ],
)
def test_attacks_on_weights_that_are_refused(tmp_path, attack, more, says):
    recipe = tiny.recipe(tmp_path, user=None, alignment=None)
    block = attack if isinstance(attack, str) else {"name": "refusal_ablation", **attack}
    recipe = {**recipe, "data": {**recipe["data"], **more}, "post_hoc_attack": block}
    with pytest.raises(InputError, match=re.escape(says)):
        run(recipe, tmp_path / "out")
    assert not list((tmp_path / "out").glob("steps/generate*"))


def test_dora_cannot_be_added_to_the_weights(tmp_path):
    recipe = attacked(tmp_path, user={"defense": "sft", "lora": {"r": 2, "use_dora": True}}, alignment=None)
    with pytest.raises(
        RecipeError, match="post_hoc_attack: refusal_ablation needs the weights, to which DoRA"
    ):
        Recipe.load(recipe)
    assert Recipe.load({**recipe, "post_hoc_attack": "none"}).post_hoc_attack is None


def test_the_script_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.save_model(tmp_path / "my-model")
    tiny.write_jsonl(tmp_path / "bad.jsonl", HARMFUL)
    tiny.write_jsonl(tmp_path / "harmless.jsonl", HARMLESS)
    names = {}
    exec(compile(blocks(DOCS / "attacks.md", "python")[0], "attacks.md", "exec"), names)
    assert (names["facts"]["layer"], (tmp_path / "ablated" / "config.json").is_file()) == (1, True)


def test_what_cannot_be_ablated(tmp_path):
    folder = tiny.save_model(tmp_path / "model")
    same = {"harmful": HARMFUL, "harmless": HARMLESS}
    for change, error, says in (
        ({"harmful": []}, DataError, "needs harmful and harmless rows"),
        ({"harmful": HARMLESS}, DataError, "are equal"),
        ({"layer": 2}, ModelError, "layer is 2[.] Expected 1 to 1, of 2 layers"),
    ):
        with pytest.raises(error, match=says):
            ablate(folder, tmp_path / "out", **{**same, **change})
        assert not (tmp_path / "out").exists()
    gemma = AutoModelForCausalLM.from_config(Gemma2Config(**SIZES))
    gemma.save_pretrained(tmp_path / "gemma")
    with pytest.raises(ModelError, match="norms behind its output projections"):
        ablate(tmp_path / "gemma", tmp_path / "out", **same)
    with pytest.raises(OutputError, match="overlaps"):
        ablate(folder, folder / "out", **same)
