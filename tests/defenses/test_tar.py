"""TAR against a plain loop on copies of the model, each term by hand, its reductions, and exact restoring."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields

import pytest
import torch

import plain
import trainers
from holdfast.defenses.tar import TARConfig, TARMixin
from holdfast.errors import InputError, ModelError
from holdfast.training import tampering as tamper
from holdfast.training.tokenising import prepare_rows

HARMFUL = prepare_rows(trainers.HARMFUL, trainers.TOKENIZER, 2048)
STEPS, K, EVERY, LAMBDA, RATE = 3, 4, 2, 0.3, 1e-2
STRONG = {
    "max_steps": STEPS, "inner_steps": K, "inner_subsample": EVERY, "schedule_lambda": LAMBDA,
    "adversary_learning_rates": f"{RATE}", "lambda_tr": 2.0, "lambda_retain": 0.4, "dpo_beta": 0.3,
}  # fmt: skip


def tar(out, **options):
    return trainers.trainer("tar", out, **{**STRONG, **options})


def end(out, name, **options):
    """Weights after a training with dropout, whose random numbers start with the trainer."""
    made = trainers.trainer(name, out, net=trainers.model(dropout=0.3), **{"max_steps": 4} | options)
    made.train()
    return trainers.weights(made)


def trainable(net):
    return [p for p in net.parameters() if p.requires_grad]


def log_prob(net, row):
    """log pi of a single completion, token by token, without padding."""
    logits = net(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
    return sum(logits[t - 1, label] for t, label in enumerate(row["labels"]) if label != -100)


def entropy(net, row):
    """sum p log p over the positions of one completion."""
    p = net(input_ids=torch.tensor([row["input_ids"]])).logits[0].softmax(-1)
    return sum((p[t - 1] * p[t - 1].log()).sum() for t, label in enumerate(row["labels"]) if label != -100)


def resistance(net, start, rows, refusals, kind, beta):
    """L_TR, row by row, and the harmful rows' cross-entropy."""
    tokens = sum(label != -100 for row in rows for label in row["labels"])
    harmful = [log_prob(net, row) for row in rows]
    if kind == "entropy":
        loss = sum(entropy(net, row) for row in rows) / tokens
    else:
        losses = []
        for row, refusal, now in zip(rows, refusals, harmful, strict=True):
            with torch.no_grad():
                reference = log_prob(start, refusal) - log_prob(start, row)
            margin = beta * (log_prob(net, refusal) - now - reference)
            losses.append(-torch.log(1 / (1 + torch.exp(-margin))))
        loss = sum(losses) / len(losses)
    return loss, -sum(harmful).item() / tokens


