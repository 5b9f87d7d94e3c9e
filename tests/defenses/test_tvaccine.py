"""T-Vaccine against a plain loop, its draws against their probabilities, frozen layers, and refused settings."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from transformers import TrainerCallback

import trainers
import two_passes
from holdfast.defenses import tvaccine
from holdfast.defenses.tvaccine import TVaccineConfig, draw_layers
from holdfast.errors import ModelError
from holdfast.training.layers import decoder_layers
from two_passes import parts

RHO = 0.5
SETTING = {"rho": RHO, "num_layers": 2, "probability_steps": 4, "resample_steps": 3, "max_steps": 12}
HARMFUL_ROWS = len(two_passes.HARMFUL)


def make(out, *, net=None, **options):
    return trainers.trainer("tvaccine", out, net=net or two_passes.model(), **{**SETTING, **options})


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The rows of the twelve steps: two epochs, each in its own order."""
    made = trainers.trainer("sft", tmp_path_factory.mktemp("sft"))
    seen, plain = [], made.compute_loss
    made.compute_loss = lambda model, inputs, *a, **k: (
        seen.append(dict(inputs)) or plain(model, inputs, *a, **k)
    )
    made.train()
    return seen


@pytest.fixture(scope="module")
def by_hand(rows):
    return two_passes.train(rows, RHO, gamma=2, weight_decay=0.1)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_tvaccine_is_algorithm_1(tmp_path, accumulation, by_hand):
    """Weights, every p_l and every draw; weight decay reaches no frozen layer."""
    made = make(tmp_path, weight_decay=0.1, **parts(accumulation))
    made.train()
    weights, probes, draws = by_hand
    history = made.layer_history
    assert [step for step, _ in history["probabilities"]] == [0, 4, 8]
    for (_, p), expected in zip(history["probabilities"], probes, strict=True):
        assert p == pytest.approx(expected.tolist(), abs=1e-6)
    assert history["draws"] == [[step, layers] for step, layers in zip((0, 3, 6, 9), draws, strict=True)]
    assert trainers.distance(trainers.weights(made), weights) < 1e-5


def test_the_equation_test_can_fail(rows, by_hand):
    assert len({tuple(d) for d in by_hand[2]}) > 1, "other layers in turns"
    others = [
        two_passes.train(rows, 0.0, gamma=2, weight_decay=0.1),
        two_passes.train(rows, RHO, weight_decay=0.1),
        two_passes.train(rows, RHO, gamma=2, weight_decay=0.1, seed=12),
        two_passes.train(rows, RHO, gamma=2, weight_decay=0.1, freeze="self_attn"),
    ]
    for weights, _, _ in others:
        assert trainers.distance(by_hand[0], weights) > 1e-3


def test_the_authors_variant_freezes_attention_alone(tmp_path, rows):
    made = make(tmp_path, freeze="attention")
    made.train()
    weights, _, draws = two_passes.train(rows, RHO, gamma=2, freeze="self_attn")
    assert made.draws.tolist() == draws
    assert trainers.distance(trainers.weights(made), weights) < 1e-5


class Watch(TrainerCallback):
    """For each step: the weights with a gradient, those that moved, and the optimizer states of those that did not."""

    def __init__(self, made):
        self.made, self.steps = made, []
        self.named = {name: p for name, p in made.model.named_parameters() if p.requires_grad}

    def states(self):
        optimizer = self.made.optimizer.state
        return {
            n: {k: v.clone() for k, v in optimizer[p].items()} if p in optimizer else {}
            for n, p in self.named.items()
        }

    def on_pre_optimizer_step(self, *args, **kwargs):
        self.graded = {name for name, p in self.named.items() if p.grad is not None}
        self.before = {name: p.detach().clone() for name, p in self.named.items()}
        self.kept = self.states()

    def on_step_end(self, *args, **kwargs):
        moved = {name for name, p in self.named.items() if not torch.equal(p, self.before[name])}
        after = self.states()
        stepped = {
            n for n in self.named
            if after[n].keys() != self.kept[n].keys() or any(not torch.equal(v, self.kept[n][k]) for k, v in after[n].items())
        }  # fmt: skip
        self.steps.append((list(self.made.drawn), self.graded, moved, stepped))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_drawn_layers_have_gradients_move_and_change_their_optimizer(tmp_path, accumulation):
    made = make(tmp_path, weight_decay=0.1, **parts(accumulation))
    watch = Watch(made)
    made.add_callback(watch)
    made.train()
    assert len(watch.steps) == 12
    for layers, graded, moved, stepped in watch.steps:
        own = {name for name in watch.named if two_passes.layer_of(name) in layers}
        assert graded == moved == stepped == own
        assert len(own) == 2 * 3 * 2, "two matrices for three targets in two layers"
    assert all(p.requires_grad for p in watch.named.values()), "after the training everything can train again"


