"""torch.compile changes no weight, whichever way a method acts on the compiled model."""

from __future__ import annotations

import os

import pytest
import torch
from torch._dynamo.utils import counters

import tiny
import trainers
from holdfast import registry
from holdfast.training.private import BACKEND, BY_LAYER

LAYERS = 3
"""The tracing of a whole model of so many checkpointed layers fails on Vaccine's hooks."""
ACTS = {
    "vaccine": {},  # two passes, and hooks on hidden states that differ in each step
    "lisa": {"alignment_steps": 1, "finetune_steps": 1},  # an anchor, and rows that change between steps
}
"""A method for each way to act, with phases of one step. Every method was compared once: see docs/memory.md."""


def rows(number, seed):
    """Tokenised rows of one length, because each further length is traced again."""
    drawn = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 300, (number, 8), generator=drawn).tolist()
    return [{"input_ids": x, "attention_mask": [1] * 8, "labels": [-100] * 4 + x[4:]} for x in ids]


@pytest.mark.parametrize(
    ("name", "by"), [("vaccine", "arguments"), ("lisa", "arguments"), ("vaccine", "accelerate")]
)
def test_a_compiled_model_trains_to_the_same_weights(name, by, tmp_path, monkeypatch):
    """`eager` traces the graph and compiles nothing, which takes seconds instead of a minute."""
    monkeypatch.setattr(trainers, "HARMFUL", rows(8, 3))
    eager = {"torch_compile": True, "torch_compile_backend": "eager"} if by == "arguments" else {}

    def trained(which, **more):
        net = tiny.llama(len(trainers.TOKENIZER), layers=LAYERS)
        given = {**registry.get_defense(which).strong, **ACTS.get(which, {}), **more}
        made = trainers.trainer(
            which, tmp_path, net=net, rows=rows(12, 1), alignment=rows(8, 2), max_steps=2, lean_loss=False,
            gradient_checkpointing=True, **given,
        )  # fmt: skip
        made.train()
        return trainers.weights(made)

    torch.compiler.reset()
    counters.clear()
    default = torch._dynamo.config.patch(skip_nnmodule_hook_guards=True)  # until a trainer changes it
    with default, monkeypatch.context() as launched:
        if by == "accelerate":
            launched.setenv(BACKEND, "EAGER")
        plain = trained("sft", **eager)  # leaves compiled layers without hooks behind
        assert counters["frames"]["ok"] > 0, "the model is compiled"
        compiled = trained(name, **eager)
    assert trainers.distance(trained(name), compiled) < 1e-6
    assert trainers.distance(plain, compiled) > 1e-4, "the method has an effect"


def test_the_users_choice_of_what_is_compiled_stays(tmp_path, monkeypatch):
    """accelerate's variable decides; without it, layers are compiled, and the variable is not left behind."""
    for value, by_layer in ((None, True), ("false", False)):
        monkeypatch.delenv(BY_LAYER, raising=False)
        if value:
            monkeypatch.setenv(BY_LAYER, value)
        made = trainers.trainer(
            "sft", tmp_path, net=tiny.llama(len(trainers.TOKENIZER), layers=1), rows=rows(2, 1),
            torch_compile=True, torch_compile_backend="eager",
        )  # fmt: skip
        assert made.accelerator.state.dynamo_plugin.use_regional_compilation is by_layer
        assert os.environ.get(BY_LAYER) == value
