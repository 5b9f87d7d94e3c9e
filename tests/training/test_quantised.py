"""8-bit layers keep no inputs while LoRA on them trains, and the weights are the same, bit for bit."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
import trainers
from holdfast.models.loading import load_model
from holdfast.training import quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two layers on disk."""
    pytest.importorskip("bitsandbytes")
    place = tmp_path_factory.mktemp("model")
    tiny.llama(len(trainers.TOKENIZER)).save_pretrained(place)
    return place


def trained(folder, name, out):
    """The weights after a training with checkpointing, and whether each forward left an input behind."""
    base = load_model(folder, quantization="int8", dtype="float32", device="cpu")
    torch.manual_seed(3)
    net = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))
    kept = []

    def note(module, inputs, output):
        if output.grad_fn is not None:
            tensors = getattr(output.grad_fn, "tensors", None) or [output.grad_fn.A]
            kept.append(any(tensor is not None for tensor in tensors))

    made = trainers.trainer(name, out, net=net, max_steps=2, gradient_checkpointing=True)
    layers = quantised.frozen_layers(net)
    assert len(layers) == 2 * 7
    begin = made.create_optimizer  # runs inside `train`, after its hooks were added
    made.create_optimizer = lambda *given: [layer.register_forward_hook(note) for layer in layers] and begin()
    made.train()
    assert all(len(layer._forward_hooks) == 1 for layer in layers), "only the one of this test"
    return trainers.weights(made), kept


@pytest.mark.parametrize(("name", "kernel"), [("sft", "cpu"), ("sft", "gpu"), ("vaccine", "cpu")])
def test_8_bit_layers_keep_no_inputs(name, kernel, folder, tmp_path, monkeypatch):
    if kernel == "gpu":
        functions = pytest.importorskip("bitsandbytes.autograd._functions")
        monkeypatch.setattr(functions.MatMul8bitFp, "apply", functions.MatMul8bitLt.apply)
    found, kept = trained(folder, name, tmp_path)
    assert kept
    assert not any(kept)
    monkeypatch.setattr(quantised, "_forget", lambda layer, inputs, output: None)
    expected, kept = trained(folder, name, tmp_path)
    assert all(kept), "bitsandbytes needs this no longer: remove without_kept_inputs"
    assert trainers.same(found, expected)


def test_a_layer_whose_weights_train_is_left_alone():
    bnb = pytest.importorskip("bitsandbytes")
    trains = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=True)
    frozen = bnb.nn.Linear8bitLt(8, 8, has_fp16_weights=False).requires_grad_(False)
    assert quantised.frozen_layers(torch.nn.Sequential(trains, frozen)) == [frozen]
