"""RepNoise: each term by hand, the whole against a plain loop, every layer on thirteen architectures."""

from __future__ import annotations

import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import architectures
import plain
import tiny
import trainers
from holdfast.defenses.repnoise import (
    Answers,
    RepNoiseConfig,
    RepNoiseTrainer,
    ascent,
    every_layer_read,
    feed_forwards,
    mmd,
    outputs_kept,
)
from holdfast.errors import DataError, InputError, ModelError
from holdfast.machine.seeds import derive_seed
from holdfast.training.layers import decoder_layers, mixers
from holdfast.training.tokenising import prepare_rows

HARMFUL = prepare_rows(trainers.HARMFUL, trainers.TOKENIZER, 2048)
ALPHA, BETA = 3.0, 20.0
"""Strong enough to differ clearly from SFT within 12 steps."""
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def made(out, **options):
    """Twelve steps of four rows are one epoch."""
    return trainers.trainer(
        "repnoise", out, rows=trainers.USER * 2, **{"alpha": ALPHA, "beta": BETA, **options}
    )


def end(out, name="repnoise", **options):
    """Weights after a training with dropout, whose random numbers start with the trainer."""
    trainer = trainers.trainer(name, out, net=trainers.model(dropout=0.3), **options)
    trainer.train()
    return trainers.weights(trainer)


def kernel(u, v, mean):
    """Five Gaussians whose widths are 1/4 to 4 times the mean squared distance."""
    squared = sum((a - b) ** 2 for a, b in zip(u, v, strict=True))
    return sum(math.exp(-squared / (mean * 2**i / 4)) for i in range(5))


def test_mmd_of_two_tiny_sets_by_a_double_loop():
    x = [[0.0, 1.0, 2.0], [1.0, -1.0, 0.5]]
    y = [[2.0, 2.0, 0.0], [0.0, 0.0, 0.0]]
    pairs = [(u, v) for i, u in enumerate(x + y) for j, v in enumerate(x + y) if i != j]
    mean = sum(sum((a - b) ** 2 for a, b in zip(u, v, strict=True)) for u, v in pairs) / 12
    expected = 0.0
    for i in range(2):
        for j in range(2):
            expected += kernel(x[i], x[j], mean) + kernel(y[i], y[j], mean)
            expected -= kernel(x[i], y[j], mean) + kernel(y[i], x[j], mean)
    found = mmd(torch.tensor(x), torch.tensor(y))
    assert float(found) == pytest.approx(expected / 4, abs=1e-6)


def test_mmd_of_two_points():
    """For the points 0 and 2, their distance is the mean distance, so the kernels between them are exp(-1/b)."""
    expected = 2 * sum(1 - math.exp(-1 / b) for b in (0.25, 0.5, 1, 2, 4))
    assert float(mmd(torch.zeros(1, 1), torch.full((1, 1), 2.0))) == pytest.approx(expected)


def test_mmd_takes_its_widths_as_constants():
    """With the widths in the graph, two points would have no gradient: their kernels would be constant."""
    x = torch.zeros(1, 1, requires_grad=True)
    mmd(x, torch.full((1, 1), 2.0)).backward()
    slope = sum(-2 * math.exp(-1 / b) * 2 * 2 / (4 * b) for b in (0.25, 0.5, 1, 2, 4))
    assert x.grad.item() == pytest.approx(slope)
    assert slope < 0, "descent moves the point towards the noise"


def test_mmd_of_a_set_with_itself_is_0():
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert float(mmd(x, x)) == pytest.approx(0, abs=1e-6)


def test_the_ascent_is_the_logarithm_of_one_plus_the_mean():
    losses = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    ascent(losses).backward()
    assert float(ascent(losses.detach())) == pytest.approx(math.log(4))
    assert losses.grad.tolist() == pytest.approx([1 / 4 / 3] * 3)


def batch_of(rows):
    return plain.COLLATE([HARMFUL[i] for i in rows])


def test_every_layer_is_read_as_by_hand():
    """log-softmax of head(norm(h_l)) at each answer token's predecessor, for each layer."""
    net, batch = trainers.model(), batch_of(range(3))
    inner = net.get_base_model()
    with torch.no_grad(), outputs_kept(decoder_layers(net)) as hidden:
        net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    by_hand = []
    for i in range(2):
        logp = torch.log_softmax(inner.lm_head(inner.model.norm(hidden[i])), dim=-1)
        for row in range(3):
            for token in range(1, batch["labels"].shape[1]):
                label = int(batch["labels"][row, token])
                if label != -100:
                    by_hand.append(-float(logp[row, token - 1, label]))
    with every_layer_read(decoder_layers(net)):
        found = net(**{**batch, "labels": batch["labels"].repeat(2, 1)}).loss
    assert float(found) == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-5)


