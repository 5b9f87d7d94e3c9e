"""Vaccine against a plain loop of its two passes, its reduction to SFT, and refused settings."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import trainers
import two_passes
from holdfast.defenses.vaccine import VaccineConfig
from holdfast.errors import InputError, ModelError
from holdfast.training import perturbation
from two_passes import parts

RHO = 0.5


def batches(out):
    """The rows of every step, in batches of four."""
    return list(trainers.trainer("sft", out).get_train_dataloader())


def end(name, out, **options):
    """Weights after a training with dropout."""
    made = trainers.trainer(name, out, net=two_passes.model(dropout=0.3), max_steps=6, **options)
    made.train()
    return trainers.weights(made)


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory):
    found = batches(tmp_path_factory.mktemp("sft"))
    return found, {rho: two_passes.train(found, rho)[0] for rho in (0.0, RHO, 2 * RHO)}


@pytest.mark.parametrize(("accumulation", "checkpointing"), [(1, False), (2, True), (4, False)])
def test_vaccine_is_algorithm_1(tmp_path, accumulation, checkpointing, by_hand):
    made = trainers.trainer(
        "vaccine", tmp_path, net=two_passes.model(), rho=RHO, max_steps=6, **parts(accumulation),
        gradient_checkpointing=checkpointing, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    made.train()
    assert trainers.distance(trainers.weights(made), by_hand[1][RHO]) < 1e-5
    with torch.no_grad():
        first = two_passes.cross_entropy(two_passes.model(), by_hand[0][0])
    assert made.state.log_history[0]["cross_entropy"] == pytest.approx(float(first), abs=1e-5)
    assert made.state.log_history[0]["loss"] > float(first) + 0.01, "that of perturbed activations"


def test_the_equation_test_can_fail(by_hand):
    for other in (0.0, 2 * RHO):
        assert trainers.distance(by_hand[1][RHO], by_hand[1][other]) > 1e-3


def test_a_norm_of_each_micro_batch_would_be_noticed(tmp_path, by_hand, monkeypatch):
    """The authors' code computes the norm this way."""
    first_pass = perturbation.PerturbationMixin._first_pass

    def apart(self):
        kept = []
        whole = self._step_batches
        for batch in whole:
            self._step_batches = [batch]
            kept += first_pass(self)
        self._step_batches = whole
        return kept

    monkeypatch.setattr(perturbation.PerturbationMixin, "_first_pass", apart)
    made = trainers.trainer("vaccine", tmp_path, net=two_passes.model(), rho=RHO, max_steps=6, **parts(2))
    made.train()
    assert trainers.distance(trainers.weights(made), by_hand[1][RHO]) > 1e-4


@pytest.mark.parametrize("accumulation", [1, 2])
def test_vaccine_with_rho_0_is_sft(tmp_path, accumulation):
    """Equal bit for bit, and without a second pass."""
    options = {"max_steps": 6, **parts(accumulation)}
    nets = [two_passes.model(dropout=0.3) for _ in range(2)]
    found, passes = trainers.ended("vaccine", tmp_path, net=nets[0], rho=0.0, **options)
    sft, plain_passes = trainers.ended("sft", tmp_path, net=nets[1], **options)
    assert trainers.same(found, sft)
    assert passes == plain_passes


def test_a_norm_that_is_not_finite_leaves_the_step_plain(tmp_path, monkeypatch):
    """As in fp16 while the loss scale is too high."""
    monkeypatch.setattr(perturbation, "squared_norm", lambda tensors: torch.tensor(torch.inf))
    assert trainers.same(end("vaccine", tmp_path, rho=RHO), end("sft", tmp_path))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_passes_draw_the_same_random_numbers(tmp_path, accumulation):
    made = trainers.trainer(
        "vaccine", tmp_path, net=two_passes.model(dropout=0.3), rho=RHO, max_steps=2, **parts(accumulation)
    )
    states, plain = [], made.compute_loss
    made.compute_loss = lambda *args, **kwargs: states.append(torch.get_rng_state()) or plain(*args, **kwargs)
    made.train()
    assert len(states) == 4 * accumulation
    for step in (states[: 2 * accumulation], states[2 * accumulation :]):
        for first, second in zip(step[:accumulation], step[accumulation:], strict=True):
            assert torch.equal(first, second)
    assert not torch.equal(states[0], states[-1])


@pytest.mark.parametrize("kind", ["activation", "gradient"])
def test_checkpointing_has_another_name_in_older_transformers(kind):
    """Up to transformers 5.20 the arguments are called gradient_checkpointing*."""

    def asked(on, options):
        return SimpleNamespace(**{f"{kind}_checkpointing": on, f"{kind}_checkpointing_kwargs": options})

    off, on = asked(False, None), asked(True, {"use_reentrant": True})
    perturbation.refuse_reentrant(off)
    assert perturbation.asked_checkpointing(on) == (True, {"use_reentrant": True})
    with pytest.raises(ValueError, match="Reentrant"):
        perturbation.refuse_reentrant(on)


def test_reentrant_checkpointing_is_refused(tmp_path):
    asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(ValueError, match="Reentrant gradient checkpointing hides"):
        VaccineConfig(output_dir=str(tmp_path), use_cpu=True, **asked)
    net = two_passes.model()
    net.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="Reentrant gradient checkpointing hides"):
        trainers.trainer("vaccine", tmp_path, net=net)
    made = trainers.trainer("vaccine", tmp_path, net=two_passes.model())
    made.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ModelError, match="Reentrant gradient checkpointing hides"):
        made.train()
    assert made.state.global_step == 0


def test_several_gpus_in_one_process_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(VaccineConfig, "n_gpu", property(lambda self: 2))
    with pytest.raises(InputError, match="among 2 GPUs"):
        trainers.trainer("vaccine", tmp_path)


def test_a_negative_rho_is_refused(tmp_path):
    with pytest.raises(ValueError, match="rho must not be negative, found -1"):
        VaccineConfig(output_dir=str(tmp_path), use_cpu=True, rho=-1.0)
