"""The records of an adapter folder equal PEFT's own modules, and anything but plain LoRA is refused by name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file

import tiny
from holdfast.errors import ModelError
from holdfast.weights.adapter import kind_of, layer_of, natural, read_adapter
from pairs import SEVEN, gpt2


def mixture():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2, pad_token_id=0,
        )
    )  # fmt: skip


def save(folder, model=None, name="default", **options):
    """An adapter folder whose factors are random, and the PEFT model that it came from."""
    made = get_peft_model(model or tiny.llama(400), LoraConfig(task_type="CAUSAL_LM", **options), name)
    torch.manual_seed(1)
    for key, p in made.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.1)
    made.save_pretrained(folder)
    return made


CONFIGURATIONS = {
    "list": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
    "string": {"r": 4, "target_modules": r".*\.(q|down)_proj"},
    "all-linear": {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"},
    "one layer": {"r": 4, "target_modules": SEVEN, "layers_to_transform": [1]},
    "patterns": {
        "r": 4, "target_modules": SEVEN, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\..*": 6},
        "alpha_pattern": {"layers.0.self_attn.q_proj": 7, "down_proj": 1},
    },
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True, "target_modules": SEVEN},
    "rslora, patterns": {
        "r": 4, "use_rslora": True, "target_modules": SEVEN, "rank_pattern": {"v_proj": 9},
        "alpha_pattern": {"v_proj": 2},
    },
    "r is out": {"r": 32, "target_modules": ["q_proj"]},
    "tied output head": {"r": 4, "target_modules": ["lm_head", "q_proj"]},
    "whole modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "embeddings": {"r": 4, "target_modules": ["q_proj", "embed_tokens"]},
    "gaussian": {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "gpt2": {"r": 4, "model": gpt2, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "mixture": {"r": 4, "model": mixture, "target_modules": ["q_proj", "k_proj"]},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGURATIONS)
def test_records_are_pefts_own_modules(tmp_path, case):
    options = dict(CONFIGURATIONS[case])
    make = options.pop("model", lambda: tiny.llama(400))
    save(tmp_path, make(), **options)
    loaded = PeftModel.from_pretrained(make(), tmp_path).base_model.model
    theirs = {
        name: module
        for name, module in loaded.named_modules()
        if "default" in getattr(module, "lora_A", {}) and hasattr(module, "scaling")
    }
    with read_adapter(tmp_path) as adapter:
        assert [m.name for m in adapter.modules] == sorted(theirs, key=natural)
        for mine in adapter.modules:
            their = theirs[mine.name]
            assert mine.scaling == their.scaling["default"]
            assert mine.rank == their.r["default"]
            assert mine.shape == (their.out_features, their.in_features)
            update = mine.scaling * (mine.b.read() @ mine.a.read())
            assert mine.fan_in_fan_out == their.fan_in_fan_out
            update = update.T if mine.fan_in_fan_out else update
            assert np.allclose(update, their.get_delta_weight("default").detach().numpy(), atol=1e-6)
        apart = [k for k in load_file(tmp_path / "adapter_model.safetensors") if ".lora_A.weight" not in k and ".lora_B.weight" not in k]  # fmt: skip
        assert list(adapter.left_alone) == sorted(apart)
        assert bool(apart) == (case in ("whole modules", "embeddings", "tied output head"))
        # PEFT also saves a copy of a tied head, whose LoRA is not left out.
        assert bool(adapter.notes) == (case in ("whole modules", "embeddings"))


def test_dtypes_may_be_mixed(tmp_path):
    save(tmp_path, target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    kinds = [torch.bfloat16, torch.float16, torch.float32]
    tensors = {k: v.to(kinds[i % 3]) for i, (k, v) in enumerate(tensors.items())}
    save_file(tensors, path, {"format": "pt"})
    with read_adapter(tmp_path) as adapter:
        for m in adapter.modules:
            for part, factor in (("A", m.a), ("B", m.b)):
                key = f"base_model.model.{m.name}.lora_{part}.weight"
                assert np.array_equal(factor.read(), tensors[key].float().numpy())


def test_several_adapters_in_a_folder(tmp_path):
    made = save(tmp_path / "both", name="default", target_modules=["q_proj"])
    made.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    made.save_pretrained(tmp_path / "both")
    with read_adapter(tmp_path / "both") as adapter:
        assert {m.kind for m in adapter.modules} == {"q_proj"}
        assert "second" in adapter.notes[-1]
    with read_adapter(tmp_path / "both" / "second") as adapter:
        assert {m.kind for m in adapter.modules} == {"v_proj"}
    made.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    with read_adapter(tmp_path / "one") as adapter:
        assert adapter.folder == tmp_path / "one" / "second"
    made.add_adapter("third", LoraConfig(task_type="CAUSAL_LM", target_modules=["v_proj"]))
    made.save_pretrained(tmp_path / "two", selected_adapters=["second", "third"])
    with pytest.raises(ModelError, match=r"2 adapters: second, third\. Name one"):
        read_adapter(tmp_path / "two")


REFUSED = {
    "dora": ({"use_dora": True}, "use_dora is set; DoRA .* Merge it"),
    "bias": ({"bias": "all"}, "bias is 'all'"),
    "lora bias": ({"lora_bias": True}, "lora_bias is set"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights is 'olora'"),
    "layers twice": ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication is set"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_another_update_than_b_a_is_refused_by_name(tmp_path, case):
    options, message = REFUSED[case]
    save(tmp_path, target_modules=["q_proj"], **options)
    with pytest.raises(ModelError, match=message):
        read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_experts_as_parameters_are_refused_by_name(tmp_path):
    save(tmp_path, mixture(), target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(ModelError, match="target_parameters is set"):
        read_adapter(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "IA3"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "PREFIX_TUNING"),
    ],
)
def test_other_kinds_of_adapter_are_refused_by_name(tmp_path, config, name):
    get_peft_model(tiny.llama(400), config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=f"expected a LoRA adapter.*found {name}"):
        read_adapter(tmp_path)


def broken(tmp_path, change_config=None, change_tensors=None):
    save(tmp_path, target_modules=["q_proj"])
    config, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **(change_config or {})}))
    if change_tensors:
        tensors = load_file(path)
        change_tensors(tensors)
        save_file(tensors, path)
    return tmp_path


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "its rank is 5"),
        ({"r": 0}, "a positive number for r"),
        ({"r": True}, "a positive number for r"),
        ({"lora_alpha": "many"}, "a positive number for lora_alpha"),
        ({"lora_alpha": float("nan")}, "a positive number for lora_alpha"),
        ({"rank_pattern": [3]}, "rank_pattern is not a table"),
        ({"alpha_pattern": {"(": 3}}, "which is not a valid pattern"),
        ({"alpha_pattern": {"q_proj": None}}, "a positive number for alpha_pattern"),
        ({"peft_type": ["LORA"]}, "expected a LoRA adapter"),
        ({"init_lora_weights": 1}, "init_lora_weights is '1'"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read_adapter(broken(tmp_path, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{KEY}.lora_A.weight"), "has only lora_B"),
        (lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(32)}), "not part of a plain LoRA"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8)}), r"shape \[8\]"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, 0)}), r"shape \[8, 0\]"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, 32, 1, 1)}), "convolutions"),
        (lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(8, 32).int()}), "stored as I32"),
        (lambda t: t.update({"model.q_proj.lora_A.weight": torch.ones(8, 32)}), "would not load"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read_adapter(broken(tmp_path, None, change))


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ModelError, match="No such adapter folder"):
        read_adapter(tmp_path / "nothing")
    with pytest.raises(ModelError, match="found none at"):
        read_adapter(tmp_path)
    with pytest.raises(ModelError, match="neither a local folder nor in the local Hub cache"):
        read_adapter("nobody/nothing")
    save(tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter_model.safetensors"
    path.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"adapter_model\.bin, which can run code"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_model.bin").unlink()
    with pytest.raises(ModelError, match="is missing"):
        read_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match="is not JSON"):
        read_adapter(tmp_path)


def test_names_tell_layer_and_kind():
    assert layer_of("model.layers.10.mlp.experts.3.w1") == 10
    assert layer_of("lm_head") is None
    assert kind_of("model.layers.10.mlp.experts.3") == "experts"
    names = ["model.layers.10.q", "model.layers.2.q", "lm_head", "model.layers.2.k"]
    assert sorted(names, key=natural) == ["lm_head", "model.layers.2.k", "model.layers.2.q", "model.layers.10.q"]  # fmt: skip