def skipping(layers, last):
    """Hooks that make every layer after `last` return its input."""

    def back(_, args, kwargs, output):
        given = args[0] if args else kwargs["hidden_states"]
        return (given, *output[1:]) if isinstance(output, tuple) else given

    return [layer.register_forward_hook(back, with_kwargs=True) for layer in layers[last + 1 :]]


@pytest.mark.parametrize("kind", architectures.MODELS)
def test_every_layer_is_read_as_each_architecture_reads_its_last(kind):
    """CE_l is the loss of the model without the layers after l: its own norm, head, soft cap, scale."""
    net = architectures.build(kind, num_hidden_layers=3).eval()
    batch = batch_of(range(3))
    layers = decoder_layers(net)
    losses = []
    for last in range(3):
        handles = skipping(layers, last)
        losses.append(float(net(**batch).loss))
        for handle in handles:
            handle.remove()
    assert len(set(losses)) == 3
    with every_layer_read(layers):
        found = net(**{**batch, "labels": batch["labels"].repeat(3, 1)}).loss
    assert float(found) == pytest.approx(sum(losses) / 3, abs=1e-5)
    assert float(net(**batch).loss) == pytest.approx(losses[-1], abs=1e-6), "the hooks are gone"


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("kind", architectures.MODELS)
def test_one_feed_forward_block_for_each_layer(kind, wrapped):
    """The block's output has the width of the residual stream, and the block is not the attention."""
    net = architectures.build(kind)
    if wrapped:
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    found = feed_forwards(net)
    assert len({id(block) for block in found}) == 2
    assert not {id(block) for block in found} & {id(mixer) for mixer in mixers(net)}
    batch = batch_of(range(3))
    with torch.no_grad(), outputs_kept(found) as kept:
        net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert [kept[i].numel() for i in range(2)] == [batch["input_ids"].numel() * 16] * 2


def test_what_the_feed_forward_block_adds_is_the_last_summand():
    """Llama: without its mlp, the output of a layer lacks exactly that summand."""
    net, batch = trainers.model(), batch_of(range(2))
    layers, blocks = decoder_layers(net), feed_forwards(net)
    with torch.no_grad(), outputs_kept([layers[0], blocks[0]]) as kept:
        net(input_ids=batch["input_ids"])
    without = blocks[0].register_forward_hook(lambda _, __, output: torch.zeros_like(output))
    with torch.no_grad(), outputs_kept([layers[0]]) as short:
        net(input_ids=batch["input_ids"])
    without.remove()
    assert torch.allclose(kept[0], short[0] + kept[1], atol=1e-6)


def test_a_layer_without_a_matrix_is_refused():
    net = tiny.llama(50)
    for layer in net.model.layers:
        del layer.self_attn, layer.mlp
    with pytest.raises(ModelError, match="No feed-forward block was found in LlamaDecoderLayer"):
        feed_forwards(net)


