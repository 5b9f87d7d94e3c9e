"""SPAG against a plain loop, its reductions, and its trust region."""

from __future__ import annotations

import math

import pytest
import torch

import trainers
from holdfast.defenses.spag import step_size
from holdfast.errors import DataError
from holdfast.training.streams import stream
from holdfast.training.tokenising import prepare_rows

TAU, STEPS = 6.0, 6


def cross_entropy(net, rows):
    """The mean over all completion tokens of some rows, row by row."""
    total, tokens = torch.tensor(0.0), 0
    for row in rows:
        labels = torch.tensor(row["labels"])[1:]
        logits = net(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        tokens += int((labels != -100).sum())
    return total / tokens


def plain_loop(made, form, eta, tau=TAU):
    """The equation as written, one row at a time. Returns the weights and how many steps were corrected."""
    net = trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    user, safe = (prepare_rows(r, trainers.TOKENIZER, 2048) for r in (trainers.USER, trainers.ALIGNMENT))
    order = torch.randperm(len(user), generator=torch.Generator().manual_seed(11)).tolist()
    corrected = 0
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        cross_entropy(net, [user[i] for i in order[4 * step : 4 * step + 4]]).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss = cross_entropy(net, [safe[i] for i in stream(made, len(safe), step, 4, "alignment", "spag")])
        if loss <= tau:
            continue
        corrected += 1
        loss.backward()
        with torch.no_grad():
            excess = float(loss) - tau
            if form == "code":
                for w in weights:
                    norm = float(w.grad.norm())
                    w.grad *= min(excess / norm, 1.0) if norm else 0.0
                optimizer.step()
            else:
                size = min(excess / sum(float(w.grad.square().sum()) for w in weights), eta)
                for w in weights:
                    w -= size * w.grad
    return [w.detach() for w in weights], corrected


@pytest.mark.parametrize(
    ("form", "eta", "accumulation"),
    [("paper", 0.5, 1), ("paper", 100.0, 2), ("code", 1.0, 1), ("code", 1.0, 2)],
)
def test_it_is_the_equation(form, eta, accumulation, tmp_path):
    """With the smaller eta the trust region bounds each step; with the larger one it bounds none."""
    made = trainers.trainer(
        "spag", tmp_path, max_steps=STEPS, tau=TAU, eta=eta, form=form, logging_steps=1,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    expected, corrected = plain_loop(made, form, eta)
    assert corrected > 0
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    without, _ = plain_loop(made, form, eta, tau=1e9)
    assert trainers.distance(without, expected) > 1e-4
    logged = [entry["corrected"] for entry in made.state.log_history if "corrected" in entry]
    assert sum(logged) == corrected


@pytest.mark.parametrize("reduction", [{"tau": 1e9}, {"tau": 0.0, "eta": 0.0}])
def test_without_a_correction_it_is_sft(reduction, tmp_path):
    ours, _ = trainers.ended("spag", tmp_path, **reduction)
    sft, _ = trainers.ended("sft", tmp_path)
    assert trainers.same(ours, sft)


def test_the_gate_costs_one_forward_and_the_correction_another(tmp_path):
    closed = trainers.ended("spag", tmp_path, max_steps=3, tau=1e9)[1]
    opened = trainers.ended("spag", tmp_path, max_steps=3, tau=0.0)[1]
    plain = trainers.ended("sft", tmp_path, max_steps=3)[1]
    assert closed == plain + 3
    assert opened == plain + 6


def test_the_correction_lowers_the_safe_loss(tmp_path):
    ends = {}
    for tau in (0.0, 1e9):
        made = trainers.trainer("spag", tmp_path, tau=tau, eta=2.0)
        made.train()
        ends[tau] = [e["safe_loss"] for e in made.state.log_history if "safe_loss" in e][-1]
    assert ends[0.0] < ends[1e9] - 0.1


def test_the_trust_region_bounds_the_step():
    assert step_size(0.5, 2.0, 1.0) == 0.25
    assert step_size(0.5, 0.1, 1.0) == 1.0
    assert step_size(0.5, 0.0, 1.0) == 0.0


def test_it_needs_safe_rows(tmp_path):
    from holdfast.defenses.spag import SPAGConfig, SPAGTrainer

    config = SPAGConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(DataError, match="alignment_dataset"):
        SPAGTrainer(
            model=trainers.model(),
            args=config,
            train_dataset=trainers.USER,
            processing_class=trainers.TOKENIZER,
        )


@pytest.mark.parametrize("wrong", [{"tau": -1.0}, {"eta": -0.1}, {"form": "dpp"}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        trainers.trainer("spag", tmp_path, **wrong)
