"""torch.compile changes no weight, whatever a method does around the compiled model."""

from __future__ import annotations

import pytest
import torch

import tiny
import trainers
from holdfast import registry

METHODS = {"booster": {"lambda_": 0.0}, "vaccine": {"rho": 0.0}}
"""Several backward passes with changed weights, and hooks that change hidden states; with the value that switches
the method off."""


@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_trains_to_the_same_weights(name, tmp_path):
    """`eager` traces the graph and compiles nothing, which takes seconds instead of a minute."""

    def trained(**more):
        net = tiny.llama(len(trainers.TOKENIZER), layers=1)
        settings = {**registry.get_defense(name).strong, "max_steps": 2, "lean_loss": False}
        made = trainers.trainer(name, tmp_path, net=net, **{**settings, **more})
        made.train()
        return trainers.weights(made)

    torch.compiler.reset()
    compiled = trained(torch_compile=True, torch_compile_backend="eager")
    assert trainers.distance(trained(), compiled) < 1e-6
    assert trainers.distance(trained(**METHODS[name]), compiled) > 1e-4, "the method has an effect"