def test_what_trains_outside_of_layers_trains_at_every_step(tmp_path):
    net = two_passes.model(modules_to_save=["norm"])
    made = make(tmp_path, net=net)
    watch = Watch(made)
    made.add_callback(watch)
    outside = {name for name in watch.named if ".layers." not in name}
    assert len(outside) == 1
    made.train()
    assert all(outside <= graded & moved for _, graded, moved, _ in watch.steps)


def test_all_layers_are_vaccine(tmp_path):
    """Equal bit for bit, with dropout: the harmful rows have no effect."""
    ends = []
    for name, own in (
        ("tvaccine", {"num_layers": two_passes.LAYERS, "probability_steps": 4}),
        ("vaccine", {}),
    ):
        made = trainers.trainer(
            name, tmp_path, net=two_passes.model(dropout=0.3), rho=RHO, **own, **parts(2), max_steps=6
        )
        made.train()
        ends.append(trainers.weights(made))
    assert trainers.same(*ends)


def test_all_layers_with_rho_0_are_sft(tmp_path):
    ends = []
    for name, own in (("tvaccine", {"num_layers": two_passes.LAYERS, "rho": 0.0}), ("sft", {})):
        made = trainers.trainer(name, tmp_path, net=two_passes.model(dropout=0.3), **own)
        made.train()
        ends.append(trainers.weights(made))
    assert trainers.same(*ends)


P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05])
DRAWS = 4000


def test_single_draws_follow_p():
    counts = torch.zeros(len(P))
    for seed in range(DRAWS):
        counts[draw_layers(P, 1, seed)] += 1
    chi_square = ((counts - DRAWS * P) ** 2 / (DRAWS * P)).sum()
    assert chi_square < 18.5, "exceeded once in 1000, with 4 degrees of freedom"
    uniform = ((counts - DRAWS / 5) ** 2 / (DRAWS / 5)).sum()
    assert uniform > 1000, "control: other probabilities are noticed"


def test_draws_of_several_are_without_replacement():
    """How often each pair is drawn: p_a p_b / (1 - p_a) + p_b p_a / (1 - p_b)."""
    counts = dict.fromkeys(itertools.combinations(range(len(P)), 2), 0)
    for seed in range(DRAWS):
        counts[tuple(draw_layers(P, 2, seed).tolist())] += 1
    expected = {(a, b): float(P[a] * P[b] * (1 / (1 - P[a]) + 1 / (1 - P[b]))) * DRAWS for a, b in counts}
    assert sum(expected.values()) == pytest.approx(DRAWS)
    assert sum((counts[k] - e) ** 2 / e for k, e in expected.items()) < 27.9, (
        "1 in 1000, 9 degrees of freedom"
    )


def test_more_layers_than_have_a_gradient_cannot_be_drawn():
    p = torch.tensor([0.0, 0.5, 0.0, 0.5])
    assert draw_layers(p, 2, 1).tolist() == [1, 3]
    with pytest.raises(ModelError, match=r"num_layers=3 layers.*only 2 of 4 layers"):
        draw_layers(p, 3, 1)


def test_a_draw_is_a_function_of_its_seed():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(draw_layers(P, 3, 7), draw_layers(P, 3, 7))
    assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(draw_layers(P, 3, seed).tolist()) for seed in range(20)}) > 1


@pytest.mark.parametrize(
    "options", [parts(4), {"per_device_train_batch_size": 5}, {"max_steps": 3}, {"bf16": True}]
)
def test_p_does_not_depend_on_the_batch_size(tmp_path, options, by_hand):
    made = make(tmp_path, net=two_passes.model(dropout=0.3), **{"max_steps": 1, **options})
    made.train()
    tolerance = 0.01 if "bf16" in options else 1e-6
    assert made.layer_history["probabilities"][0][1] == pytest.approx(by_hand[1][0].tolist(), abs=tolerance)


def test_the_probe_takes_so_many_rows_and_others_each_time(tmp_path):
    made = make(tmp_path, probe_rows=7)
    seen, collate = [], made.data_collator
    plain = made.harmful_norms

    def watch(number, scale):
        made.data_collator = lambda rows: seen.append([tuple(r["input_ids"]) for r in rows]) or collate(rows)
        try:
            return plain(number, scale)
        finally:
            made.data_collator = collate

    made.harmful_norms = watch
    made.train()
    assert [len(part) for part in seen] == [4, 3] * 3
    rows = [row for part in seen for row in part]
    assert len(set(rows[:14])) == 14, "no row twice before all were seen"
    assert len(set(rows)) == HARMFUL_ROWS


