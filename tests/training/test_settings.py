"""Trainers under the settings of real runs: checkpointed activations, bf16, fp16, quantised bases."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

import tiny
import trainers
from holdfast import registry
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora

NAMES = ("sft", "bso", "lisa")
"""Plain, with two sources of batches, and with a gradient added by hand; the contract suite has the others."""
LORA = {"r": 2, "alpha": 4, "dropout": 0.1, "target_modules": "all-linear"}
CHECKPOINTING = (
    "activation_checkpointing"
    if hasattr(TrainingArguments, "activation_checkpointing")
    else "gradient_checkpointing"
)
"""The newer name, which older versions of transformers do not have."""


def own(name):
    """Short phases and a strong penalty, if the method has them."""
    values = {"alignment_steps": 1, "finetune_steps": 2, "rho": 3.0, "proximal_warmup_ratio": 0.0}
    return {k: v for k, v in values.items() if k in registry.faces("defenses")[name].parameters}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and an adapter with an effect."""
    made = tmp_path_factory.mktemp("m")
    tiny.save_model(made / "model")
    below = add_lora(load_model(made / "model"), LORA, "base")
    torch.manual_seed(2)
    for p in below.parameters():
        if p.requires_grad:
            p.data.add_(torch.randn_like(p) * 0.1)
    below.save_pretrained(made / "adapter")
    return made


def train(folder, out, name, lora=LORA, stacked=True, model=None, **options):
    net = load_model(folder / "model", [folder / "adapter"] if stacked else [], **(model or {}))
    torch.manual_seed(3)
    net = add_lora(net, lora, "base")
    made = trainers.trainer(name, out, net=net, max_steps=5, **own(name), **options)
    start = trainers.weights(made)
    made.train()
    assert trainers.distance(trainers.weights(made), start) > 1e-3, "it trains"
    return made


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {CHECKPOINTING: True, f"{CHECKPOINTING}_kwargs": {"use_reentrant": True}},
    ],
    ids=["non-reentrant", "reentrant"],
)
def test_checkpointed_activations_change_no_weight(name, options, folder, tmp_path):
    """On a frozen base with a frozen adapter and a new adapter with dropout."""
    plain, saving = train(folder, tmp_path, name), train(folder, tmp_path, name, **options)
    assert saving.model.is_gradient_checkpointing
    assert not plain.model.is_gradient_checkpointing
    assert trainers.same(trainers.weights(plain), trainers.weights(saving))


def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(folder, tmp_path):
    plain, half = train(folder, tmp_path, "lisa"), train(folder, tmp_path, "lisa", bf16=True)
    assert {p.dtype for p in trainers.weights(half)} == {torch.float32}
    assert not trainers.same(trainers.weights(plain), trainers.weights(half))
    assert abs(half.state.log_history[0]["loss"] - plain.state.log_history[0]["loss"]) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_fp16_on_a_cpu_is_refused(name, tmp_path):
    """accelerate would silently train without a scaler."""
    with pytest.raises(ValueError, match="fp16 needs a loss scaler"):
        trainers.trainer(name, tmp_path, fp16=True)


@pytest.mark.parametrize("dora", [False, True])
def test_lisa_on_nf4_is_the_same_with_checkpointed_activations(dora, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    setting = {"model": {"quantization": "nf4"}, "lora": {**LORA, "use_dora": dora}, "stacked": not dora}
    plain = train(folder, tmp_path, "lisa", **setting)
    saving = train(folder, tmp_path, "lisa", gradient_checkpointing=True, **setting)
    for made in (plain, saving):
        assert not made.model.get_input_embeddings()._forward_hooks
        assert not any(p.requires_grad for p in made.model.parameters() if p.dtype == torch.uint8)
    assert trainers.same(trainers.weights(plain), trainers.weights(saving))
    assert not trainers.same(
        trainers.weights(plain), trainers.weights(train(folder, tmp_path, "lisa", **setting | {"model": {}}))
    ), "the quantised base decides"
