"""Booster against a plain loop on copied models, its reductions to SFT, and weights that come back exactly."""

from __future__ import annotations

import copy

import pytest
import torch

import plain
import trainers
from holdfast.defenses.booster import BoosterConfig, BoosterTrainer, attenuation
from holdfast.errors import DataError, InputError
from holdfast.training.passes import displaced, gradients_aside, refuse_deepspeed
from holdfast.training.tokenising import prepare_rows

HARMFUL = prepare_rows(trainers.HARMFUL, trainers.TOKENIZER, 2048)
LAMBDA, ALPHA = 20.0, 0.5
"""Strong enough to differ clearly from SFT within 12 steps."""


def made(out, **options):
    """Twelve steps of four rows are one epoch."""
    return trainers.trainer(
        "booster", out, rows=trainers.USER * 2, **{"lambda_": LAMBDA, "alpha": ALPHA, **options}
    )


def end(out, name="booster", **options):
    """Weights after a training with dropout, whose random numbers start with the trainer."""
    trainer = trainers.trainer(name, out, net=trainers.model(dropout=0.3), **options)
    trainer.train()
    return trainers.weights(trainer)


def gradient(net, batches):
    """The loss over some batches, and its gradient for every trainable weight."""
    loss = plain.cross_entropy(net, batches)
    return loss.item(), torch.autograd.grad(loss, [p for p in net.parameters() if p.requires_grad])


def loop(trainer, lambda_, alpha, stale=None):
    """Algorithm 1 as written, with a copy as the perturbed model; returns the weights, and h, h' of each step.

    The batches are those of `trainer`. `stale` selects a possible error of an implementation: always the first
    harmful "batch", or the harmful gradients at the first "weights".
    """
    accumulation = trainer.args.gradient_accumulation_steps
    alignment = list(trainer.get_train_dataloader())
    size = 4
    net = trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    kept, record = None, []
    for step in range(12):
        rows = trainer.harmful_indices(0 if stale == "batch" else step, size, "booster")
        harmful = [plain.COLLATE([HARMFUL[i] for i in rows])]
        if kept is None or stale != "weights":
            h, g = gradient(net, harmful)
            norm = sum((x**2).sum() for x in g).sqrt()
            there = copy.deepcopy(net)
            moved = [p for p in there.parameters() if p.requires_grad]
            for p, w, x in zip(moved, weights, g, strict=True):
                p.data = w.detach() - alpha * x / norm
            h_there, g_there = gradient(there, harmful)
            kept = h, g, h_there, g_there
        h, g, h_there, g_there = kept
        window = alignment[step * accumulation : (step + 1) * accumulation]
        f, own = gradient(net, window)
        for w, a, b, c in zip(weights, own, g, g_there, strict=True):
            w.grad = a + lambda_ * (b - c)
        record.append((f, h, h - h_there, torch.nn.utils.clip_grad_norm_(weights, 1.0).item()))
        optimizer.step()
        schedule.step()
    return [w.detach() for w in weights], record


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_booster_is_algorithm_1(tmp_path, accumulation):
    trainer = made(
        tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    expected, record = loop(trainer, LAMBDA, ALPHA)
    assert trainers.distance(trainers.weights(trainer), expected) < 1e-5
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (f, h, reduction, norm) in zip(logged, record, strict=True):
        assert entry["loss"] == pytest.approx(f, abs=1e-4)
        assert entry["harmful_loss"] == pytest.approx(h, abs=1e-4)
        assert entry["harmful_loss_reduction"] == pytest.approx(reduction, abs=1e-4)
        assert entry["penalty"] == pytest.approx(LAMBDA * reduction, abs=1e-3)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """A trainer, which gives the batches, and the weights of Algorithm 1 on them."""
    trainer = made(tmp_path_factory.mktemp("right"))
    return trainer, loop(trainer, LAMBDA, ALPHA)[0]


@pytest.mark.parametrize(
    "wrong",
    [
        (LAMBDA, ALPHA, "batch"), (LAMBDA, ALPHA, "weights"), (LAMBDA / 2, ALPHA), (LAMBDA, ALPHA / 2),
        (-LAMBDA, ALPHA), (0, ALPHA),
    ],
    ids=["stale batch", "stale weights", "lambda/2", "alpha/2", "sign", "sft"],
)  # fmt: skip
def test_control_what_is_wrong_is_noticed(right, wrong):
    trainer, weights = right
    assert trainers.distance(weights, loop(trainer, *wrong)[0]) > 1e-4


def test_the_attenuation_of_a_worked_example():
    """h = 1/2 (w0^2 + 4 w1^2) at w = (3, 1): the gradient (3, 4) has norm 5, and w' = w - (0.6, 0.8)."""
    w = torch.tensor([3.0, 1.0], dtype=torch.float64)

    def harmful():
        return (w[0] ** 2 + 4 * w[1] ** 2) / 2, [torch.stack([w[0], 4 * w[1]])]

    (found,), here, there = attenuation([w], harmful, 1.0)
    assert found.tolist() == pytest.approx([3 - 2.4, 4 - 0.8])
    assert float(here) == 6.5
    assert float(there) == pytest.approx((2.4**2 + 4 * 0.2**2) / 2)
    assert w.tolist() == [3.0, 1.0]


def test_a_gradient_of_zeros_moves_nothing():
    w = torch.ones(2)
    (found,), _, _ = attenuation([w], lambda: (w.sum(), [torch.zeros(2)]), 1.0)
    assert found.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_also_after_an_exception(dtype):
    torch.manual_seed(0)
    weights = [torch.randn(50, 3, dtype=dtype, requires_grad=True) for _ in range(2)]
    before = [w.detach().clone() for w in weights]
    direction = [torch.randn_like(w) for w in weights]

    def inside():
        with displaced(weights, direction, -0.1):
            assert not trainers.same(weights, before)
            raise RuntimeError("made up")

    with pytest.raises(RuntimeError, match="made up"):
        inside()
    assert trainers.same(weights, before)
    added_back = [(b - 0.1 * d) + 0.1 * d for b, d in zip(before, direction, strict=True)]
    assert not trainers.same(added_back, before), "adding the step back would not restore the weights"


def test_gradients_come_back_also_after_an_exception():
    weights = [torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)]
    weights[0].grad = mine = torch.ones(2)

    def inside():
        with gradients_aside(weights):
            assert weights[0].grad is None
            sum(weights).sum().backward()
            raise RuntimeError("made up")

    with pytest.raises(RuntimeError, match="made up"):
        inside()
    assert weights[0].grad is mine
    assert weights[1].grad is None


