"""Each method against an independent calculation, and its reductions."""

from __future__ import annotations

import pytest
import torch
import trainers

from holdfast.defenses.bso import PhaseBatchSampler, Phases
from holdfast.defenses.lisa import LisaConfig, add_proximal_gradient


def plain_lisa(
    k1: int, k2: int, rho: float, steps: int, accumulation: int, warmup: float = 0.0, clip: float = 1.0
):
    """Lisa as Algorithm 1 has it: a loop, the penalty in the loss, one anchor for each state."""
    net = trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())
    )
    from holdfast.defenses.base import prepare_rows
    from holdfast.defenses.rows import collator

    rows = prepare_rows(trainers.USER, trainers.TOKENIZER, 2048) + prepare_rows(
        trainers.ALIGNMENT, trainers.TOKENIZER, 2048
    )
    batches = list(
        PhaseBatchSampler(
            len(trainers.USER), len(trainers.ALIGNMENT), batch_size=4 // accumulation,
            micro_batches=accumulation, steps=steps, phases=Phases(k1, k2), seed=11,
        )
    )  # fmt: skip
    collate = collator(trainers.TOKENIZER)
    last = {"alignment": [w.detach().clone() for w in weights], "user": [w.detach().clone() for w in weights]}
    state = "alignment" if k1 else "user"
    losses = []
    for step in range(steps):
        now = "alignment" if step % (k1 + k2) < k1 else "user"
        if now != state:
            last[state] = [w.detach().clone() for w in weights]  # the state that ends leaves its iterate
            state = now
        anchor = last["user" if state == "alignment" else "alignment"]
        window = [
            collate([rows[i] for i in b]) for b in batches[step * accumulation : (step + 1) * accumulation]
        ]
        logits = [net(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in window]
        flat = torch.cat([x[:, :-1].reshape(-1, x.shape[-1]) for x in logits])
        labels = torch.cat([b["labels"][:, 1:].reshape(-1) for b in window])
        loss = torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100)
        losses.append((state, loss.item()))
        if step + 1 > warmup * steps:
            loss = loss + rho / 2 * sum(((w - a) ** 2).sum() for w, a in zip(weights, anchor, strict=True))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights], losses


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("warmup", [0.0, 0.5])
def test_lisa_is_algorithm_1(tmp_path, accumulation, warmup):
    made = trainers.trainer(
        "lisa", tmp_path, alignment_steps=2, finetune_steps=3, rho=3.0, proximal_warmup_ratio=warmup,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    expected, losses = plain_lisa(2, 3, 3.0, 12, accumulation, warmup)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, (state, loss) in zip(logged, losses, strict=True):
        assert entry["state"] == state
        assert entry[f"{state}_loss"] == pytest.approx(loss, abs=1e-4)
        assert entry["loss"] == pytest.approx(loss, abs=1e-4)


def test_the_equation_test_can_fail(tmp_path):
    made = trainers.trainer(
        "lisa", tmp_path, alignment_steps=2, finetune_steps=3, rho=3.0, proximal_warmup_ratio=0.0
    )
    made.train()
    other, _ = plain_lisa(2, 3, 1.0, 12, 1)
    assert trainers.distance(trainers.weights(made), other) > 1e-4


def test_lisa_with_rho_0_is_bso(tmp_path):
    phases = {"alignment_steps": 2, "finetune_steps": 3}
    lisa = trainers.trainer("lisa", tmp_path, rho=0.0, **phases)
    bso = trainers.trainer("bso", tmp_path, **phases)
    lisa.train(), bso.train()
    assert trainers.same(trainers.weights(lisa), trainers.weights(bso))


@pytest.mark.parametrize("length", [{"max_steps": 12}, {"max_steps": -1, "num_train_epochs": 2}])
def test_bso_without_alignment_steps_is_sft(tmp_path, length):
    bso = trainers.trainer("bso", tmp_path, alignment_steps=0, finetune_steps=1, **length)
    sft = trainers.trainer("sft", tmp_path, **length)
    bso.train(), sft.train()
    assert bso.state.global_step == sft.state.global_step == 12
    assert trainers.same(trainers.weights(bso), trainers.weights(sft))


def test_bso_differs_from_sft(tmp_path):
    bso = trainers.trainer("bso", tmp_path, alignment_steps=2, finetune_steps=3)
    sft = trainers.trainer("sft", tmp_path)
    bso.train(), sft.train()
    assert not trainers.same(trainers.weights(bso), trainers.weights(sft))


def test_the_proximal_gradient_by_hand():
    w, other = torch.nn.Parameter(torch.tensor([1.0, -2.0])), torch.nn.Parameter(torch.tensor([5.0]))
    w.grad = torch.tensor([0.5, 0.5])
    add_proximal_gradient([w, other], [torch.tensor([0.5, -2.0]), torch.tensor([0.0])], rho=2.0)
    assert w.grad.tolist() == [1.5, 0.5]
    assert other.grad is None
    add_proximal_gradient([w], [torch.tensor([0.5, -2.0])], rho=2.0, scale=8.0)
    assert w.grad.tolist() == [9.5, 0.5]


def test_drift_and_penalty_are_logged(tmp_path):
    made = trainers.trainer(
        "lisa", tmp_path, alignment_steps=2, finetune_steps=4, rho=2.0, proximal_warmup_ratio=0.0
    )
    made.train()
    logged = [entry for entry in made.state.log_history if "drift" in entry]
    assert len(logged) == 12
    for entry in logged:
        assert entry["drift"] > 0
        assert entry["proximal_penalty"] == pytest.approx(entry["drift"] ** 2, rel=1e-4)
    assert logged[2]["drift"] < logged[5]["drift"], "the drift grows within a phase and restarts at a switch"
    assert logged[6]["drift"] < logged[5]["drift"]


def test_the_true_alignment_loss_is_logged_whatever_the_user_answers(tmp_path):
    """The references log 60 times too much where user answers are one word."""
    short = trainers.trainer("bso", tmp_path, alignment_steps=1, finetune_steps=1, max_steps=2)
    long = trainers.trainer(
        "bso", tmp_path, alignment_steps=1, finetune_steps=1, max_steps=2,
        rows=trainers.pairs(trainers.tiny.user_rows(24), long_answers=True),
    )  # fmt: skip
    short.train(), long.train()
    first = [made.state.log_history[0]["alignment_loss"] for made in (short, long)]
    assert first[0] == first[1]
    assert 4 < first[0] < 8, "close to the log of the vocabulary for a random model"


def test_eval_loss_is_free_of_the_penalty(tmp_path):
    losses = []
    for rho in (0.0, 1000.0):
        made = trainers.trainer("lisa", tmp_path, alignment_steps=1, finetune_steps=1, rho=rho, max_steps=4)
        made.train()
        with torch.no_grad():
            for p, fixed in zip(made.model.parameters(), trainers.model(seed=9).parameters(), strict=True):
                p.copy_(fixed)
        losses.append(made.evaluate(eval_dataset=made.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("wrong", [{"rho": -1.0}, {"proximal_warmup_ratio": 1.5}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LisaConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import DistributedType

    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ValueError, match="DeepSpeed"):
        trainers.trainer("lisa", tmp_path)


def test_alignment_rows_are_needed(tmp_path):
    from holdfast.defenses.lisa import LisaTrainer

    with pytest.raises(ValueError, match="alignment_dataset"):
        LisaTrainer(
            model=trainers.model(), args=LisaConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=trainers.USER, processing_class=trainers.TOKENIZER,
        )  # fmt: skip
