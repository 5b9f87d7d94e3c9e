"""GuardSpace: the update is zero on harmful inputs, its reductions, and its null space."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

import trainers
from holdfast.errors import DataError, ModelError
from holdfast.training import inputs
from holdfast.training.questions import padded

FEW = {"prompts": 1, "tolerance": 0.0}
"""One short prompt, so that the null space of the tiny model's layers is not empty."""


def harmful_inputs(made):
    """By module: the inputs [N, d] of the harmful prompts in the model as it is, prompt by prompt."""
    found = {}
    names = [n.rpartition(".lora_A.")[0] for n, _ in made.model.named_parameters() if ".lora_A." in n]
    hooks = [
        made.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.setdefault(name, []).append(args[0][0].detach())
        )
        for name in names
    ]
    with torch.no_grad():
        for prompt in made.harmful_prompts:
            made.model(**padded([prompt], 0, "cpu"))
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


def largest_update(made, xs):
    """The largest |B A x| over all modules, and the largest |B A| times |x| for scale."""
    update, scale = 0.0, 0.0
    for name, x in xs.items():
        module = made.model.get_submodule(name)
        product = module.lora_B["default"].weight.detach() @ module.lora_A["default"].weight.detach()
        update = max(update, float((product @ x.mT).abs().max()))
        scale = max(scale, float(product.norm() * x.norm()))
    return update, scale


def test_the_update_is_zero_on_harmful_inputs_at_every_step(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            made.model.eval()
            seen.append(largest_update(made, harmful_inputs(made)))
            made.model.train()

    made = trainers.trainer("guardspace", tmp_path, **FEW)
    made.add_callback(Look())
    made.train()
    assert len(seen) == 12
    assert all(update < 1e-6 * scale for update, scale in seen)
    assert seen[-1][1] > 0.1, "the adapter has learned something"
    plain = trainers.trainer("sft", tmp_path)
    plain.harmful_prompts = made.harmful_prompts
    plain.train()
    update, scale = largest_update(plain, harmful_inputs(plain))
    assert update > 1e-3 * scale, "without the projection it is not zero"


def test_logits_of_harmful_prompts_do_not_change(tmp_path):
    made = trainers.trainer("guardspace", tmp_path, **FEW)
    batch = padded(made.harmful_prompts, 0, "cpu")
    before = made.model.eval()(**batch).logits.detach()
    made.train()
    assert torch.allclose(made.model.eval()(**batch).logits, before, atol=1e-5)


def test_with_p_the_identity_it_is_sft(tmp_path):
    ours, _ = trainers.ended("guardspace", tmp_path, tolerance=1.0)
    sft, _ = trainers.ended("sft", tmp_path)
    assert trainers.same(ours, sft)


def test_the_projection_is_that_of_a_dense_p(tmp_path):
    """A P with P = Q0 Q0^T, made of all eigenvectors, equals A - (A Q) Q^T."""
    made = trainers.trainer("guardspace", tmp_path, max_steps=1, tolerance=0.05, learning_rate=0.0)
    start = trainers.model()
    made.train()
    xs = harmful_inputs(made)
    for name, x in xs.items():
        values, vectors = torch.linalg.eigh((x.mT @ x).double())
        null = values.clamp(min=0).cumsum(0) / values.clamp(min=0).sum() <= 0.05
        p = (vectors[:, null] @ vectors[:, null].mT).float()
        a = start.get_submodule(name).lora_A["default"].weight.detach()
        assert torch.allclose(made.model.get_submodule(name).lora_A["default"].weight, a @ p, atol=1e-5)


def test_groups_and_shared_inputs_change_nothing(tmp_path, monkeypatch):
    """One pass for all layers, or one for each: the same null spaces. q_proj and v_proj share theirs."""
    made = trainers.trainer("guardspace", tmp_path, max_steps=1, **FEW)
    made.train()
    monkeypatch.setattr(inputs, "BYTES", 1)
    again = trainers.trainer("guardspace", tmp_path, max_steps=1, **FEW)
    again.train()
    assert all(torch.equal(q, again.directions[name]) for name, q in made.directions.items())
    q, v = (next(d for n, d in made.directions.items() if n.endswith(end)) for end in ("q_proj", "v_proj"))
    assert q is v


def test_the_adapter_keeps_its_rank_and_reports_its_space(tmp_path):
    made = trainers.trainer("guardspace", tmp_path, **FEW)
    shapes = [w.shape for w in trainers.weights(made)]
    made.train()
    assert [w.shape for w in trainers.weights(made)] == shapes
    assert 0 < made.reported(12)["null_space"] < 1


@pytest.mark.parametrize(("tolerance", "kept"), [(0.0, 2), (0.05, 1), (1.0, 0)])
def test_split_by_energy(tolerance, kept):
    vectors = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double())[0]
    covariance = vectors @ torch.diag(torch.tensor([0.0, 0.0, 1.0, 99.0]).double()) @ vectors.mT
    basis = inputs.split(covariance, tolerance)
    assert basis.shape == (4, kept)
    if kept:
        assert torch.allclose((basis @ basis.mT) @ vectors[:, 3].float(), vectors[:, 3].float(), atol=1e-5)


def test_a_used_adapter_is_refused(tmp_path):
    net = trainers.model()
    for key, p in net.named_parameters():
        if "lora_B" in key:
            torch.nn.init.ones_(p)
    with pytest.raises(ModelError, match="needs a new adapter"):
        trainers.trainer("guardspace", tmp_path, net=net).train()


def test_full_fine_tuning_is_refused(tmp_path):
    with pytest.raises(ModelError, match="GuardSpace needs the change B A"):
        trainers.trainer("guardspace", tmp_path, net=trainers.tiny.llama(len(trainers.TOKENIZER)))


def test_prompts_that_reach_everything_are_refused(tmp_path):
    with pytest.raises(ModelError, match="No direction is left"):
        trainers.trainer("guardspace", tmp_path, tolerance=0.0).train()


def test_it_needs_prompts(tmp_path):
    from holdfast.defenses.guardspace import GuardSpaceConfig, GuardSpaceTrainer

    config = GuardSpaceConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(DataError, match="harmful_dataset"):
        GuardSpaceTrainer(
            model=trainers.model(), args=config, train_dataset=trainers.USER,
            processing_class=trainers.TOKENIZER,
        )  # fmt: skip


@pytest.mark.parametrize("wrong", [{"tolerance": -0.1}, {"tolerance": 1.5}, {"prompts": 0}])
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        trainers.trainer("guardspace", tmp_path, **wrong)
