"""`apply_safe_lora` on a model in memory: the numbers of the command, and a model as before after an error."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import holdfast
from holdfast.errors import ModelError, RecipeError
from pairs import SEVEN, TWO, gpt2, llama, save_adapter, save_pair, weights_of

CASES = {
    "plain": {"target_modules": SEVEN},
    "patterns, rsLoRA": {
        "target_modules": SEVEN, "use_rslora": True, "rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 2},
    },
    "head, embedding, whole modules": {
        "target_modules": [*TWO, "lm_head", "embed_tokens"], "modules_to_save": ["norm"],
    },
    "gpt2": {"make": gpt2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
    "bf16": {"target_modules": SEVEN, "dtypes": (torch.bfloat16, torch.bfloat16), "dtype": torch.bfloat16},
}  # fmt: skip


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_the_numbers_of_the_command(tmp_path, case):
    gate = (
        {"threshold": "suggest", "projection": "exact"} if case.startswith("patterns") else {"num_layers": 2}
    )
    options = dict(CASES[case])
    make = options.pop("make", llama)
    base, aligned = save_pair(tmp_path, make, **{k: options.pop(k) for k in ("dtypes",) if k in options})
    adapter = save_adapter(tmp_path / "adapter", make, **options)
    expected = holdfast.safe_lora(adapter, base=base, aligned=aligned, out=tmp_path / "out", **gate)

    model = PeftModel.from_pretrained(load(aligned), adapter, autocast_adapter_dtype=False)
    old = {k: v.clone() for k, v in model.state_dict().items()}
    own = (
        model.get_base_model() if case == "plain" else load(aligned)
    )  # a saved embedding replaces the model's
    found = holdfast.apply_safe_lora(model, load(base), own, **gate)
    assert found.modules == expected.modules
    assert (found.options, found.notes) == (expected.options, expected.notes)
    assert found.left_alone == tuple(name for name in expected.left_alone if ".base_layer." not in name)
    assert 0 < len(found.projected) < len(found.modules)
    assert model.active_adapters == ["safe_lora"]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in old.items()), "the old adapter stays"
    model.save_pretrained(tmp_path / "saved")
    saved, written = weights_of(tmp_path / "saved" / "safe_lora"), weights_of(tmp_path / "out")
    assert saved.keys() == written.keys()
    assert all(torch.equal(saved[k], written[k]) and saved[k].dtype == written[k].dtype for k in saved)


@pytest.fixture
def three(tmp_path):
    return *save_pair(tmp_path), save_adapter(tmp_path / "adapter", target_modules=TWO)


def test_folders_modules_and_an_alignment_adapter(three, tmp_path):
    base, aligned, adapter = three
    guide = save_adapter(tmp_path / "guide", target_modules=TWO, r=3, std=0.2)
    for number, (place, given, first) in enumerate(
        ((aligned, str(aligned), load(base)), (aligned, load(aligned), str(base)), (guide, guide, load(base)))
    ):
        expected = holdfast.safe_lora(
            adapter, base=base, aligned=place, out=tmp_path / f"{number}", num_layers=1
        )
        model = PeftModel.from_pretrained(load(aligned), adapter)
        found = holdfast.apply_safe_lora(model, first, given, num_layers=1, new_adapter_name="new")
        assert found.modules == expected.modules
        for role, source in (("base", first), ("aligned", given)):
            told = expected.sources[role]["fingerprint"] if not hasattr(source, "forward") else "in memory"
            assert found.sources[role]["fingerprint"] == told


def test_other_adapters_of_the_model_are_not_touched_and_the_new_one_trains(three):
    base, aligned, adapter = three
    model = PeftModel.from_pretrained(load(aligned), adapter, adapter_name="user")
    model.add_adapter("other", LoraConfig(r=5, target_modules=TWO, task_type="CAUSAL_LM"))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    holdfast.apply_safe_lora(model, base, aligned, adapter_name="user", threshold=1.0)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".safe_lora." in name for name in trained)
    assert model.peft_config["safe_lora"] is not model.peft_config["user"]


REFUSED = {
    "no gate": ({}, RecipeError, "threshold or num_layers"),
    "no such adapter": ({"adapter_name": "defualt", "threshold": 0.5}, RecipeError, "Did you mean 'default'"),
    "a taken name": ({"new_adapter_name": "default", "threshold": 0.5}, RecipeError, "already has"),
    "too many": ({"num_layers": 99}, RecipeError, "only 6 modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(three, case):
    options, kind, text = REFUSED[case]
    base, aligned, adapter = three
    model = PeftModel.from_pretrained(load(aligned), adapter)
    before = deepcopy(model.state_dict())
    with pytest.raises(kind, match=text):
        holdfast.apply_safe_lora(model, base, aligned, **options)
    assert list(model.peft_config) == ["default"]
    assert before.keys() == model.state_dict().keys()


def test_models_that_cannot_be_used(three):
    base, aligned, adapter = three
    model = PeftModel.from_pretrained(load(aligned), adapter)

    def refused(text, base, aligned, model=model, kind=ModelError):
        with pytest.raises(kind, match=text):
            holdfast.apply_safe_lora(model, base, aligned, threshold=0.5)

    refused("base is a PeftModel", model, aligned)
    refused("aligned: expected a module, a folder or a Hub id, found int", base, 3)
    refused("no direction", base, load(base))
    refused("offloaded", base, load(aligned).to("meta"))
    whole = load(aligned).requires_grad_(False)
    for p in whole.parameters():
        p.data = p.data.to(torch.int8)
    refused("stored as int8", base, whole)
    refused("Expected a PeftModel", base, aligned, load(base), RecipeError)
    dora = get_peft_model(load(aligned), LoraConfig(target_modules=TWO, use_dora=True))
    refused("use_dora", base, aligned, dora)
    model.merge_adapter()
    refused("unmerge_adapter", base, load(aligned), kind=RecipeError)
    other = PeftModel.from_pretrained(load(aligned), adapter)
    refused("merged into aligned", base, model.get_base_model(), other)
