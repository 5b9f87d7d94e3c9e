"""Lisa and its three proximal terms against a plain loop, its reductions, its record, its refusals."""

from __future__ import annotations

import types

import pytest
import torch
from peft import LoraConfig, get_peft_model

import plain
import tiny
import trainers
from holdfast.defenses.lisa import LisaConfig, LisaMixin
from holdfast.errors import DataError, ModelError

PHASES = {"alignment_steps": 2, "finetune_steps": 3}
TERMS = {
    "l2": (plain.l2, 3.0),
    "fisher": (plain.fisher(8, mean_1=True), 3.0),
    "delta_w": (plain.delta_w, 30.0),
}


def lisa(out, proximal="l2", **options):
    return trainers.trainer(
        "lisa", out, **{**PHASES, "rho": TERMS[proximal][1], "proximal_warmup_ratio": 0.0, "fisher_rows": 8,
                        "proximal": proximal, **options},
    )  # fmt: skip


def logged(made):
    return [entry for entry in made.state.log_history if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("proximal", TERMS)
def test_lisa_is_algorithm_1(tmp_path, proximal, accumulation):
    """Weights, and every entry of the record, at every step."""
    made = lisa(
        tmp_path, proximal, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    made.train()
    at_switch, rho = TERMS[proximal]
    expected, record = plain.train(2, 3, rho, accumulation, at_switch=at_switch)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    assert sum(entry["penalty"] > 1e-4 for entry in record) >= 10, (
        "if the term is too weak, the test shows nothing"
    )
    for entry, step in zip(logged(made), record, strict=True):
        assert entry["state"] == step["state"]
        assert entry[f"{step['state']}_loss"] == pytest.approx(step["loss"], abs=1e-4)
        assert entry["loss"] == pytest.approx(step["loss"], abs=1e-4)
        for name in ("grad_norm", "drift", "penalty"):
            assert entry[name] == pytest.approx(step[name], rel=1e-3, abs=1e-6), name


def test_the_authors_two_anchors_are_one():
    """The authors keep each state's last iterate; only that of the state that just ended is ever read."""
    one, _ = plain.train(2, 3, 3.0)
    two, _ = plain.train(2, 3, 3.0, at_switch=plain.two_anchors())
    assert trainers.same(one, two)


def test_the_terms_differ():
    """The equation tests can fail: different terms and different strengths give different weights."""
    ends = [plain.train(2, 3, 3.0, at_switch=at_switch)[0] for at_switch, _ in TERMS.values()]
    ends.append(plain.train(2, 3, 1.0)[0])
    for i, left in enumerate(ends):
        for right in ends[:i]:
            assert trainers.distance(left, right) > 1e-4


def test_the_term_is_left_out_in_the_warm_up(tmp_path):
    made = lisa(tmp_path, proximal_warmup_ratio=0.5)
    made.train()
    expected, _ = plain.train(2, 3, 3.0, warmup=0.5)
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
    assert [e["penalty"] > 0 for e in logged(made)] == [False] * 7 + [True] * 5


@pytest.mark.parametrize(
    ("ratio", "steps", "first"),
    [(0.1, 20, 3), (0.1, 100, 11), (0.1, 20_000, 2001), (0.1, 9, 1), (0.5, 12, 7), (0.0, 20, 0), (1.0, 4, 5)],
)
def test_the_first_step_with_the_term_is_that_of_the_authors_code(ratio, steps, first):
    """The authors apply the term if the 0-based step is above the ratio times all steps."""
    config = types.SimpleNamespace(rho=2.0, proximal_warmup_ratio=ratio)
    made = types.SimpleNamespace(args=config, state=types.SimpleNamespace(max_steps=steps))
    found = [LisaMixin.penalty_strength(made, step) for step in range(steps + 1)]
    assert found == [0.0] * first + [2.0] * (steps + 1 - first)


def test_lisa_with_rho_0_is_bso(tmp_path):
    made = lisa(tmp_path, rho=0.0)
    bso = trainers.trainer("bso", tmp_path, **PHASES)
    made.train(), bso.train()
    assert trainers.same(trainers.weights(made), trainers.weights(bso))
    assert all(entry["penalty"] == 0 for entry in logged(made))


def test_a_fisher_of_zeros_is_no_penalty(tmp_path, monkeypatch):
    """It does not divide by zero."""
    from holdfast.training import penalty

    def zeros(trainer, model, rows, step):
        return [torch.zeros_like(w) for w in trainer.weights]

    monkeypatch.setattr(penalty, "trainer_fisher", zeros)
    made = lisa(tmp_path, "fisher")
    bso = trainers.trainer("bso", tmp_path, **PHASES)
    made.train(), bso.train()
    assert trainers.same(trainers.weights(made), trainers.weights(bso))


def test_fisher_is_taken_anew_at_each_switch_point(tmp_path):
    """At the first switch point a new LoRA has no gradient on A; at the next it has one. The mean is 1."""
    taken, made = {}, lisa(tmp_path, "fisher")
    take = made.anchor_taken

    def remember():
        take()
        taken[made.state.global_step] = [f.clone() for f in made.fisher]

    made.anchor_taken = remember
    made.train()
    names = [n for n, p in made.model.named_parameters() if p.requires_grad]
    assert list(taken) == [0, 2, 5, 7, 10]
    for step, fisher in taken.items():
        assert float(torch.cat([f.flatten() for f in fisher]).mean()) == pytest.approx(1, rel=1e-4)
        for name, f in zip(names, fisher, strict=True):
            assert bool((f > 0).any()) == ("lora_B" in name or step > 0), (step, name)


@pytest.mark.parametrize("proximal", ["fisher", "delta_w"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_inside_a_phase_is_exact(tmp_path, proximal, accumulation):
    setting = {
        "save_strategy": "steps", "save_steps": 4, "gradient_accumulation_steps": accumulation,
        "per_device_train_batch_size": 4 // accumulation,
    }  # fmt: skip

    def make(folder):
        torch.manual_seed(0)
        return lisa(folder, proximal, net=trainers.model(dropout=0.2), **setting)

    whole = make(tmp_path)
    whole.train()
    resumed = make(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))


def test_the_record_is_true_when_not_every_step_is_logged(tmp_path):
    """Losses are means over each state's steps since the last entry; other values are those at the entry."""
    made = lisa(tmp_path, logging_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    made.train()
    _, record = plain.train(2, 3, 3.0, 2)
    for i, entry in enumerate(logged(made)):
        steps = record[4 * i : 4 * i + 4]
        assert entry["state"] == steps[-1]["state"]
        assert entry["loss"] == pytest.approx(sum(s["loss"] for s in steps) / 4, abs=1e-4)
        for state in ("alignment", "user"):
            own = [s["loss"] for s in steps if s["state"] == state]
            assert entry[f"{state}_loss"] == pytest.approx(sum(own) / len(own), abs=1e-4)
        for name in ("grad_norm", "drift", "penalty"):
            assert entry[name] == pytest.approx(steps[-1][name], rel=1e-3), name


def test_eval_loss_is_free_of_the_penalty(tmp_path):
    losses = []
    for rho in (0.0, 1000.0):
        made = lisa(tmp_path, alignment_steps=1, finetune_steps=1, rho=rho, max_steps=4)
        made.train()
        with torch.no_grad():
            for p, fixed in zip(made.model.parameters(), trainers.model(seed=9).parameters(), strict=True):
                p.copy_(fixed)
        losses.append(made.evaluate(eval_dataset=made.train_dataset)["eval_loss"])
    assert losses[0] == losses[1]


def test_a_second_training_takes_its_own_anchor(tmp_path):
    made = lisa(tmp_path, max_steps=2, alignment_steps=0, finetune_steps=1, learning_rate=1e-2)
    made.train()
    there = trainers.weights(made)
    made.train()
    assert trainers.distance(made.anchor, there) == 0


@pytest.mark.parametrize(
    "wrong", [{"rho": -1.0}, {"proximal_warmup_ratio": 1.5}, {"proximal": "l1"}, {"fisher_rows": 0}]
)
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LisaConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


@pytest.mark.parametrize("missing", [{}, {"alignment_steps": 0, "proximal": "fisher"}])
def test_alignment_rows_are_needed(tmp_path, missing):
    from holdfast.defenses.lisa import LisaTrainer

    def make(**options):
        return LisaTrainer(
            model=trainers.model(), args=LisaConfig(output_dir=str(tmp_path), use_cpu=True, **options),
            train_dataset=trainers.USER, processing_class=trainers.TOKENIZER,
        )  # fmt: skip

    with pytest.raises(DataError, match="alignment_dataset"):
        make(**missing)
    make(alignment_steps=0)


LORA = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_dora": True}, "lora_"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, r"lora_B\.default\.bias"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "lora_embedding_A"),
        (None, "embed_tokens"),
    ],
    ids=["dora", "modules_to_save", "lora_bias", "embedding", "full"],
)
def test_delta_w_is_refused_where_the_update_is_not_b_a(tmp_path, change, named):
    base = tiny.llama(len(trainers.TOKENIZER), attention_bias=True)
    net = base if change is None else get_peft_model(base, LoraConfig(**{**LORA, **change}))
    with pytest.raises(ModelError, match=f"delta_w.*{named}"):
        lisa(tmp_path, "delta_w", net=net)
    lisa(tmp_path, "delta_w", net=net, rho=0.0)


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(trainers.TOKENIZER), n_embd=32, n_layer=2, n_head=4, n_positions=512,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    ("base", "change"),
    [
        (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
        (lambda: tiny.llama(len(trainers.TOKENIZER)), {"use_rslora": True, "r": 4}),
        (
            lambda: tiny.llama(len(trainers.TOKENIZER)),
            {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        ),
    ],
    ids=["conv1d", "rslora", "patterns"],
)
def test_delta_w_on_other_layers_and_scalings(tmp_path, base, change):
    def net():
        made = base()
        torch.manual_seed(3)
        return get_peft_model(made, LoraConfig(**{**LORA, **change}))

    made = lisa(tmp_path, "delta_w", net=net())
    made.train()
    expected, _ = plain.train(2, 3, TERMS["delta_w"][1], at_switch=plain.delta_w, net=net())
    assert trainers.distance(trainers.weights(made), expected) < 1e-5
