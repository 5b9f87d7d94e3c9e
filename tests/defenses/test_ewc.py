"""EWC against a plain loop, its reduction to SFT, resume, and gradients that the first step must not see."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

import plain
import trainers
from holdfast.defenses.ewc import EWCConfig, EWCMixin, EWCTrainer
from holdfast.errors import DataError

TERMS = {"fisher": (plain.fisher(None, mean_1=False), 250.0), "l2": (plain.l2, 1.5)}
"""The penalty with a factor 1/2 in it, and lambda."""


def ewc(out, penalty="fisher", **options):
    return trainers.trainer("ewc", out, **{"penalty": penalty, "lambda_": TERMS[penalty][1], **options})


def end(out, name, **options):
    """Weights after a training with dropout, whose random numbers start with the trainer."""
    made = trainers.trainer(name, out, net=trainers.model(dropout=0.3), **options)
    made.train()
    return trainers.weights(made)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("penalty", TERMS)
def test_the_loss_is_f_plus_lambda_times_the_weighted_squared_distance(tmp_path, penalty, accumulation):
    made = ewc(
        tmp_path, penalty, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    at_switch, strength = TERMS[penalty]
    expected, record = plain.train(0, 1, 2 * strength, accumulation, at_switch=at_switch)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, step in zip(logged, record, strict=True):
        assert step["penalty"] > 1e-4, "if the term is too weak, the test shows nothing"
        assert entry["loss"] == pytest.approx(step["loss"], abs=1e-4)
        for name in ("grad_norm", "drift", "penalty"):
            assert entry[name] == pytest.approx(step[name], rel=1e-3), name


@pytest.mark.parametrize("penalty", TERMS)
def test_the_equation_tests_can_fail(penalty):
    at_switch, strength = TERMS[penalty]
    right, _ = plain.train(0, 1, 2 * strength, at_switch=at_switch)
    for other in (0.0, strength):
        assert trainers.distance(right, plain.train(0, 1, other, at_switch=at_switch)[0]) > 1e-4


def test_ewc_with_lambda_0_is_sft(tmp_path):
    """Equal bit for bit, and F is not computed: the model runs as often."""
    found, passes = trainers.ended("ewc", tmp_path, lambda_=0.0)
    sft, plain_passes = trainers.ended("sft", tmp_path)
    assert trainers.same(found, sft)
    assert passes == plain_passes


def test_the_first_step_sees_no_gradient_of_the_fisher(tmp_path):
    """At the first step w = w*, so the step is that of SFT: same random numbers, no gradient of alignment rows."""
    first = [end(tmp_path, "ewc", lambda_=1e3, max_steps=1), end(tmp_path, "sft", max_steps=1)]
    assert trainers.same(*first)
    second = [end(tmp_path, "ewc", lambda_=1e3, max_steps=2), end(tmp_path, "sft", max_steps=2)]
    assert not trainers.same(*second)


def test_the_fisher_is_taken_outside_of_no_sync(tmp_path, monkeypatch):
    """Inside no_sync, where early micro-batches run, gradients of several processes would not be averaged."""
    from accelerate import Accelerator

    inside, seen = [], []

    @contextmanager
    def no_sync(self, model):
        inside.append(model)
        yield
        inside.pop()

    monkeypatch.setattr(Accelerator, "no_sync", no_sync)
    made = ewc(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    take = made.anchor_taken
    made.anchor_taken = lambda: seen.append(len(inside)) or take()
    made.train()
    assert seen == [0]


@pytest.mark.parametrize("penalty", TERMS)
def test_resume_is_exact_and_takes_nothing_anew(tmp_path, penalty):
    setting = {"save_strategy": "steps", "save_steps": 5, "gradient_accumulation_steps": 2}
    whole = ewc(tmp_path, penalty, net=trainers.model(dropout=0.2), **setting)
    whole.train()
    resumed = ewc(tmp_path, penalty, net=trainers.model(dropout=0.2), **setting)
    resumed.anchor_taken = lambda: pytest.fail("taken anew")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))


@pytest.mark.parametrize("lost", ["fisher.", "anchor."])
def test_control_a_lost_fisher_or_start_is_noticed(tmp_path, monkeypatch, lost):
    setting = {"save_strategy": "steps", "save_steps": 5}
    whole = ewc(tmp_path, **setting)
    whole.train()
    loaded = EWCMixin.method_loaded

    def forget(self, state):
        loaded(self, {k: torch.ones_like(t) if k.startswith(lost) else t for k, t in state.items()})

    monkeypatch.setattr(EWCMixin, "method_loaded", forget)
    resumed = ewc(tmp_path, **setting)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not trainers.same(trainers.weights(whole), trainers.weights(resumed))


@pytest.mark.parametrize("wrong", [{"lambda_": -1.0}, {"penalty": "delta_w"}, {"fisher_rows": 0}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EWCConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_alignment_rows_are_needed_for_fisher_alone(tmp_path):
    def make(**options):
        return EWCTrainer(
            model=trainers.model(), args=EWCConfig(output_dir=str(tmp_path), use_cpu=True, **options),
            train_dataset=trainers.USER, processing_class=trainers.TOKENIZER,
        )  # fmt: skip

    with pytest.raises(DataError, match="alignment_dataset"):
        make()
    make(penalty="l2")
    make(lambda_=0.0)
