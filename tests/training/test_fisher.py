"""Fisher information: by hand, for every way to divide a batch, and without an effect on the training."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import plain
import trainers
from holdfast.errors import ModelError
from holdfast.training.fisher import diagonal_fisher, dropout_off, mean_1, split_rows, trainer_fisher


def started(out, **options):
    """A trainer before its first step, with LoRA's B no longer 0."""
    made = trainers.trainer("ewc", out, **options)
    torch.manual_seed(5)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    made.create_optimizer()
    return made


def largest(left, right):
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(left, right, strict=True))


def test_a_linear_model_by_hand():
    """L = w x, so each batch's gradient is x: F is the sum of its squares."""
    w, unused = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    w.grad = torch.tensor([9.0, 9.0])
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    fisher = diagonal_fisher([w, unused], batches, lambda x, scale: (scale * (w * x).sum()).backward())
    assert [f.tolist() for f in fisher] == [[10.0, 5.0], [0.0]]
    assert w.grad is None, "an earlier gradient is neither counted nor kept"


def test_mean_1():
    fisher = [torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [10.0]])]
    mean_1(fisher)
    assert [f.flatten().tolist() for f in fisher] == [[0.25, 0.75], [0.5, 2.5]]
    nothing = [torch.zeros(3)]
    mean_1(nothing)
    assert nothing[0].tolist() == [0, 0, 0]


def test_it_is_the_squared_gradient_of_each_steps_batch(tmp_path):
    made = started(tmp_path)
    found = trainer_fisher(made, made.model, None, 0)
    weights = [p for p in made.model.parameters() if p.requires_grad]
    assert largest(found, plain.fisher_of(made.model, weights, 0, None)) < 1e-5
    assert largest(found, plain.fisher_of(made.model, weights, 1, None)) > 1e-3, "other rows in a batch"
    some = trainer_fisher(made, made.model, 8, 3)
    assert largest(some, plain.fisher_of(made.model, weights, 3, 8)) < 1e-5


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_does_not_change_it(tmp_path, accumulation):
    """With rows of unequal length, a mean of means would be another number."""
    rows = [{"prompt": "Tell. ", "completion": "no " * (1 + 5 * (i % 4)) + "</s>"} for i in range(20)]
    whole = started(tmp_path, alignment=rows)
    parts = started(
        tmp_path, alignment=rows, per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )  # fmt: skip
    assert largest(trainer_fisher(parts, parts.model, 8, 0), trainer_fisher(whole, whole.model, 8, 0)) < 1e-5


def test_processes_share_out_a_batch():
    order = list(range(20, 30))
    assert split_rows(order, 2, 1, 0, 1)[-1] == [[28, 29]]
    whole = split_rows(order, 4, 1, 0, 1)
    assert whole == [[[20, 21, 22, 23]], [[24, 25, 26, 27]], [[28, 29, 20, 21]]], (
        "the last batch is filled up"
    )
    two = [split_rows(order, 1, 2, process, 2) for process in (0, 1)]
    assert two[0][0] == [[20], [22]]
    for batch, left, right in zip(whole, *two, strict=True):
        assert sorted(batch[0]) == sorted(i for part in [*left, *right] for i in part)


def test_it_leaves_nothing_behind(tmp_path):
    """It changes no gradient, no mode and no random state."""
    made = started(tmp_path, net=trainers.model(dropout=0.5))
    made.model.train()
    frozen = next(m for m in made.model.modules() if isinstance(m, nn.Dropout))
    frozen.eval()
    before = (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()))
    first = trainer_fisher(made, made.model, 8, 0)
    after = (torch.get_rng_state(), random.getstate(), str(numpy.random.get_state()))
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]
    assert all(p.grad is None for p in made.model.parameters())
    assert made.model.training
    assert not frozen.training
    assert trainers.same(first, trainer_fisher(made, made.model, 8, 0)), "no dropout"


def opt():
    """OPT's layers call dropout themselves, with a rate stored on the layer."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    base = OPTForCausalLM(
        OPTConfig(
            vocab_size=len(trainers.TOKENIZER), hidden_size=32, ffn_dim=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=512, word_embed_proj_dim=32, dropout=0.4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]))


@pytest.mark.parametrize("build", [trainers.model, opt])
def test_checkpointing_goes_on_and_changes_nothing(tmp_path, build, monkeypatch):
    made = started(tmp_path, net=build())
    expected = trainer_fisher(made, made.model, 8, 0)
    made.model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    made.model.train()
    calls = []
    real = torch.utils.checkpoint.checkpoint
    for layer in made.model.base_model.model.modules():
        if getattr(layer, "gradient_checkpointing", False) and hasattr(layer, "_gradient_checkpointing_func"):
            layer._gradient_checkpointing_func = lambda *a, **k: (
                calls.append(1),
                real(*a, use_reentrant=False, **k),
            )[1]
    state = torch.get_rng_state()
    assert largest(trainer_fisher(made, made.model, 8, 0), expected) < 1e-6
    assert calls
    assert torch.equal(state, torch.get_rng_state())
    assert all(m.training for m in made.model.modules())
    if build is opt:
        assert {m.dropout for m in made.model.modules() if type(m).__name__ == "OPTDecoderLayer"} == {0.4}


def test_dropout_comes_back_after_an_error():
    net = nn.Sequential(nn.Dropout(0.5))

    def fail():
        with dropout_off(net):
            assert not net[0].training
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert net[0].training


class Scaler:
    """The part of accelerate's fp16 scaler that is used."""

    def get_scale(self):
        return 2.0**16


def test_the_loss_scale_of_fp16_is_taken_out(tmp_path):
    made = started(tmp_path)
    expected = trainer_fisher(made, made.model, 8, 0)
    made.accelerator.scaler = Scaler()
    assert largest(trainer_fisher(made, made.model, 8, 0), expected) < 1e-6


def test_a_scaled_gradient_that_overflows_is_taken_again():
    w, used = nn.Parameter(torch.zeros(1)), []

    def backward(x, scale):
        used.append(scale)
        gradient = torch.tensor([x * scale])
        w.grad = gradient if gradient < 65504 else torch.tensor([float("inf")])

    assert diagonal_fisher([w], [3.0, 4.0], backward, 2.0**16)[0].tolist() == [25.0]
    assert used == [2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**13]


def test_a_gradient_that_is_not_finite_is_refused():
    w = nn.Parameter(torch.zeros(1))

    def backward(x, scale):
        w.grad = torch.tensor([float("nan")])

    with pytest.raises(ModelError, match="not finite"):
        diagonal_fisher([w], [1.0], backward, 4.0)
