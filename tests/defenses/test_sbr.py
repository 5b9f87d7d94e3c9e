"""SBR against a plain loop, its reductions, and its anchors' states."""

from __future__ import annotations

import math

import pytest
import torch

import trainers
from holdfast.errors import DataError
from holdfast.training.questions import last_states, padded, questions
from holdfast.training.tokenising import prepare_rows

STRONG = {"lambda_": 2.0, "anchors": 3}


def plain_loop(lambda_, prompts, norm="sum", steps=6):
    """The equation as written: one row and one anchor at a time, a second model for theta_0."""
    net, aligned = trainers.model(), trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + math.cos(math.pi * s / steps))
    )
    rows = prepare_rows(trainers.USER, trainers.TOKENIZER, 2048)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(11)).tolist()

    def state(model, prompt):
        return model(input_ids=torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0, -1]

    for step in range(steps):
        total, tokens = torch.tensor(0.0), 0
        for i in order[4 * step : 4 * step + 4]:
            labels = torch.tensor(rows[i]["labels"])[1:]
            logits = net(input_ids=torch.tensor([rows[i]["input_ids"]])).logits[0, :-1]
            total = total + torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            tokens += int((labels != -100).sum())
        penalty = torch.tensor(0.0)
        for prompt in prompts:
            moved = state(net, prompt) - state(aligned, prompt).detach()
            penalty = penalty + (moved.square().sum() if norm == "sum" else moved.square().mean())
        optimizer.zero_grad()
        (total / tokens + lambda_ * penalty / len(prompts)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights]


@pytest.mark.parametrize("norm", ["sum", "mean"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_is_the_equation(norm, accumulation, tmp_path):
    made = trainers.trainer(
        "sbr", tmp_path, max_steps=6, norm=norm, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation, **STRONG,
    )  # fmt: skip
    made.train()
    expected = plain_loop(2.0, made.anchor_prompts, norm)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    without = plain_loop(0.0, made.anchor_prompts, norm)
    assert trainers.distance(without, expected) > (1e-4 if norm == "sum" else 1e-5)


def test_without_lambda_it_is_sft(tmp_path):
    ours, runs = trainers.ended("sbr", tmp_path, lambda_=0.0)
    sft, plain_runs = trainers.ended("sft", tmp_path)
    assert trainers.same(ours, sft)
    assert runs == plain_runs


def test_a_large_lambda_keeps_the_states(tmp_path):
    """The anchors stay, measured by a model of their own; plain fine-tuning moves them."""
    moved = {}
    for lambda_ in (0.0, 1000.0):
        made = trainers.trainer("sbr", tmp_path, lambda_=lambda_, anchors=3)
        batch = padded(made.anchor_prompts, 0, "cpu")
        before = last_states(made.model.eval(), batch).detach()
        made.train()
        moved[lambda_] = float((last_states(made.model.eval(), batch) - before).detach().norm())
    assert moved[1000.0] < 0.1 * moved[0.0]


def test_the_penalty_is_0_at_the_start_under_dropout(tmp_path):
    made = trainers.trainer("sbr", tmp_path, net=trainers.model(dropout=0.5), **STRONG)
    made.train()
    logged = [entry["penalty"] for entry in made.state.log_history if "penalty" in entry]
    assert logged[0] == pytest.approx(0, abs=1e-9)
    assert logged[-1] > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_state(side):
    net = trainers.model().eval()
    prompts = [[5, 6, 7, 8, 9], [7, 8], [9]]
    alone = torch.cat([last_states(net, padded([prompt], 0, "cpu")) for prompt in prompts])
    batch = padded(prompts, 0, "cpu")
    if side == "left":
        batch = {key: torch.stack([row.roll(5 - len(p)) for row, p in zip(t, prompts, strict=True)])
                 for key, t in batch.items()}  # fmt: skip
        places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        batch["position_ids"] = places
    assert torch.allclose(last_states(net, batch), alone, atol=1e-5)


def test_anchors_of_more_than_one_batch(tmp_path):
    """The batch size bounds the memory, not the result."""
    weights = []
    for size in (1, 4):
        made = trainers.trainer(
            "sbr", tmp_path, max_steps=3, per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size, lambda_=2.0, anchors=5,
        )  # fmt: skip
        made.train()
        weights.append(trainers.weights(made))
    assert trainers.distance(*weights) < 1e-6


TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"prompt": "Fold it", "completion": "no"}, "Fold it"),
        ({"prompt": "Fold it"}, "Fold it"),
        ({"prompt": [{"role": "user", "content": "Fold it"}]}, "<user>Fold it<assistant>"),
        (
            {"messages": [{"role": "user", "content": "Fold it"}, {"role": "assistant", "content": "no"}]},
            "<user>Fold it<assistant>",
        ),
    ],
)
def test_questions_leave_answers_out(row, text):
    tokenizer = trainers.tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert questions([row], tokenizer, None) == [ids]
    assert questions([row], tokenizer, 2) == [ids[-2:]]


def test_tokenised_rows_are_cut_at_their_first_label():
    assert questions([{"input_ids": [4, 5, 6], "labels": [-100, -100, 6]}], None, None) == [[4, 5]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "Fold"}] * 4, "columns text"),
        ([{"input_ids": [4, 5], "labels": [4, 5]}] * 4, "no question"),
        ([{"messages": [{"role": "assistant", "content": "no"}]}] * 4, "none of the role user"),
        ([{"prompt": "Fold"}], "at least anchors=3"),
        (None, "at least anchors=3"),
    ],
)
def test_rows_without_questions_are_refused(rows, message, tmp_path):
    from holdfast.defenses.sbr import SBRConfig, SBRTrainer

    config = SBRConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", **STRONG)
    with pytest.raises(DataError, match=message):
        SBRTrainer(
            model=trainers.model(), args=config, train_dataset=trainers.USER, harmful_dataset=rows,
            processing_class=trainers.TOKENIZER,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"lambda_": -1.0}, {"anchors": 0}, {"norm": "l1"}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        trainers.trainer("sbr", tmp_path, **wrong)
