"""Refusal ablation against dense arithmetic, and what it leaves of the direction in the states of the model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Gemma2Config

import tiny
from holdfast.attacks.refusal_ablation import ablate
from holdfast.errors import DataError, ModelError, OutputError
from places import DOCS, blocks

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
    assert facts == {"layer": 1, "tensors": 29, "changed": 7}
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