def retain(net, start, batch, squared):
    """The mean over layers and completion positions of the distance of hidden states, one by one."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    now = net(**inputs, output_hidden_states=True).hidden_states
    with torch.no_grad():
        before = start(**inputs, output_hidden_states=True).hidden_states
    found = []
    for layer in range(len(now)):
        for row, labels in enumerate(batch["labels"]):
            for t in range(1, len(labels)):
                if labels[t] != -100:
                    square = ((now[layer][row, t - 1] - before[layer][row, t - 1]) ** 2).sum()
                    found.append(square if squared or square == 0 else square.sqrt())
    return sum(found) / len(found)


def plain_tar(made, kind, representation, lambda_tr, lambda_retain):
    """Weights after the steps, and the log; `made` provides the order of the harmful rows."""
    net = trainers.model()
    start = copy.deepcopy(net)
    weights = trainable(net)
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / STEPS))
    )
    partners, _ = tamper.partners(HARMFUL, plain.USER, plain.SEED)
    record = []
    order = plain.batches(len(plain.USER), plain.BATCH, [plain.SEED + epoch for epoch in range(STEPS)])
    for step, places in enumerate(order[:STEPS]):
        batch = plain.COLLATE([plain.USER[i] for i in places])
        drawn = made.harmful_indices(step, plain.BATCH, "tamper_resistance")
        rows, refusals = [HARMFUL[j] for j in drawn], [plain.USER[partners[j]] for j in drawn]
        entry = {"harmful_loss_before": resistance(net, start, rows, refusals, kind, 0.3)[1]}
        attacked = copy.deepcopy(net)
        theta = trainable(attacked)
        adversary = torch.optim.AdamW(theta, lr=RATE)
        meta = [torch.zeros_like(w) for w in weights]
        for k in range(1, K + 1):
            indices = made.harmful_indices(step * K + k - 1, plain.BATCH, "attack")
            adversary.zero_grad()
            plain.cross_entropy(attacked, [plain.COLLATE([HARMFUL[i] for i in indices])]).backward()
            adversary.step()
            if k % EVERY == 0:
                loss, entry["harmful_loss_after"] = resistance(attacked, start, rows, refusals, kind, 0.3)
                entry["tamper_resistance_loss"] = loss.item()
                for m, g in zip(meta, torch.autograd.grad(loss, theta), strict=True):
                    m += math.exp(LAMBDA * (k - K)) * g
        likelihood = plain.cross_entropy(net, [batch])
        distance = retain(net, start, batch, representation == "squared")
        entry |= {"cross_entropy": likelihood.item(), "retain_loss": distance.item()}
        optimizer.zero_grad()
        (likelihood + lambda_retain * distance).backward()
        for w, m in zip(weights, meta, strict=True):
            w.grad += lambda_tr * m
        entry["grad_norm"] = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        optimizer.step()
        schedule.step()
        record.append(entry)
    return [w.detach() for w in weights], record


@pytest.mark.parametrize(
    ("kind", "representation", "lambda_tr", "accumulation"),
    [("dpo", "squared", 2.0, 1), ("dpo", "norm", 2.0, 2), ("entropy", "squared", 20.0, 4)],
)
def test_the_update_is_that_of_a_plain_loop(tmp_path, kind, representation, lambda_tr, accumulation):
    made = tar(
        tmp_path, tamper_resistance=kind, representation=representation, lambda_tr=lambda_tr,
        per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    order = tar(tmp_path)
    expected, record = plain_tar(order, kind, representation, lambda_tr, 0.4)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    logged = [entry for entry in made.state.log_history if "loss" in entry]
    for entry, step in zip(logged, record, strict=True):
        for name, value in step.items():
            assert entry[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name
    for change in ((0.0, 0.4), (lambda_tr, 0.0)):
        other, _ = plain_tar(order, kind, representation, *change)
        assert trainers.distance(expected, other) > 1e-4, "if the term is too weak, the test shows nothing"


def test_the_attack_attacks(tmp_path):
    """The loss on the attack's own rows falls far; with a learning rate of 0 it stays the same."""

    def losses(rate):
        made = tar(tmp_path, inner_steps=12, inner_subsample=12, adversary_learning_rates=rate, max_steps=1)
        made.train()
        entry = made.state.log_history[0]
        return entry["harmful_loss_before"], entry["harmful_loss_after"]

    before, after = losses("0.05")
    assert after < before - 0.1
    still, same = losses("0.0")
    assert still == before
    assert same == pytest.approx(before, abs=1e-6)


def test_every_adversary_has_its_turn(tmp_path, monkeypatch):
    seen = []
    take = tamper.meta_gradient
    monkeypatch.setattr(
        tamper, "meta_gradient", lambda *a, **k: seen.append(k["learning_rate"]) or take(*a, **k)
    )
    tar(
        tmp_path, adversary_learning_rates="1e-3, 2e-3", max_steps=8, inner_steps=1, inner_subsample=1
    ).train()
    assert set(seen) == {1e-3, 2e-3}


def test_without_lambda_tr_nothing_is_attacked(tmp_path):
    made = tar(tmp_path, lambda_tr=0.0)
    made.harmful_batches = lambda *_: pytest.fail("attacked")
    made.train()
    expected, _ = plain_tar(tar(tmp_path), "dpo", "squared", 0.0, 0.4)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5


def test_both_lambdas_at_0_are_sft(tmp_path):
    """Bit for bit."""
    nothing = end(tmp_path, "tar", lambda_tr=0.0, lambda_retain=0.0)
    assert trainers.same(nothing, end(tmp_path, "sft"))
    assert not trainers.same(nothing, end(tmp_path, "tar", lambda_tr=0.0, lambda_retain=0.4))


