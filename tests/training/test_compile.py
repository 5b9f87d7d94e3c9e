"""torch.compile changes no weight, also if a method adds hooks to the compiled model in every step."""

from __future__ import annotations

import torch

import tiny
import trainers


def test_a_compiled_model_trains_to_the_same_weights(tmp_path):
    """`eager` traces the graph and compiles nothing, which takes seconds instead of a minute."""

    def trained(**more):
        net = tiny.llama(len(trainers.TOKENIZER), layers=1)
        made = trainers.trainer("vaccine", tmp_path, net=net, max_steps=2, lean_loss=False, **more)
        made.train()
        return trainers.weights(made)

    torch.compiler.reset()
    compiled = trained(rho=5.0, torch_compile=True, torch_compile_backend="eager")
    assert trainers.distance(trained(rho=5.0), compiled) < 1e-6
    assert trainers.distance(trained(rho=0.0), compiled) > 1e-4, "the hooks have an effect"
