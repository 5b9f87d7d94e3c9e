"""A base model that is loaded once gives, under every adapter, what a fresh one gives."""

from __future__ import annotations

import pytest
import torch

import tiny
from holdfast.errors import ModelError
from holdfast.models import loading
from holdfast.models.sharing import Shared


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, two adapters with updates that are not zero, and one with a whole module."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("sharing")
    tiny.save_lively_model(folder / "model")
    for name, options in (
        ("first", {"target_modules": ["q_proj", "v_proj"]}),
        ("second", {"target_modules": ["down_proj"], "use_dora": True}),
        ("whole", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ):
        model = loading.load_model(folder / "model")
        torch.manual_seed(len(name))
        made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
        for key, p in made.named_parameters():
            if "modules_to_save" in key:
                p.data.mul_(2)
        made.save_pretrained(folder / name)
    return folder


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(5, 25)[None]).logits


def test_the_same_numbers_as_a_fresh_model(place):
    shared = Shared()
    seen = []
    for chain in ((), ("first",), ("second",), ("whole",), ("first", "whole"), (), ("second",)):
        adapters = [place / name for name in chain]
        found = logits(shared(place / "model", adapters))
        assert torch.equal(found, logits(loading.load_model(place / "model", adapters)))
        seen.append(found)
    assert shared.loads == 3, "again after each chain with a whole module"
    assert torch.equal(seen[0], seen[5])
    assert not any(torch.allclose(seen[0], other) for other in seen[1:5])


def test_what_changes_the_base_model_loads_it_again(place):
    shared = Shared()
    plain = logits(shared(place / "model", ()))
    merged = logits(shared(place / "model", [place / "first"], compose="merge"))
    assert not torch.allclose(plain, merged)
    assert torch.equal(logits(shared(place / "model", ())), plain)
    assert shared.loads == 2
    shared(place / "model", (), dtype="bfloat16")
    assert shared.loads == 3
    with pytest.raises(ModelError):
        shared(place / "model", [place / "nothing"])
    assert torch.equal(logits(shared(place / "model", ())), plain)