@pytest.mark.parametrize(
    ("rate", "error", "message"),
    [
        ("1e30", ModelError, "before step 1, with a learning rate of 1e\\+30, diverged"),
        ("0.1", OSError, "cut"),
    ],
)
def test_the_weights_come_back_bit_for_bit(tmp_path, monkeypatch, rate, error, message):
    """After an attack that diverges, and after one that is interrupted."""
    made = tar(tmp_path, adversary_learning_rates=rate)
    begun, draw = trainers.weights(made), made.harmful_batches

    def interrupted(place, purpose):
        assert place == 0 or not trainers.same(begun, trainers.weights(made)), "the attack is running"
        if error is OSError and place == 2:
            raise OSError("cut")
        return draw(place, purpose)

    monkeypatch.setattr(made, "harmful_batches", interrupted)
    with pytest.raises(error, match=message):
        made.train()
    assert trainers.same(begun, trainers.weights(made))
    assert all(p.grad is None for p in made.model.parameters())
    assert all(module.training for module in made.model.modules())


def test_a_step_with_its_attack_leaves_nothing_but_its_gradient(tmp_path):
    """With a meta-gradient of weight 0, weights, dropout and random numbers are those of the plain step."""
    tiny = end(tmp_path, "tar", **{**STRONG, "lambda_tr": 1e-30, "lambda_retain": 0.0})
    assert trainers.same(tiny, end(tmp_path, "sft", max_steps=STEPS))


def test_log_probs_and_entropy_by_hand():
    """Two rows over two tokens; the second row's completion is only its last token."""
    even, odds = math.log(0.5), [math.log(0.2), math.log(0.8)]
    logits = torch.tensor([[[0.0, 0.0], odds, [9.0, 9.0]], [[5.0, 1.0], [0.0, 0.0], [9.0, 9.0]]])
    labels = torch.tensor([[-100, 1, 0], [-100, -100, 1]])
    found = tamper.sequence_log_probs(logits, labels)
    assert found.tolist() == pytest.approx([even + math.log(0.2), even])
    mixed = 0.2 * math.log(0.2) + 0.8 * math.log(0.8)
    assert tamper.negative_entropy(logits, labels).tolist() == pytest.approx([even, mixed, even])


def test_dpo_by_hand():
    """log(1 + e^-m) at m = beta ((c - c_G) - (r - r_G)): 0.5 (1 + 2) = 1.5, and log 2 if nothing moved."""
    now, start = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -3.0])
    harmful, before = torch.tensor([-6.0, -4.0]), torch.tensor([-4.0, -4.0])
    found = tamper.dpo_loss(now, harmful, (start, before), 0.5)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1.5)), math.log(2)])


def test_the_distance_of_hidden_states_by_hand():
    """Layers moved by (3, 4) and by 0, at the one position that predicts: 25 / 2 and 5 / 2."""
    start = [torch.zeros(1, 3, 2), torch.zeros(1, 3, 2)]
    hidden = [torch.tensor([[[9.0, 9.0], [3.0, 4.0], [9.0, 9.0]]]), torch.zeros(1, 3, 2)]
    labels = torch.tensor([[-100, -100, 1]])
    assert tamper.representation_distance(hidden, start, labels, squared=True).tolist() == [12.5]
    assert tamper.representation_distance(hidden, start, labels, squared=False).tolist() == [2.5]


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_the_meta_gradient_by_hand(scale):
    """AdamW on a loss with slope 1 steps by its learning rate: w <- (1 - 0.01 lr) w - lr; L_TR = w^2 / 2."""
    w = torch.nn.Parameter(torch.tensor([2.0]))

    def slope(k, scale):
        (scale * w.sum()).backward()

    def square(k, scale):
        (scale * w.square().sum() / 2).backward()

    found = tamper.meta_gradient(
        [w], slope, square, steps=4, subsample=2, learning_rate=0.1, schedule_lambda=0.3, scale=scale
    )
    theta = [2.0]
    for _ in range(4):
        theta.append(0.999 * theta[-1] - 0.1)
    assert found[0].item() == pytest.approx(math.exp(-0.6) * theta[2] + theta[4], rel=1e-5)
    assert w.item() == pytest.approx(theta[4])
    assert w.grad is None


