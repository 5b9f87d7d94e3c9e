"""AsFT against dense arithmetic and autograd, its reductions, its directions, and recipes."""

from __future__ import annotations

import pytest
import torch

import tiny
import trainers
from holdfast import pipeline
from holdfast.defenses.asft import Direction, OutsideDirection
from holdfast.defenses.safe_lora_parts.directions import Found, read_directions
from holdfast.errors import DataError, ModelError, RecipeError
from holdfast.recipe import Recipe
from holdfast.training.proximal import Factors
from pairs import SEVEN, gpt2, save_adapter, save_pair, weights_of
from repairs import updates
from runs import run


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dense(v, b, a, b0, a0, scaling):
    """||s (I - C)(B A - B0 A0)||_F^2 with C as a matrix of size out x out."""
    c = v @ v.T / v.norm()
    return (scaling * (torch.eye(len(v)) - c) @ (b @ a - b0 @ a0)).square().sum()


@pytest.mark.parametrize("low_rank", [False, True], ids=["two models", "an adapter"])
@pytest.mark.parametrize("start", [0.0, 1.0], ids=["new", "continued"])
def test_value_and_gradient_by_dense_arithmetic(low_rank, start):
    """The gradients are those of autograd; a weight without a direction has none."""
    left, right = random(8, 3, seed=1), random(3, 6, seed=2)
    v = left @ right
    found = Found("m", left.numpy(), right.numpy(), "F32") if low_rank else Found("m", v.numpy(), None, "F32")
    b, a = random(8, 2, seed=3).requires_grad_(), random(2, 6, seed=4).requires_grad_()
    anchor = [start * random(8, 2, seed=5), random(2, 6, seed=6), torch.ones(4)]
    expected = dense(v, b, a, *anchor[:2], 1.5)
    term = OutsideDirection([(Factors(0, 1, 1.5), Direction.of(found, "cpu"), 1.5)])
    weights = [b, a, torch.zeros(4)]
    torch.testing.assert_close(2 * term.value(weights, anchor), expected.detach())
    gradients = torch.autograd.grad(expected, [b, a])
    for mine, theirs in zip(term.gradient(weights, anchor), [*gradients, torch.zeros(4)], strict=True):
        torch.testing.assert_close(2 * mine, theirs, rtol=1e-4, atol=1e-4)


def test_an_update_in_the_direction_costs_less():
    """With V of rank 1 and norm 1, C is the projector, and an update along it costs nothing."""
    u = torch.nn.functional.normalize(random(8, 1), dim=0)
    across = torch.linalg.qr(torch.cat([u, random(8, 1, seed=1)], dim=1))[0][:, 1:]
    direction = Direction.of(Found("m", u.numpy(), torch.eye(1, 6).numpy(), "F32"), "cpu")
    term = OutsideDirection([(Factors(0, 1, 1.0), direction, 1.0)])
    a, start = random(1, 6, seed=2), [torch.zeros(8, 1), torch.zeros(1, 6)]
    assert float(term.value([u, a], start)) < 1e-10
    assert float(2 * term.value([across, a], start)) == pytest.approx(float(a.square().sum()), rel=1e-5)


@pytest.mark.parametrize("make", [None, gpt2], ids=["llama", "gpt2"])
def test_directions_of_two_models(tmp_path, make):
    """V of bf16 and of transposed weights; a module that is the same in both has none."""
    made = {} if make is None else {"make": make}
    base, aligned = save_pair(tmp_path, **made, dtypes=(torch.bfloat16, torch.bfloat16), shard="60KB")
    kind = "self_attn.q_proj" if make is None else "attn.c_attn"
    prefix = "model.layers" if make is None else "transformer.h"
    names = [f"{prefix}.{i}.{kind}" for i in range(2)]
    before, after = weights_of(base), weights_of(aligned)
    for found in read_directions(dict.fromkeys(names, make is not None), base, aligned):
        v = after[f"{found.name}.weight"].float() - before[f"{found.name}.weight"].float()
        assert torch.equal(torch.from_numpy(found.left), v.T if make else v)
        assert Direction.of(found, "cpu").left.dtype == torch.bfloat16
    with pytest.raises(ModelError, match="changes none of the modules"):
        list(read_directions(dict.fromkeys(names, False), base, base))
    with pytest.raises(ModelError, match="also needs the model before alignment"):
        list(read_directions(dict.fromkeys(names, False), None, aligned))


def test_without_lambda_it_is_sft(tmp_path):
    ours, _ = trainers.ended("asft", tmp_path, lambda_=0.0)
    sft, _ = trainers.ended("sft", tmp_path)
    assert trainers.same(ours, sft)