def test_answers_are_placed_where_they_stand_whatever_the_padding():
    """Two rows of 4 and 3 tokens whose last two and last one are the answer, padded right, then left."""
    ignored = -100
    right = {
        "labels": torch.tensor([[ignored, ignored, 7, 8], [ignored, ignored, 9, ignored]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    left = {
        "labels": torch.tensor([[ignored, ignored, 7, 8], [ignored, ignored, ignored, 9]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    for batch in (right, left):
        answers = Answers([batch, right])
        hidden = torch.where(batch["labels"] == ignored, 0, batch["labels"]).float()[..., None]
        compact = torch.cat([answers.of(hidden, 0), torch.tensor([[1.0], [2.0], [3.0]])])
        assert compact[:, 0].tolist() == [7, 8, 9, 1, 2, 3]
        assert answers.counts == [3, 3]
        assert answers.placed(compact)[..., 0].tolist() == [
            [0, 0, 7, 8], [0, 0, 9, 0], [0, 0, 1, 2], [0, 0, 3, 0],
        ]  # fmt: skip


def harmful_terms(net, batch, step, layers=range(2)):
    """MMD^2 and CE_l of a whole batch in one graph; noise by the seeds of its rows; the means over layers."""
    mask = batch["labels"] != -100
    kept = {}
    handles = [
        module.register_forward_hook(lambda _, __, out, key=(kind, i): kept.setdefault(key, out))
        for i, layer in enumerate(net.get_base_model().model.layers)
        for kind, module in (("layer", layer), ("mlp", layer.mlp))
    ]
    net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for handle in handles:
        handle.remove()
    generators = [
        torch.Generator().manual_seed(derive_seed(plain.SEED, "repnoise", step, row))
        for row in range(len(mask))
    ]
    noises, losses = [], []
    for i in layers:
        z = kept["mlp", i] * mask[..., None]
        noise = torch.zeros_like(z)
        for row, generator in enumerate(generators):
            noise[row, mask[row]] = torch.randn(int(mask[row].sum()), z.shape[-1], generator=generator)
        points = [*z.flatten(1), *noise.flatten(1)]
        n = len(z)
        distances = torch.stack([torch.stack([((u - v) ** 2).sum() for u in points]) for v in points])
        mean = distances.detach().sum() / (2 * n * (2 * n - 1))
        k = sum((-distances / (mean * b)).exp() for b in (0.25, 0.5, 1, 2, 4))
        noises.append((k[:n, :n] + k[n:, n:] - k[:n, n:] - k[n:, :n]).mean())
        inner = net.get_base_model()
        logits = inner.lm_head(inner.model.norm(kept["layer", i]))[:, :-1]
        losses.append(nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()))
    return sum(noises) / len(layers), torch.log(1 + sum(losses) / len(layers))


def loop(trainer, alpha, beta, first_noise=False, layers=range(2)):
    """The equation as written, with one graph for a whole step; `first_noise` keeps the first noise."""
    accumulation = trainer.args.gradient_accumulation_steps
    batches = list(trainer.get_train_dataloader())
    net = trainers.model()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)
    record = []
    for step in range(12):
        stability = plain.cross_entropy(net, batches[step * accumulation : (step + 1) * accumulation])
        rows = trainer.harmful_indices(step, 4, "repnoise")
        noise, up = harmful_terms(net, batch_of(rows), 0 if first_noise else step, layers)
        optimizer.zero_grad()
        (stability + beta * noise - alpha * up).backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        record.append((stability.item(), noise.item(), up.item(), norm.item()))
    return [w.detach() for w in weights], record


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_repnoise_is_its_equation(tmp_path, accumulation):
    trainer = made(
        tmp_path, per_device_train_batch_size=4 // accumulation, gradient_accumulation_steps=accumulation
    )
    trainer.train()
    expected, record = loop(trainer, ALPHA, BETA)
    assert trainers.distance(trainers.weights(trainer), expected) < 1e-5
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry, (stability, noise, up, norm) in zip(logged, record, strict=True):
        assert entry["loss"] == pytest.approx(stability, abs=1e-4)
        assert entry["noise_loss"] == pytest.approx(noise, rel=1e-3)
        assert entry["ascent_loss"] == pytest.approx(up, abs=1e-4)
        assert entry["grad_norm"] == pytest.approx(norm, rel=1e-3)


@pytest.mark.parametrize(
    "wrong",
    [(ALPHA, 0), (0, BETA), (ALPHA / 2, BETA), (-ALPHA, BETA), (ALPHA, -BETA), (ALPHA, BETA, True)],
    ids=["no noise", "no ascent", "alpha/2", "descent", "away from noise", "old noise"],
)
def test_control_what_is_wrong_is_noticed(tmp_path, wrong):
    trainer = made(tmp_path)
    right, _ = loop(trainer, ALPHA, BETA)
    assert trainers.distance(right, loop(trainer, *wrong)[0]) > 1e-4


def test_the_ascent_of_a_lower_layer_acts_under_peft(tmp_path):
    """With only the last layer's loss, the weights differ, even in the lowest layer."""
    both = made(tmp_path, beta=0.0)
    both.train()

    last, _ = loop(made(tmp_path, beta=0.0), ALPHA, 0.0, layers=[1])
    trained = [(name, p.detach()) for name, p in both.model.named_parameters() if p.requires_grad]
    lowest = [
        float((p - other).abs().max())
        for (name, p), other in zip(trained, last, strict=True)
        if ".layers.0." in name
    ]
    assert len(lowest) == 4
    assert min(lowest) > 1e-4


def test_repnoise_without_both_terms_is_sft(tmp_path):
    """Equal bit for bit, with dropout, and without further passes."""
    found, passes = trainers.ended("repnoise", tmp_path, alpha=0.0, beta=0.0)
    sft, plain_passes = trainers.ended("sft", tmp_path)
    assert trainers.same(found, sft)
    assert passes == plain_passes


def test_the_passes_draw_no_global_random_number(tmp_path):
    """With terms of almost no weight, training with dropout equals SFT up to rounding."""
    assert trainers.distance(end(tmp_path, alpha=1e-30, beta=0.0), end(tmp_path, "sft")) < 1e-7


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"beta": -0.1}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RepNoiseConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_harmful_rows_are_needed(tmp_path):
    with pytest.raises(DataError, match="harmful_dataset"):
        RepNoiseTrainer(
            model=trainers.model(), args=RepNoiseConfig(output_dir=str(tmp_path), use_cpu=True),
            train_dataset=trainers.USER, processing_class=trainers.TOKENIZER,
        )  # fmt: skip


def test_reentrant_checkpointing_is_refused(tmp_path):
    trainer = made(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
    )
    with pytest.raises(InputError, match="use_reentrant"):
        trainer.train()
