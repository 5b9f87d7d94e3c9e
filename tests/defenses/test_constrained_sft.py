"""Constrained SFT against a loop with two models, its reductions, and its reference log-probabilities."""

from __future__ import annotations

import math

import pytest
import torch

import trainers
from holdfast.defenses.constrained_sft import (
    ConstrainedSFTConfig,
    completion_log_probs,
    completion_places,
    constrained_loss,
)
from holdfast.training.tokenising import prepare_rows

BETAS = {"beta_first": 0.5, "beta_early": 2.0, "beta_later": 0.1, "early_tokens": 5}
STRONG = {"beta_first": 20.0, "beta_early": 40.0, "beta_later": 5.0, "early_tokens": 3}
ROWS = trainers.pairs(
    [{"prompt": f"Fold {i}", "response": "a paper boat, " * (1 + i % 3)} for i in range(24)]
)
"""Answers of different lengths, all longer than `early_tokens`."""


def plain_loop(betas, steps=12):
    """Equation 3 as written: a second, frozen model; a loop over rows and over their tokens."""
    net, aligned = trainers.model(), trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    rows = prepare_rows(ROWS, trainers.TOKENIZER, 2048)
    order = [
        i for epoch in range(2)
        for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(11 + epoch)).tolist()
    ]  # fmt: skip
    for step in range(steps):
        total, tokens = torch.tensor(0.0), 0
        for i in order[4 * step : 4 * step + 4]:
            ids = torch.tensor([rows[i]["input_ids"]])
            logp = net(input_ids=ids).logits[0].log_softmax(-1)
            with torch.no_grad():
                logp_aligned = aligned(input_ids=ids).logits[0].log_softmax(-1)
            t = 0
            for place, label in enumerate(rows[i]["labels"]):
                if label == -100:
                    continue
                t += 1
                beta = betas["beta_later"]
                if t <= betas["early_tokens"]:
                    beta = betas["beta_first"] if t == 1 else betas["beta_early"]
                ratio = logp[place - 1, label] - logp_aligned[place - 1, label]
                total = total - 2 / beta * torch.log(torch.sigmoid(beta * ratio))
                tokens += 1
        optimizer.zero_grad()
        (total / tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights]


@pytest.fixture(scope="module", params=[BETAS, STRONG], ids=["paper", "strong"])
def expected(request):
    return request.param, plain_loop(request.param)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_is_equation_3(expected, tmp_path, accumulation):
    betas, weights = expected
    made = trainers.trainer(
        "constrained_sft", tmp_path, rows=ROWS, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, **betas,
    )  # fmt: skip
    made.train()
    assert trainers.distance(trainers.weights(made), weights) < 1e-5


def test_the_equation_test_can_fail(tmp_path):
    """Every beta matters: changing one changes the weights."""
    expected = plain_loop(STRONG)
    for name in STRONG:
        made = trainers.trainer("constrained_sft", tmp_path, rows=ROWS, **{**STRONG, name: 1})
        made.train()
        assert trainers.distance(trainers.weights(made), expected) > 1e-4, name


def test_small_betas_are_sft(tmp_path):
    small = {"beta_first": 1e-6, "beta_early": 1e-6, "beta_later": 1e-6}
    ours = trainers.trainer("constrained_sft", tmp_path, rows=ROWS, **small)
    sft = trainers.trainer("sft", tmp_path, rows=ROWS)
    ours.train(), sft.train()
    assert trainers.distance(trainers.weights(ours), trainers.weights(sft)) < 1e-5
    logged = [[e[key] for e in made.state.log_history if "loss" in e]
              for made, key in ((ours, "cross_entropy"), (sft, "loss"))]  # fmt: skip
    assert logged[0] == pytest.approx(logged[1], abs=1e-5)


