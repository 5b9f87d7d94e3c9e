"""Backward goes no deeper than needed: hooks that extend it to the embeddings are removed if that is exact."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model

import tiny
import trainers
from holdfast.training.gradient_checkpointing import checkpoints_reentrantly, free_inputs

CHECKPOINTED = {"gradient_checkpointing": True}
COUNTED = CHECKPOINTED | {"max_steps": 1, "lean_loss": False}  # its check runs the layers too
REENTRANT = CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}


def deep(trained_layers=None):
    """Six layers with a LoRA, trained in some layers (None: all)."""
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    net = get_peft_model(tiny.llama(len(trainers.TOKENIZER), layers=6), config)
    for name, p in net.named_parameters():
        if "lora_" in name and trained_layers is not None:
            p.requires_grad_(any(f"layers.{i}." in name for i in trained_layers))
    return net


def hooks(net):
    return sum(len(m._forward_hooks) for m in net.modules())


def runs_of_layers(net):
    """Counts how often each layer's norm runs: once forward, and once more if the layer is recomputed."""
    counts = [0] * 6
    for i, layer in enumerate(net.get_base_model().model.layers):
        layer.input_layernorm.register_forward_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
    return counts


def test_the_hooks_that_are_removed_are_those_of_transformers_and_peft():
    """Repeated calls leave several hooks; `disable_input_require_grads` would remove only one."""
    net = deep()
    net.get_base_model().gradient_checkpointing_enable()
    net.prepare_model_for_gradient_checkpointing(net.get_base_model())
    net.get_base_model().gradient_checkpointing_enable()
    net.get_input_embeddings().register_forward_hook(lambda *_: None)
    assert hooks(net) == 4
    assert free_inputs(net) == 3
    assert hooks(net) == 1, "a foreign hook stays"
    ids = torch.tensor([[1, 2]])
    assert not net.get_input_embeddings()(ids).requires_grad
    assert not checkpoints_reentrantly(net)
    net.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    assert checkpoints_reentrantly(net)
    net.get_base_model().gradient_checkpointing_disable()
    assert not checkpoints_reentrantly(net)


def test_only_layers_above_the_lowest_that_trains_are_recomputed(tmp_path):
    net = deep([3, 5])
    counts = runs_of_layers(net)
    trainers.trainer("sft", tmp_path, net=net, **COUNTED).train()
    assert counts == [1, 1, 1, 2, 2, 2]


def test_control_with_the_hooks_everything_is_recomputed(tmp_path, monkeypatch):
    monkeypatch.setattr("holdfast.training.trainer.free_inputs", lambda model: 0)
    net = deep([3, 5])
    counts = runs_of_layers(net)
    trainers.trainer("sft", tmp_path, net=net, **COUNTED).train()
    assert counts == [2] * 6


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trained", [None, [3, 5]])
def test_every_way_to_checkpoint_gives_the_same_weights(trained, tmp_path):
    """Reentrant checkpointing keeps its hooks: without them it would train nothing."""
    ends = []
    for options in ({}, CHECKPOINTED, REENTRANT):
        made = trainers.trainer("sft", tmp_path, net=deep(trained), max_steps=3, **options)
        made.train()
        ends.append(trainers.weights(made))
    assert trainers.distance(ends[0], ends[1]) < 1e-6
    assert trainers.distance(ends[0], ends[2]) < 1e-6
    assert (
        trainers.distance(ends[0], trainers.weights(trainers.trainer("sft", tmp_path, net=deep(trained))))
        > 1e-3
    )
