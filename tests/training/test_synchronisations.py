"""Which methods read a number from the device inside an optimizer step, where nothing is logged.

Such a read makes the processor wait for the GPU. On a CPU each one is a call of `aten::_local_scalar_dense` or
`aten::nonzero`, which this test counts. Those of transformers, which reads the attention mask in each forward
pass, are left out.
"""

from __future__ import annotations

import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

import trainers
from holdfast import registry

READS = {"aten::_local_scalar_dense", "aten::nonzero"}
KNOWN = {
    "booster": 1,  # the norm of the harmful gradient
    "repnoise": 4,  # the places and the length of the answers; two by accelerate, which pads them
    "spag": 2,  # is the safe loss above tau; how long is the correcting step
    "tvaccine": 3,  # as vaccine; and the layers that are drawn in this step
    "vaccine": 1,  # is the norm of the gradient finite
}
"""Reads in a step, by method: each decides what the rest of the step does. Other methods read nothing."""


class Counted(TorchDispatchMode, TrainerCallback):
    """Counts the reads in the second optimizer step."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS:
            frames = [f for f in traceback.extract_stack()[:-1] if "/torch/" not in f.filename]
            if "/transformers/" not in frames[-1].filename:
                self.places.append(f"{frames[-1].filename}:{frames[-1].lineno}")
        return function(*args, **(kwargs or {}))

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.__enter__()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            self.__exit__(None, None, None)


def one_for_each_trainer() -> list[str]:
    """Names of defenses with different trainers."""
    found = {
        defense.trainer: name
        for name in registry.list_defenses()
        if (defense := registry.get_defense(name)).trainer is not None
    }
    return sorted(found.values())


@pytest.mark.parametrize("name", one_for_each_trainer())
def test_a_step_waits_for_the_device_only_where_it_has_to(name, tmp_path):
    strong = registry.get_defense(name).strong
    made = trainers.trainer(name, tmp_path, **{**strong, "max_steps": 4, "logging_steps": 100})
    counted = Counted()
    made.add_callback(counted)
    made.train()
    assert len(counted.places) == KNOWN.get(name, 0), counted.places


def test_the_count_sees_a_read(tmp_path):
    class Reading(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            float(torch.zeros(1))

    made = trainers.trainer("sft", tmp_path, max_steps=2, logging_steps=100)
    counted = Counted()
    made.add_callback(counted)
    made.add_callback(Reading())
    made.train()
    assert len(counted.places) == 1