def test_weights_survive_a_failing_second_pass(tmp_path):
    """In the trainer, the loss of the perturbed model raises an error."""
    trainer = made(tmp_path, max_steps=1)
    before = trainers.weights(trainer)

    def fails(*_):
        if not trainers.same(trainers.weights(trainer), before):
            raise RuntimeError("made up")

    trainer.model.register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="made up"):
        trainer.train()
    assert trainer.state.global_step == 0
    assert trainers.same(trainers.weights(trainer), before)


def test_booster_with_lambda_0_or_alpha_0_is_sft(tmp_path):
    """Bit for bit, with dropout: the harmful passes draw nothing. With lambda 0 there are none."""
    sft, passes = trainers.ended("sft", tmp_path)
    assert trainers.same(end(tmp_path, lambda_=LAMBDA, alpha=0.0), sft)
    found, same_passes = trainers.ended("booster", tmp_path, lambda_=0.0)
    assert trainers.same(found, sft)
    assert same_passes == passes


def test_the_harmful_rows_are_fresh_at_every_step(tmp_path):
    """18 rows, 4 per step: four steps repeat no row; the next steps use another order."""
    trainer = made(tmp_path)
    seen = [trainer.harmful_indices(step, 4, "booster") for step in range(9)]
    assert len({i for rows in seen[:4] for i in rows}) == 16
    assert sorted(i for rows in seen for i in rows) == sorted([*range(18)] * 2)


@pytest.mark.parametrize("wrong", [{"lambda_": -1.0}, {"alpha": -0.1}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BoosterConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_harmful_rows_are_needed(tmp_path):
    with pytest.raises(DataError, match="harmful_dataset"):
        BoosterTrainer(
            model=trainers.model(), args=BoosterConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=trainers.USER, processing_class=trainers.TOKENIZER,
        )  # fmt: skip


def test_deepspeed_is_refused(tmp_path, monkeypatch):
    """DeepSpeed's optimizer steps inside backward."""
    from accelerate.utils import DistributedType

    trainer = made(tmp_path)
    trainer.accelerator.state.distributed_type, kept = (
        DistributedType.DEEPSPEED, trainer.accelerator.state.distributed_type,
    )  # fmt: skip
    try:
        with pytest.raises(InputError, match="BoosterTrainer cannot run under DeepSpeed"):
            refuse_deepspeed(trainer)
    finally:
        trainer.accelerator.state.distributed_type = kept
