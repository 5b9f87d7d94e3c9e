"""Under autocast, LoRA computes with the inputs as they are, and ends with the same weights, bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
import trainers
from holdfast.training import casts


def model(**options):
    """A bfloat16 model with a LoRA in float32."""
    base = tiny.llama(len(trainers.TOKENIZER)).bfloat16()
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **options)
    return get_peft_model(base, config)


def trained(name, out, net, **options):
    """The weights after a training, and the types of the inputs of LoRA's first products."""
    seen = set()
    for key, module in net.named_modules():
        if key.endswith("lora_A.default"):
            assert module.weight.dtype is torch.float32
            module.register_forward_pre_hook(lambda _, inputs: seen.add(inputs[0].dtype))
    made = trainers.trainer(name, out, net=net, max_steps=4, **options)
    made.train()
    assert all(layer.cast_input_dtype_enabled is True for layer in casts.plain_layers(net)), "as before"
    return trainers.weights(made), seen


@pytest.mark.parametrize("name", ["sft", "vaccine"])
def test_the_casts_are_left_out_and_no_weight_changes(name, tmp_path, monkeypatch):
    given = {"bf16": True, "gradient_checkpointing": True}
    found, types = trained(name, tmp_path, model(), **given)
    assert types == {torch.bfloat16}
    monkeypatch.setattr(casts, "plain_layers", lambda model: [])
    expected, types = trained(name, tmp_path, model(), **given)
    assert types == {torch.float32}
    assert trainers.same(found, expected)
    assert max(float(w.abs().max()) for w in found[1::2]) > 1e-3, "LoRA's B, which starts at 0"


def test_without_autocast_inputs_are_cast(tmp_path):
    assert trained("sft", tmp_path, model())[1] == {torch.float32}


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "DoRA"])
def test_layers_that_compute_with_their_inputs_first_are_left_alone(options):
    assert casts.plain_layers(model())
    assert not casts.plain_layers(model(**options))


def test_an_error_in_training_leaves_the_layers_as_they_were():
    net = model()

    def fails():
        with casts.without_undone_casts(net, "cpu"):
            assert not all(layer.cast_input_dtype_enabled is True for layer in casts.plain_layers(net))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fails()
    assert all(layer.cast_input_dtype_enabled is True for layer in casts.plain_layers(net))
