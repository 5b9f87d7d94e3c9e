"""Safe LoRA against a dense float64 calculation of the paper's formulas, on every kind of adapter."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

import holdfast
import tiny
from holdfast.errors import ModelError, RecipeError
from holdfast.weights.adapter import natural
from pairs import SEVEN, TWO, gpt2, llama, save_adapter, save_pair, weights_of
from repairs import close, dense, run, updates

CASES = {
    "two modules": {"target_modules": TWO},
    "all modules, GQA": {"target_modules": SEVEN},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*layers\.[12].*\.(v|down)_proj"},
    "patterns, rsLoRA": {
        "target_modules": SEVEN, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2},
    },
    "r is out": {"target_modules": ["q_proj", "k_proj"], "r": 16},
    "tied head": {"target_modules": [*TWO, "lm_head"]},
    "whole modules": {"target_modules": TWO, "modules_to_save": ["norm"]},
    "embeddings": {"target_modules": [*TWO, "embed_tokens"]},
    "gpt2": {"make": gpt2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "gpt2 and head": {"make": gpt2, "target_modules": ["c_attn", "c_proj", "c_fc", "lm_head"]},
    "bf16": {"target_modules": SEVEN, "dtypes": (torch.bfloat16, torch.bfloat16)},
    "bf16 gpt2": {
        "make": gpt2, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True,
        "dtypes": (torch.bfloat16, torch.bfloat16),
    },
    "mixed": {"target_modules": SEVEN, "dtypes": (torch.float16, torch.bfloat16)},
    "mixed, other way": {"target_modules": SEVEN, "dtypes": (torch.bfloat16, torch.float32)},
    "shards": {"target_modules": SEVEN, "shard": "30KB"},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "device"),
    [(case, "cpu") for case in CASES] + [(case, "cpu:0") for case in ("two modules", "gpt2", "mixed")],
)
def test_it_is_the_papers_formula(tmp_path, case, device):
    """device="cpu:0" goes through torch, as "cuda" would."""
    options = dict(CASES[case])
    make = options.pop("make", llama)
    pair = {k: options.pop(k) for k in ("dtypes", "shard") if k in options}
    base, aligned = save_pair(tmp_path, make, **pair)
    adapter = save_adapter(tmp_path / "adapter", make, **options)
    expected = dense(base, aligned, adapter, make, lambda n: make is gpt2 and n != "lm_head")
    values = sorted(e["cosine"] for e in expected.values())
    threshold = (values[len(values) // 2] + values[len(values) // 2 - 1]) / 2
    out = tmp_path / "out"
    result = holdfast.safe_lora(
        adapter, base=base, aligned=aligned, out=out, threshold=threshold, device=device
    )
    assert [m.name for m in result.modules] == sorted(expected, key=natural)
    after = updates(out, make)
    for m in result.modules:
        e = expected[m.name]
        assert abs(m.cosine - e["cosine"]) < 1e-5
        assert m.projected == (e["cosine"] < threshold)
        assert close(after[m.name], e["approx"] if m.projected else e["delta"])
        assert np.isclose(m.norm_before, float(torch.linalg.norm(e["delta"])), rtol=1e-5)
        assert np.isclose(m.norm_after, float(torch.linalg.norm(after[m.name])), rtol=1e-5)
    assert 0 < len(result.projected) < len(expected)
    assert result.share == len(result.projected) / len(expected)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_exact_projector(three, tmp_path, dtype):
    """The projector is the identity for V of full row rank (q_proj: 32 x 32, k_proj: 16 x 32), but not for 48 x 32."""
    result = run(three, tmp_path / "out", num_layers=21, projection="exact", dtype=dtype)
    expected, after = dense(*three), updates(tmp_path / "out", llama)
    for m in result.modules:
        assert m.projected
        assert close(after[m.name], expected[m.name]["exact"], 1e-4)
        identity = m.kind not in ("up_proj", "gate_proj")
        assert m.direction_rank == (16 if m.kind in ("k_proj", "v_proj") else 32)
        assert (m.note is not None) == identity
        assert close(after[m.name], expected[m.name]["delta"], 1e-7) == identity
    assert any("15 of the 21 chosen modules, which did not change" in note for note in result.notes)


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_exact_projector_where_v_has_low_rank(tmp_path, make, dtype):
    """From zero to small integers / 32, which are exact in bf16 too: V has rank 4 in both dtypes."""
    base, aligned = tmp_path / "base", tmp_path / "aligned"
    torch.manual_seed(3)
    for folder, scale in ((base, 0), (aligned, 1 / 32)):
        model = make()
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim == 2:
                    p.copy_((torch.randn(p.shape[0], 4).sign() @ torch.randn(4, p.shape[1]).sign()) * scale)
        model.to(dtype).save_pretrained(folder)
    targets = SEVEN if make is llama else ["c_attn", "c_proj", "c_fc"]
    adapter = save_adapter(tmp_path / "a", make, target_modules=targets, fan_in_fan_out=make is gpt2)
    result = holdfast.safe_lora(
        adapter, base=base, aligned=aligned, out=tmp_path / "out", threshold=1.0, projection="exact"
    )
    after, before, first, second = updates(tmp_path / "out", make), updates(adapter, make), weights_of(base), weights_of(aligned)  # fmt: skip
    for m in result.modules:
        assert m.direction_rank == 4
        v = second[f"{m.name}.weight"].double() - first[f"{m.name}.weight"].double()
        u = torch.linalg.svd(v.T if make is gpt2 else v)[0][:, :4]
        assert close(after[m.name], u @ (u.T @ before[m.name]), 1e-3)
        assert m.norm_after < 0.9 * m.norm_before


def test_normalised_is_cs_direction_with_the_updates_norm(three, tmp_path):
    result = run(three, tmp_path / "out", threshold=1.0, projection="normalised")
    expected, after = dense(*three), updates(tmp_path / "out", llama)
    for m in result.modules:
        e = expected[m.name]
        turned = e["approx"] * torch.linalg.norm(e["delta"]) / torch.linalg.norm(e["approx"])
        assert close(after[m.name], turned)
        assert np.isclose(m.norm_after, m.norm_before, rtol=1e-5)


def test_normalised_does_not_depend_on_the_scale_of_v(three, tmp_path):
    base, aligned, adapter = three
    shutil.copytree(aligned, tmp_path / "far")
    first, second = weights_of(base), weights_of(aligned)
    far = {k: first[k] + 4 * (second[k] - first[k]) for k in first}
    save_file(far, tmp_path / "far" / "model.safetensors", {"format": "pt"})
    for projection in ("normalised", "approx"):
        run(three, tmp_path / "near-out", threshold=1.0, projection=projection)
        run((base, tmp_path / "far", adapter), tmp_path / "far-out", threshold=1.0, projection=projection)
        near, away = updates(tmp_path / "near-out", llama), updates(tmp_path / "far-out", llama)
        scale = 4 if projection == "approx" else 1
        assert all(close(away[n], scale * near[n], 1e-4) for n in near)


def test_zeros_are_said_and_not_projected(three, tmp_path):
    base, aligned, adapter = three
    shutil.copytree(aligned, tmp_path / "aligned")
    first, second = weights_of(base), weights_of(aligned)
    same, nothing, cancel = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj")  # fmt: skip
    second[f"{same}.weight"] = first[f"{same}.weight"]
    save_file(second, tmp_path / "aligned" / "model.safetensors", {"format": "pt"})
    shutil.copytree(adapter, tmp_path / "adapter")
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors[f"base_model.model.{nothing}.lora_B.weight"].zero_()
    a = tensors[f"base_model.model.{cancel}.lora_A.weight"]  # ranks that cancel each other up to rounding
    b = tensors[f"base_model.model.{cancel}.lora_B.weight"]
    a[3:], b[:, 3:] = 0, 0
    a[2], b[:] = a[0] + a[1], b[:, :1].clone() * torch.tensor([1.0, 1, -1, 0, 0, 0, 0, 0])
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    pair = (base, tmp_path / "aligned", tmp_path / "adapter")
    result = run(pair, tmp_path / "out", threshold=1.0)
    found = {m.name: m for m in result.modules}
    for name in (same, nothing, cancel):
        assert found[name].cosine is None
        assert not found[name].projected
    assert found[same].direction_norm == 0
    assert sum("V is zero in 1 of 21" in n or "The update is zero in 2 of 21" in n for n in result.notes) == 2
    json.loads((tmp_path / "out" / "safe_lora.json").read_text(), parse_constant=pytest.fail)
    with pytest.raises(RecipeError, match="only 18 modules can be projected"):
        run(pair, tmp_path / "more", num_layers=19)
    assert not (tmp_path / "more").exists()
    with pytest.raises(ModelError, match="Base and aligned are the same"):
        run((base, base, adapter), tmp_path / "more", threshold=1.0)
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("scale", [1e-34, 1e34])
def test_neither_small_nor_large_updates_leave_the_range_of_float32(three, tmp_path, scale):
    adapter = shutil.copytree(three[2], tmp_path / "a")
    path = adapter / "adapter_model.safetensors"
    tensors = {k: t * scale if "lora_B" in k else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    plain = {m.name: m for m in run(three, dry_run=True).modules}
    result = run((*three[:2], adapter), tmp_path / "out", threshold=1.0)
    for m in result.modules:
        assert abs(m.cosine - plain[m.name].cosine) < 1e-4
        assert np.isclose(m.norm_before, plain[m.name].norm_before * scale, rtol=1e-4)
    after = updates(tmp_path / "out", llama)
    assert all(close(after[n] / scale, e["approx"], 1e-3) for n, e in dense(*three).items())


def test_a_fresh_adapter_is_the_identity(three, tmp_path):
    """Before training, B is zero."""
    get_peft_model(llama(), LoraConfig(task_type="CAUSAL_LM", target_modules=TWO)).save_pretrained(
        tmp_path / "a"
    )
    result = run((*three[:2], tmp_path / "a"), tmp_path / "out", threshold=1.0)
    assert not result.projected
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()


def test_an_update_outside_the_direction_has_cosine_zero(tmp_path):
    """V acts only on the first two rows, the update only on the last: C dW = 0."""
    model = tiny.llama(400)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight[:2] += 0.1
    model.save_pretrained(tmp_path / "aligned")
    adapter = save_adapter(tmp_path / "a", lambda: tiny.llama(400), target_modules=["q_proj"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key in tensors:
        if "lora_B" in key:
            tensors[key][:-1] = 0
    save_file(tensors, adapter / "adapter_model.safetensors")
    for projection in ("approx", "normalised", "exact"):
        result = holdfast.safe_lora(
            adapter, base=tmp_path / "base", aligned=tmp_path / "aligned", out=tmp_path / "out",
            threshold=0.1, projection=projection,
        )  # fmt: skip
        assert [m.cosine for m in result.modules] == [0, 0]
        assert all(m.projected and abs(m.norm_after) < 1e-5 for m in result.modules)


def test_aligned_may_be_an_alignment_adapter(three, tmp_path):
    """V of the adapter is V of the merged model; modules that it does not adapt have no direction."""
    base, _, adapter = three
    guide = save_adapter(tmp_path / "guide", r=4, lora_alpha=6, target_modules=[*TWO, "up_proj"])
    merged = PeftModel.from_pretrained(llama(), guide).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for projection in ("approx", "exact"):
        outs = [tmp_path / f"{projection}-{kind}" for kind in ("guide", "merged")]
        one = run((base, guide, adapter), outs[0], num_layers=9, projection=projection)
        two = run((base, tmp_path / "merged", adapter), outs[1], num_layers=9, projection=projection)
        for a, b in zip(one.modules, two.modules, strict=True):
            assert (a.cosine is None) == (b.cosine is None) == (a.kind not in (*TWO, "up_proj"))
            assert a.cosine is None or abs(a.cosine - b.cosine) < 1e-4
        first, second = updates(outs[0], llama), updates(outs[1], llama)
        assert all(close(first[n], second[n], 1e-3) for n in first)
    with pytest.raises(ModelError, match="adapts none of the modules"):
        run((base, save_adapter(tmp_path / "other", target_modules=["lm_head"]), adapter), tmp_path / "o", threshold=1)  # fmt: skip


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("options", [{}, {"projection": "normalised"}, {"control": "drop"}], ids=str)
def test_full_weights_give_what_the_adapter_gives(tmp_path, make, options):
    """Merged path = adapter path: the tuned model is aligned + adapter."""
    base, aligned = save_pair(tmp_path, make)
    targets = SEVEN if make is llama else ["c_attn", "c_proj", "c_fc"]
    adapter = save_adapter(tmp_path / "adapter", make, target_modules=targets, fan_in_fan_out=make is gpt2)
    model = type(make()).from_pretrained(aligned)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(
        tmp_path / "tuned", max_shard_size="30KB"
    )
    sources = {"base": base, "aligned": aligned, "num_layers": 5, **options}
    full = holdfast.safe_lora(tmp_path / "tuned", out=tmp_path / "full", **sources)
    lora = holdfast.safe_lora(adapter, out=tmp_path / "lora", **sources)
    assert [m.name for m in full.projected] == [m.name for m in lora.projected]
    for a, b in zip(full.modules, lora.modules, strict=True):
        assert abs(a.cosine - b.cosine) < 1e-4
        assert np.isclose(a.norm_after, b.norm_after, rtol=1e-3, atol=1e-5)
    repaired = weights_of(tmp_path / "full")
    merged = PeftModel.from_pretrained(
        type(make()).from_pretrained(aligned), tmp_path / "lora"
    ).merge_and_unload()
    for name, p in merged.state_dict().items():
        assert name not in repaired or torch.allclose(repaired[name], p, atol=1e-5)
    tuned = weights_of(tmp_path / "tuned")
    chosen = {f"{m.name}.weight" for m in full.projected}
    assert {n for n in tuned if not torch.equal(tuned[n], repaired[n])} == chosen
    type(make()).from_pretrained(tmp_path / "full")
    assert len(list((tmp_path / "full").glob("*.safetensors"))) > 1
    assert any("embed" in n or "wte" in n for n in full.left_alone)


def test_what_full_weights_leave_alone_is_said_and_stacked_experts_are_refused(tmp_path):
    base, aligned = save_pair(tmp_path)
    tuned = shutil.copytree(aligned, tmp_path / "tuned")
    with pytest.raises(ModelError, match="are the same"):
        holdfast.safe_lora(tuned, base=base, aligned=aligned, out=tmp_path / "o", threshold=1.0)
    tensors = {k: v + 0.01 for k, v in weights_of(tuned).items()}
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    result = holdfast.safe_lora(tuned, base=base, aligned=aligned, out=tmp_path / "out", threshold=1.0)
    (note,) = [note for note in result.notes if "Left as they are" in note]
    assert note.endswith("embed_tokens, input_layernorm, norm, post_attention_layernorm.")
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.zeros(2, 32, 48)
    save_file(tensors, tuned / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"layers\.1\.mlp\.experts\.gate_up_proj.*all experts.*\[2, 32, 48\]"
    ):
        holdfast.safe_lora(tuned, base=base, aligned=aligned, out=tmp_path / "o", threshold=1.0)


def test_a_head_with_lora_is_not_said_to_be_left_alone(three, tmp_path):
    """PEFT also saves a copy of the head's own weight."""
    adapter = save_adapter(tmp_path / "a", target_modules=[*TWO, "lm_head"])
    result = run((*three[:2], adapter), tmp_path / "out", threshold=1.0)
    assert any("lm_head.base_layer" in name for name in result.left_alone)
    assert "lm_head" in {m.name for m in result.projected}
    assert not result.notes


def test_full_weights_exactly(tmp_path):
    base, aligned = save_pair(tmp_path)
    adapter = save_adapter(tmp_path / "adapter", target_modules=SEVEN)
    model = PeftModel.from_pretrained(type(llama()).from_pretrained(aligned), adapter).merge_and_unload()
    model.save_pretrained(tmp_path / "tuned")
    holdfast.safe_lora(
        tmp_path / "tuned",
        base=base,
        aligned=aligned,
        out=tmp_path / "out",
        threshold=1.0,
        projection="exact",
    )
    repaired, second = weights_of(tmp_path / "out"), weights_of(aligned)
    for name, e in dense(base, aligned, adapter).items():
        assert torch.allclose(
            repaired[f"{name}.weight"], second[f"{name}.weight"] + e["exact"].float(), atol=1e-4
        )
    with pytest.raises(RecipeError, match="merged aligned model"):
        holdfast.safe_lora(tmp_path / "tuned", base=base, aligned=adapter, out=tmp_path / "o", threshold=1.0)