def test_a_scale_that_overflows_is_lowered(tmp_path):
    """As in fp16, where the scale begins at 65536."""
    made = make(tmp_path)
    tried, plain = [], made.harmful_norms

    def overflows(number, scale):
        tried.append(scale)
        return plain(number, scale) * (torch.inf if scale > 1000 else 1)

    made.harmful_norms = overflows
    made.attention = tvaccine.mixers(made.model)
    made.accelerator.scaler = type("Scaler", (), {"get_scale": lambda self: 65536.0})()
    p = made.probe(0)
    made.accelerator.scaler = None
    assert tried == [65536.0, 4096.0, 256.0]
    torch.testing.assert_close(p, made.probe(0))
    made.harmful_norms = lambda number, scale: torch.full((4,), torch.nan)
    with pytest.raises(ModelError, match="0, or not finite"):
        made.probe(0)


def test_the_history_survives_a_resume(tmp_path):
    """Cut at step 5, between the draws of steps 3 and 6; it can be written as JSON."""
    setting = {"save_strategy": "steps", "save_steps": 5}
    whole = make(tmp_path, net=two_passes.model(dropout=0.2), **setting)
    whole.train()
    resumed = make(tmp_path, net=two_passes.model(dropout=0.2), **setting)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert trainers.same(trainers.weights(whole), trainers.weights(resumed))
    assert resumed.layer_history == whole.layer_history == json.loads(json.dumps(whole.layer_history))
    assert (len(whole.layer_history["probabilities"]), len(whole.layer_history["draws"])) == (3, 4)


def test_a_second_training_draws_anew(tmp_path):
    made = make(tmp_path, max_steps=4)
    made.train()
    first = made.layer_history
    made.train()
    assert made.layer_history["draws"][0] == first["draws"][0]
    assert made.layer_history["probabilities"][0] != first["probabilities"][0], (
        "of the weights as they are now"
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_backward_ends_at_the_lowest_drawn_layer(tmp_path, monkeypatch, checkpointing):
    """Layers below it are computed once per pass; with checkpointing, those above it once more."""
    monkeypatch.setattr(tvaccine, "draw_layers", lambda p, number, seed: torch.tensor([2, 3]))
    made = make(
        tmp_path, max_steps=2, gradient_checkpointing=checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    calls = []
    for i, layer in enumerate(decoder_layers(made.model)):
        layer.mlp.register_forward_pre_hook(lambda *_, i=i: calls.append(i))

    class Second(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            calls.clear()

    made.add_callback(Second())
    made.train()
    above = 4 if checkpointing else 2
    assert [calls.count(i) for i in range(4)] == [2, 2, above, above]


def test_nf4_with_checkpointing(tmp_path):
    """On a 4-bit base, the weights equal those without checkpointing bit for bit."""
    pytest.importorskip("bitsandbytes")
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    import tiny

    tiny.llama(len(trainers.TOKENIZER), layers=4).save_pretrained(tmp_path / "model")
    ends = []
    for checkpointing in (False, True):
        quantised = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
        )
        net = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=quantised)
        net = prepare_model_for_kbit_training(net, use_gradient_checkpointing=checkpointing)
        torch.manual_seed(3)
        net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
        made = make(tmp_path, net=net, max_steps=4, gradient_checkpointing=checkpointing)
        start = trainers.weights(made)
        made.train()
        ends.append(trainers.weights(made))
        assert trainers.distance(start, ends[-1]) > 1e-3
    assert trainers.same(*ends)


def test_a_model_with_too_few_layers_is_refused(tmp_path):
    with pytest.raises(ModelError, match="num_layers is 5, but the model has 4 decoder layers"):
        make(tmp_path, num_layers=5)


def test_layers_in_which_nothing_trains_are_refused(tmp_path):
    with pytest.raises(ModelError, match="nothing trains in the decoder layer of layers 0, 3"):
        make(tmp_path, net=two_passes.model(layers_to_transform=[1, 2]))
    with pytest.raises(ModelError, match="nothing trains in the attention of layers 0, 1, 2, 3"):
        make(tmp_path, net=two_passes.model(target_modules=["up_proj"]), freeze="attention")
    make(tmp_path, net=two_passes.model(target_modules=["up_proj"]), max_steps=2).train()


@pytest.mark.parametrize(
    "wrong",
    [
        {"rho": -1.0}, {"num_layers": 0}, {"probability_steps": 0}, {"resample_steps": 0}, {"probe_rows": 0},
        {"freeze": "some"}, {"ddp_find_unused_parameters": False}, {"auto_find_batch_size": True},
    ],
)  # fmt: skip
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TVaccineConfig(output_dir=str(tmp_path), use_cpu=True, **wrong)


def test_ddp_is_told_that_parameters_may_be_unused(tmp_path):
    assert TVaccineConfig(output_dir=str(tmp_path), use_cpu=True).ddp_find_unused_parameters is True