def test_the_first_steps_gradient_is_that_of_sft(tmp_path):
    made = {}
    for name in ("constrained_sft", "sft"):
        options = {"optim": "sgd", "max_steps": 1, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
        one = trainers.trainer(name, tmp_path, rows=ROWS, **options)
        start = trainers.weights(one)
        one.train()
        made[name] = [b - a for a, b in zip(start, trainers.weights(one), strict=True)]
    assert max(float(m.abs().max()) for m in made["sft"]) > 1e-4
    assert trainers.distance(made["constrained_sft"], made["sft"]) < 1e-8


def test_by_hand():
    log_probs, reference = torch.tensor([-1.0, -1.0]), torch.tensor([-2.0, -1.0])
    losses = constrained_loss(log_probs, reference, torch.tensor([2.0, 0.1]))
    assert losses[0].item() == pytest.approx(math.log(1 + math.exp(-2)))
    assert losses[1].item() == pytest.approx(20 * math.log(2))


def test_the_gradient_is_that_of_weighted_cross_entropy():
    log_probs = torch.tensor([-1.0, -3.0, -0.5], requires_grad=True)
    reference, beta = torch.tensor([-2.0, -1.0, -0.5]), torch.tensor([2.0, 0.5, 0.1])
    constrained_loss(log_probs, reference, beta).sum().backward()
    weight = 2 * (1 - torch.sigmoid(beta * (log_probs.detach() - reference)))
    assert torch.allclose(log_probs.grad, -weight)
    assert weight[2] == 1


def test_places_count_predicted_completion_tokens_from_1():
    assert completion_places({"labels": [-100, -100, 7, 8, 9]}).tolist() == [1, 2, 3]
    assert completion_places({"labels": [-100, 7, 8, -100, 7, 8, 9]}).tolist() == [1, 2, 1, 2, 3], (
        "two answers"
    )
    assert completion_places({"labels": [6, 7, 8]}).tolist() == [1, 2], (
        "no position predicts a row's first token"
    )
    packed = {"labels": [-100, 7, 8, -100, -100, 9, 6, 5], "seq_lengths": [3, 3, 2]}
    assert completion_places(packed).tolist() == [1, 2, 1, 1]


def test_the_reference_is_the_model_at_the_start_without_dropout(tmp_path):
    """Row by row with a copy of the model; dropout is on in training, and the batch size divides no count."""
    net = trainers.model(dropout=0.5)
    for key, p in net.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.2)
    start = {k: v.clone() for k, v in net.state_dict().items()}
    made = trainers.trainer("constrained_sft", tmp_path, net=net, rows=ROWS, per_device_train_batch_size=5)
    made.train()
    copy = trainers.model()
    copy.load_state_dict(start)
    copy.eval()
    rows = prepare_rows(ROWS, trainers.TOKENIZER, 2048)
    wanted = []
    for row in rows:
        with torch.no_grad():
            logits = copy(input_ids=torch.tensor([row["input_ids"]])).logits
        wanted.append(completion_log_probs(logits, torch.tensor([row["labels"]])))
    assert torch.allclose(made.reference, torch.cat(wanted), atol=1e-5)
    assert len(made.reference) == sum(label != -100 for row in rows for label in row["labels"])


def test_the_reference_draws_no_random_number(tmp_path):
    made = trainers.trainer("constrained_sft", tmp_path, net=trainers.model(dropout=0.5))
    before = torch.get_rng_state()
    made.reference_log_probs(made.model)
    assert torch.equal(before, torch.get_rng_state())


def test_a_resumed_run_reads_the_reference(tmp_path, monkeypatch):
    """The reference is not computed again: that would give the log-probabilities of the half-trained model."""
    options = {"save_strategy": "steps", "save_steps": 5, **STRONG}
    whole = trainers.trainer("constrained_sft", tmp_path, **options)
    whole.train()
    resumed = trainers.trainer("constrained_sft", tmp_path, **options)
    monkeypatch.setattr(resumed, "reference_log_probs", lambda model: pytest.fail("computed again"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert torch.equal(whole.reference, resumed.reference)
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    lost = trainers.trainer("constrained_sft", tmp_path, **options)
    monkeypatch.setattr(lost, "method_loaded", lambda state: None)
    lost.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert not trainers.same(trainers.weights(whole), trainers.weights(lost))


@pytest.mark.parametrize("kind", ["list", "arrow"])
def test_rows_keep_their_places_whatever_holds_them(kind, tmp_path):
    """Trainer removes unknown columns of a `datasets.Dataset` unless it is told not to."""
    from datasets import Dataset

    made = trainers.trainer(
        "constrained_sft", tmp_path, rows=Dataset.from_list(ROWS) if kind == "arrow" else ROWS, **STRONG
    )
    made.train()
    assert trainers.distance(trainers.weights(made), plain_loop(STRONG)) < 1e-5


@pytest.mark.parametrize(
    "wrong", [{"beta_first": 0}, {"beta_early": -1.0}, {"beta_later": 0.0}, {"early_tokens": 0}]
)
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ConstrainedSFTConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_label_smoothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        trainers.trainer("constrained_sft", tmp_path, label_smoothing_factor=0.1)


def test_it_holds_the_first_tokens_more_than_the_later_ones(tmp_path):
    """The purpose of the method: compared with SFT, early tokens gain less likelihood than later tokens."""
    rows = prepare_rows(ROWS, trainers.TOKENIZER, 2048)
    gained = {}
    for name, betas in (("start", None), ("sft", {}), ("constrained_sft", STRONG | {"beta_later": 1e-3})):
        made = trainers.trainer(
            name if betas is not None else "sft", tmp_path, rows=ROWS, learning_rate=5e-2, **(betas or {})
        )
        if betas is not None:
            made.train()
        batch = made.data_collator(rows)
        with torch.no_grad():
            logits = made.model.eval()(
                input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
            ).logits
        log_probs = completion_log_probs(logits, batch["labels"])
        early = torch.cat([completion_places(row) for row in rows]) <= STRONG["early_tokens"]
        gained[name] = torch.stack([log_probs[early].mean(), log_probs[~early].mean()])
    early, later = (gained["constrained_sft"] - gained["start"]) / (gained["sft"] - gained["start"])
    assert gained["sft"][0] > gained["start"][0]
    assert early < 0.8 * later