def test_the_whole_training_by_hand(tmp_path):
    """Both scalings, against a loss with the dense penalty; accumulation is in the contract suite."""
    ends = {}
    for scaling, factor in (("paper", 2.0), ("code", 1.0)):  # alpha / r is 4 / 2
        made = trainers.trainer("asft", tmp_path, lambda_=3.0, scaling=scaling, max_steps=4)
        made.train()
        vs = updates(trainers.alignment_adapter(), lambda: trainers.tiny.llama(len(trainers.TOKENIZER)))
        by_hand = trainers.trainer("sft", tmp_path, max_steps=4)
        starts = {n: p.detach().clone() for n, p in by_hand.model.named_parameters()}
        plain = by_hand.compute_loss

        def penalised(model, inputs, *args, vs=vs, plain=plain, starts=starts, factor=factor, **kwargs):
            loss, now = plain(model, inputs, *args, **kwargs), dict(model.named_parameters())
            for name, v in vs.items():
                b, a = (f"base_model.model.{name}.lora_{x}.default.weight" for x in "BA")
                loss = loss + 3.0 * dense(v.float(), now[b], now[a], starts[b], starts[a], factor)
            return loss

        by_hand.compute_loss = penalised
        by_hand.train()
        assert trainers.distance(trainers.weights(made), trainers.weights(by_hand)) < 1e-5
        assert made.reported(4) == {"directions": 4}
        ends[scaling] = trainers.weights(made)
    assert trainers.distance(ends["paper"], ends["code"]) > 1e-4


def test_a_resume_with_another_direction_is_refused(tmp_path):
    saves = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainers.trainer("asft", tmp_path, **saves).train()
    again = trainers.trainer("asft", tmp_path, **saves)
    again.aligned = save_adapter(
        tmp_path / "other", lambda: trainers.tiny.llama(len(trainers.TOKENIZER)), r=2, target_modules=SEVEN
    )
    with pytest.raises(ModelError, match="direction"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_cannot_be_penalised_is_refused(tmp_path):
    other = save_adapter(
        tmp_path / "other", lambda: tiny.llama(len(trainers.TOKENIZER)), r=2, target_modules=["down_proj"]
    )
    made = trainers.trainer("asft", tmp_path)
    made.aligned = other
    with pytest.raises(ModelError, match="changes none of the modules"):
        made.train()
    with pytest.raises(ModelError, match="AsFT needs the change B A"):
        trainers.trainer("asft", tmp_path, net=tiny.llama(len(trainers.TOKENIZER)))
    defense = type(made)
    with pytest.raises(DataError, match="needs aligned"):
        defense(model=trainers.model(), args=made.args, train_dataset=trainers.USER,
                processing_class=trainers.TOKENIZER)  # fmt: skip
    for wrong in ({"lambda_": -1.0}, {"scaling": "both"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            trainers.trainer("asft", tmp_path, **wrong)


def asft(folder, **changes):
    recipe = tiny.recipe(folder)
    training = {**recipe["user"]["training"], "learning_rate": 0.01}
    return {**recipe, "user": {"defense": "asft", "training": training}, **changes}


def test_a_recipe(tmp_path):
    """The direction is the alignment adapter's; a large lambda keeps the update in it."""
    ends = {}
    for lambda_ in (0.0, 1e3):
        recipe = asft(tmp_path)
        recipe["user"]["lambda_"] = lambda_
        results, _ = run(recipe, tmp_path / "out")
        steps = results["rows"][-1]["steps"]
        vs, dws = (
            updates(tmp_path / "out/steps" / steps[kind] / "adapter", lambda: load(tmp_path / "model"))
            for kind in ("alignment", "user")
        )
        ends[lambda_] = sum(
            float(((torch.eye(len(v)) - v @ v.T / v.norm()) @ dws[name]).square().sum())
            for name, v in vs.items()
            if name in dws
        )
    assert ends[1e3] < 0.5 * ends[0.0]


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_an_aligned_model_needs_its_base(tmp_path):
    """`user.base` names it, as `post_hoc.base` does; a step is named by its content."""
    recipe = asft(tmp_path, alignment="none")
    with pytest.raises(RecipeError, match=r"asft needs the model before alignment.*user\.base"):
        Recipe.load(recipe)
    tiny.save_model(tmp_path / "before", seed=5)
    recipe["user"]["base"] = str(tmp_path / "before")
    results, _ = run(recipe, tmp_path / "out")
    assert results["rows"][-1]["user"] == "asft"
    tiny.save_model(tmp_path / "copy", seed=5)
    steps = [
        next(
            step.id
            for step in pipeline.plan(Recipe.load(recipe, [f"user.base={path}"]))
            if step.kind == "user"
        )
        for path in (tmp_path / "before", tmp_path / "copy")
    ]
    assert len(set(steps)) == 1
    with pytest.raises(ModelError, match=r"user\.base .* and model\.path .* are the same"):
        pipeline.plan(Recipe.load(recipe, [f"user.base={tmp_path / 'model'}"]))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["user.base=somewhere"], ["user.base", "the base is model.path"]),
        (["user.defense=sft", "alignment=none", "user.base=x"], ["user.base", "sft does not use"]),
        (["alignment.base=x"], ["alignment.base", "leave this out"]),
    ],
)
def test_recipes_that_are_refused(tmp_path, overrides, words):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(asft(tmp_path), overrides)
    assert all(word in str(caught.value) for word in words)


def test_modules_without_a_direction_are_found_before_training(tmp_path):
    recipe = asft(tmp_path)
    recipe["user"]["lora"] = {"r": 2, "alpha": 4, "target_modules": ["up_proj"]}
    recipe["alignment"]["lora"] = {"r": 2, "alpha": 4, "target_modules": ["q_proj"]}
    with pytest.raises(RecipeError, match="adapts none of the modules of the user's"):
        run(recipe, tmp_path / "out")
    begun = {path.name.split("-")[0] for path in (tmp_path / "out").glob("steps/*-*")}
    assert begun <= {"data", "manifest"}, "nothing but rows was made"