def test_a_gradient_that_overflows_is_taken_with_half_the_scale():
    w, tried = torch.nn.Parameter(torch.tensor([3.0])), []

    def backward(scale):
        tried.append(scale)
        (w.sum() * (scale if scale < 5 else math.inf)).backward()

    tamper.take_gradient([w], backward, 16.0)
    assert tried == [16.0, 8.0, 4.0]
    assert w.grad.item() == 1.0


def test_gathered_weights_are_dropped_with_the_old_values():
    """FSDP2 keeps the outermost module's gathered weights after a forward; they would hide the new weights."""

    class Gathered(torch.nn.Linear):
        def reshard(self):
            seen.append(self.weight.detach().clone())

    seen, net = [], torch.nn.Sequential(Gathered(1, 1, bias=False))
    start, other = net[0].weight.detach().clone(), torch.full((1, 1), 7.0)
    with tamper.borrowed(net, [net[0].weight], [other]):
        pass
    assert torch.equal(torch.stack(seen), torch.stack([other, start]))


def test_a_refusal_of_the_same_question_is_preferred():
    def row(question, answer):
        return {"input_ids": [*question, *answer], "labels": [-100] * len(question) + answer}

    refusals = [row([1, 2], [9]), row([3], [9]), row([3], [8]), row([], [9])]
    found, same = tamper.partners([row([3], [5]), row([7], [5]), row([], [5])], refusals, seed=1)
    assert found[0] == 1
    assert all(place in range(4) for place in found)
    assert same == 1
    many, _ = tamper.partners([row([7, i], [5]) for i in range(40)], refusals, seed=1)
    assert set(many) == {0, 1, 2, 3}


def test_on_trl_the_weights_are_the_same(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    class TRLConfig(TARConfig, trl.SFTConfig):
        """TAR's and TRL's options."""

    class TRLTrainer(TARMixin, trl.SFTTrainer):
        """TAR on TRL."""

    made = tar(tmp_path)
    made.train()
    given = {f.name: getattr(made.args, f.name) for f in fields(TARConfig) if f.init}
    config = dataclass(TRLConfig)(**{k: v for k, v in given.items() if k != "max_length"})
    user, harmful = Dataset.from_list(trainers.USER), Dataset.from_list(trainers.HARMFUL)
    other = TRLTrainer(
        model=trainers.model(), args=config, train_dataset=user, harmful_dataset=harmful,
        processing_class=trainers.TOKENIZER,
    )  # fmt: skip
    other.train()
    assert trainers.distance(trainers.weights(made), trainers.weights(other)) < 1e-5


def test_packed_rows_are_refused(tmp_path):
    class Packed(TARConfig):
        packing = True

    made = tar(tmp_path)
    with pytest.raises(InputError, match="packing=False"):
        type(made)(
            model=trainers.model(), args=Packed(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=trainers.USER, harmful_dataset=trainers.HARMFUL, processing_class=trainers.TOKENIZER,
        )  # fmt: skip


@pytest.mark.parametrize(
    "wrong",
    [
        {"inner_steps": 2}, {"inner_subsample": 0}, {"lambda_tr": -1.0}, {"lambda_retain": -1.0},
        {"schedule_lambda": -0.1}, {"dpo_beta": 0.0}, {"tamper_resistance": "kl"}, {"representation": "l1"},
        {"adversary_learning_rates": "fast"}, {"adversary_learning_rates": "-1e-3"},
        {"adversary_learning_rates": 1e-3},
    ],
)  # fmt: skip
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TARConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_nothing_is_to_be_retained_at_the_start(tmp_path):
    """Under NEFTune and dropout too, which G gets like theta. LoRA's own dropout acts only once B is not 0."""
    net = trainers.model(dropout=0.3)
    for name, weight in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    made = tar(tmp_path, net=net, neftune_noise_alpha=5.0, lambda_tr=0.0, max_steps=2)
    made.train()
    first, second = [entry["retain_loss"] for entry in made.state.log_history if "retain_loss" in entry]
    assert first == 0 < second
