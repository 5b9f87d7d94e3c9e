"""Penalties under full fine-tuning, bf16 weights, bf16 autocast, fp16's loss scale and checkpointing."""

from __future__ import annotations

import functools

import pytest
import torch
from accelerate import Accelerator

import plain
import tiny
import trainers

METHODS = {
    "lisa": (
        {"alignment_steps": 2, "finetune_steps": 3, "rho": 3.0, "proximal_warmup_ratio": 0.0},
        (2, 3, 3.0), plain.l2,
    ),
    "lisa-fisher": (
        {
            "alignment_steps": 2, "finetune_steps": 3, "rho": 3.0, "proximal_warmup_ratio": 0.0,
            "proximal": "fisher", "fisher_rows": 8,
        },
        (2, 3, 3.0), plain.fisher(8, mean_1=True),
    ),
    "ewc": ({"lambda_": 50.0}, (0, 1, 100.0), plain.fisher(None, mean_1=False)),
}  # fmt: skip


def full():
    return tiny.llama(len(trainers.TOKENIZER))


def run(method, out, **options):
    made = trainers.trainer(method.split("-")[0], out, **METHODS[method][0], **options)
    made.train()
    return made


def apart(left, right):
    """The total distance between two lists of weights."""
    return float(sum(((a - b).float() ** 2).sum() for a, b in zip(left, right, strict=True)).sqrt())


@pytest.fixture(scope="module")
def plainly(tmp_path_factory):
    """By method: the weights of a training in fp32."""
    return functools.cache(lambda method: trainers.weights(run(method, tmp_path_factory.mktemp("plain"))))


@functools.cache
def without_penalty(k1, k2, half):
    """The weights of the plain loop without a penalty, with bf16 weights or bf16 autocast."""
    net = full().bfloat16() if half else full()
    return plain.train(k1, k2, 0.0, net=net, autocast=not half)[0]


@pytest.mark.parametrize("method", METHODS)
def test_full_fine_tuning(tmp_path, method):
    _, (k1, k2, strength), at_switch = METHODS[method]
    made = run(method, tmp_path, net=full())
    expected, record = plain.train(k1, k2, strength, at_switch=at_switch, net=full())
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    assert record[-1]["penalty"] > 1e-4


@pytest.mark.parametrize("kind", ["bf16 weights", "bf16 autocast"])
@pytest.mark.parametrize("method", METHODS)
def test_bf16(tmp_path, method, kind):
    """Compared with the penalty in the loss, in the same precision; the penalty itself has a far larger effect."""
    _, (k1, k2, strength), at_switch = METHODS[method]
    weights = kind == "bf16 weights"

    def net():
        return full().bfloat16() if weights else full()

    made = run(method, tmp_path, net=net(), **({} if weights else {"bf16": True}))
    expected, _ = plain.train(k1, k2, strength, at_switch=at_switch, net=net(), autocast=not weights)
    free = without_penalty(k1, k2, weights)
    ends = trainers.weights(made)
    assert {w.dtype for w in ends} == {torch.bfloat16 if weights else torch.float32}
    assert apart(ends, expected) < 0.2 * apart(free, expected)
    entry = [e for e in made.state.log_history if "penalty" in e][-1]
    moved = sum(((w - a).float() ** 2).sum() for w, a in zip(ends, made.anchor, strict=True)).sqrt()
    assert entry["drift"] == pytest.approx(float(moved), rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_checkpointing_gives_the_same_weights(tmp_path, method, plainly):
    checkpointed = run(method, tmp_path, gradient_checkpointing=True)
    assert trainers.distance(plainly(method), trainers.weights(checkpointed)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_the_loss_scale_of_fp16_does_not_weaken_the_penalty(tmp_path, method, plainly, monkeypatch):
    """The scaler without half precision is exact, so that only the penalty could be wrong."""

    def unscale(self, optimizer=None):
        for own in self._optimizers:
            self.scaler.unscale_(own.optimizer)

    expected = plainly(method)
    monkeypatch.setattr(Accelerator, "unscale_gradients", unscale)
    made = trainers.trainer(method.split("-")[0], tmp_path, **METHODS[method][0])
    made.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    made.train()
    assert made.accelerator.scaler.get_scale() > 2.0**10, "it was used, and it changed"
    assert trainers.distance(trainers.weights(made), expected) < 1e-6
