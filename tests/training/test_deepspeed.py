"""Penalties with an optimizer that steps inside backward, like DeepSpeed's, as far as a CPU can test it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch.utils.data import DataLoader

import trainers
from holdfast.errors import InputError
from holdfast.training import penalty

LISA = {"alignment_steps": 2, "finetune_steps": 3, "rho": 3.0, "proximal_warmup_ratio": 0.0}
METHODS = [("lisa", LISA), ("ewc", {"penalty": "l2", "lambda_": 3.0})]


@pytest.fixture
def deepspeed(monkeypatch):
    """`accelerator.backward` clips, steps and zeroes at the last micro-batch; returns the gradients it used."""
    made = []

    def backward(self, loss, scale_wrt_gas=True, **kwargs):
        assert not scale_wrt_gas, "Trainer has divided the loss already"
        loss.backward()
        if self.sync_gradients:
            weights = [p for p in made[0].model.parameters() if p.requires_grad]
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            made[0].optimizer.step()
            for weight in weights:
                weight.grad = None

    def prepare(self, *things):
        """Without DeepSpeed installed, model and optimizer are not wrapped."""
        found = [self.prepare_data_loader(x) if isinstance(x, DataLoader) else x for x in things]
        return found[0] if len(found) == 1 else tuple(found)

    def make(*args, **options):
        made[:] = [trainers.trainer(*args, **options)]
        return made[0]

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setattr(Accelerator, "_prepare_deepspeed", prepare)
    monkeypatch.setattr(Accelerator, "backward", backward)
    monkeypatch.setattr(Accelerator, "clip_grad_norm_", lambda *a, **k: torch.tensor(0.0))
    return make


def plain(name, out, **options):
    made = trainers.trainer(name, out, **options)
    made.train()
    return trainers.weights(made), made.state.log_history


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_hooks_equal_the_added_gradient(tmp_path, request, name, options, accumulation):
    """Weights, drift and penalty are equal; the rows do not fill the last window of an epoch."""
    setting = {
        **options, "per_device_train_batch_size": 4 // accumulation, "rows": trainers.USER[:22],
        "gradient_accumulation_steps": accumulation,
    }  # fmt: skip
    expected, history = plain(name, tmp_path, **setting)
    made = request.getfixturevalue("deepspeed")(name, tmp_path, **setting)
    made.train()
    assert trainers.distance(trainers.weights(made), expected) < 1e-6
    for entry, other in zip(made.state.log_history[:-1], history[:-1], strict=True):
        for key in ("drift", "penalty", "loss"):
            assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=1e-7), key


def test_control_without_hooks_the_penalty_is_lost(tmp_path, deepspeed, monkeypatch):
    from holdfast.training.penalty import PenaltyMixin

    with_hooks = deepspeed("lisa", tmp_path, **LISA)
    with_hooks.train()
    monkeypatch.setattr(PenaltyMixin, "_adds_its_share", lambda self, i: lambda gradient: gradient)
    without = deepspeed("lisa", tmp_path, **LISA)
    without.train()
    assert trainers.distance(trainers.weights(with_hooks), trainers.weights(without)) > 1e-4


def test_hooks_end_with_the_training(tmp_path, deepspeed):
    made = deepspeed("lisa", tmp_path, **LISA)
    made.train()
    assert not made._hooks
    assert not any(p._backward_hooks for p in made.model.parameters())


@pytest.mark.parametrize(
    ("name", "options"),
    [("lisa", {"proximal": "fisher"}), ("lisa", {"proximal": "delta_w"}), ("ewc", {})],
)
def test_other_terms_are_refused(tmp_path, deepspeed, name, options):
    with pytest.raises(InputError, match="DeepSpeed"):
        deepspeed(name, tmp_path, **options)


@pytest.fixture
def partitioned(monkeypatch):
    """After `partitioned()`, every trainer runs as under ZeRO-3."""
    return lambda: monkeypatch.setattr(penalty, "zero_3", lambda accelerator: True)


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_zero_3_is_refused(tmp_path, deepspeed, partitioned, name, options):
    """ZeRO-3 partitions the weights: the penalty would see none of them."""
    partitioned()
    with pytest.raises(InputError, match="ZeRO-3"):
        deepspeed(name, tmp_path, **options)


def test_bso_runs_under_zero_3_without_a_drift(tmp_path, partitioned):
    phases = {"alignment_steps": 2, "finetune_steps": 3, "save_strategy": "steps", "save_steps": 4}
    expected, _ = plain("bso", tmp_path, **phases)
    partitioned()
    made = trainers.trainer("bso", tmp_path, **phases)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainers.same(trainers.weights(made), expected)
    assert made.anchor is None
    logged = [entry for entry in made.state.log_history[:-1] if entry["step"] > 4]
    assert len(logged) == 8
    assert all(f"{entry['state']}_loss" in entry and "drift" not in entry for entry in logged)


def test_zero_3_is_told_from_the_plugin():
    for stage, expected in ((2, False), (3, True)):
        state = SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage))
        assert penalty.zero_3(SimpleNamespace(state=state)) == expected
    assert not penalty.zero_3(SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=None)))


def test_fp16_is_refused(tmp_path, deepspeed):
    made = deepspeed("lisa", tmp_path, **LISA)
    made.args.fp16 = True  # a Config on a CPU would refuse it first
    with pytest.raises(InputError, match="fp16"):
        made._refuse_what_cannot_be()
