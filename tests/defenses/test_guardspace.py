"""GuardSpace: the update is zero on harmful inputs, its reductions, and its null space."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import trainers
from holdfast.defenses import guardspace
from holdfast.errors import DataError, ModelError
from holdfast.training import inputs
from holdfast.training.questions import padded

FEW = {"prompts": 1, "tolerance": 0.0}
"""One short prompt, so that the null space of the tiny model's layers is not empty."""
STARTS = [{}, {"initialisation": "subspace"}]
SUBSPACE = {"initialisation": "subspace", **FEW}


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


@pytest.mark.parametrize("start", STARTS)
def test_the_update_is_zero_on_harmful_inputs_at_every_step(start, tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            made.model.eval()
            seen.append(largest_update(made, harmful_inputs(made)))
            made.model.train()

    made = trainers.trainer("guardspace", tmp_path, **FEW, **start)
    made.add_callback(Look())
    made.train()
    assert len(seen) == 12
    assert all(update < 1e-6 * scale for update, scale in seen)
    assert seen[-1][1] > 0.1, "the adapter has learned something"
    if start:
        return
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


@pytest.mark.parametrize(
    "wrong", [{"tolerance": -0.1}, {"tolerance": 1.5}, {"prompts": 0}, {"initialisation": "svd"}]
)
def test_impossible_values_are_refused(wrong, tmp_path):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        trainers.trainer("guardspace", tmp_path, **wrong)


def factors(made):
    """By module: copies of B, A and the scaling."""
    named = {n.rpartition(".lora_A.")[0]: n for n, _ in made.model.named_parameters() if ".lora_A." in n}
    modules = {name: made.model.get_submodule(name) for name in named}
    return {
        name: (
            m.lora_B["default"].weight.detach().clone(),
            m.lora_A["default"].weight.detach().clone(),
            m.scaling["default"],
        )
        for name, m in modules.items()
    }


def subspace_net(alpha=4):
    """The model of the other tests, with a LoRA of rank 4."""
    torch.manual_seed(3)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=alpha, target_modules=["q_proj", "v_proj"])
    return get_peft_model(trainers.tiny.llama(len(trainers.TOKENIZER)), lora)


def test_the_start_is_the_smallest_part_of_the_weights(tmp_path):
    """Dense: W C = U S V^T with the damped C, and s B_0 A_0 = U_r S_r V_r^T C^-1 P. The other half is -B_0."""
    made = trainers.trainer(
        "guardspace", tmp_path, net=subspace_net(alpha=2), max_steps=1, learning_rate=0.0, **SUBSPACE
    )
    batch = padded(made.harmful_prompts, 0, "cpu")
    before = made.model.eval()(**batch).logits.detach()
    made.train()
    assert torch.allclose(made.model.eval()(**batch).logits, before, atol=1e-6)
    xs = harmful_inputs(made)
    for name, (b, a, scaling) in factors(made).items():
        x = xs[name].double()
        w, c = made.model.get_submodule(name).base_layer.weight.detach().double(), x.mT @ x
        values, vectors = torch.linalg.eigh(c)
        null = vectors[:, values < values[-1] * 1e-10]
        c = c + 0.01 * c.diagonal().mean() * torch.eye(len(c))
        u, s, v = torch.linalg.svd(w @ c, full_matrices=False)
        part = u[:, -2:] @ torch.diag(s[-2:]) @ v[-2:] @ torch.linalg.inv(c) @ null @ null.mT
        assert torch.allclose(scaling * (b[:, :2] @ a[:2]).double(), part, atol=1e-5)
        assert part.norm() > 0.01
        assert torch.equal(b[:, 2:], -b[:, :2])
        assert torch.allclose(a[2:], a[:2], atol=1e-7)  # the first half was projected again
        assert float(b[:, :2].norm()) == pytest.approx(float(a[:2].norm()), rel=1e-4)


def test_the_half_that_holds_the_start_does_not_move(tmp_path):
    kept = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            kept.append(factors(made))

    made = trainers.trainer(
        "guardspace", tmp_path, net=subspace_net(), weight_decay=0.5, max_steps=2, **SUBSPACE
    )
    made.add_callback(Look())
    made.train()
    for name, (b, a, _) in factors(made).items():
        first_b, first_a, _ = kept[1][name]
        assert torch.equal(b[:, 2:], first_b[:, 2:])
        assert torch.equal(a[2:], first_a[2:])
        assert not torch.equal(b[:, :2], first_b[:, :2])
        assert not torch.equal(a[:2], first_a[:2])


def test_it_trains_as_an_adapter_of_half_the_rank_on_the_remainder(tmp_path):
    """By hand: W - s B_0 A_0 in the weights, B_0 and A_0 in the adapter, P after each step, gradients clipped."""
    made = trainers.trainer(
        "guardspace", tmp_path, net=subspace_net(), max_steps=3, max_grad_norm=0.1, **SUBSPACE
    )
    first = trainers.trainer(
        "guardspace", tmp_path, net=subspace_net(), max_steps=1, learning_rate=0.0, **SUBSPACE
    )
    first.train()
    starts = factors(first)
    plain = trainers.trainer("sft", tmp_path, net=trainers.model(), max_steps=3, max_grad_norm=0.1)
    for name, (b, a, scaling) in starts.items():
        module = plain.model.get_submodule(name)
        module.scaling["default"] = scaling
        with torch.no_grad():
            module.lora_B["default"].weight.copy_(b[:, :2])
            module.lora_A["default"].weight.copy_(a[:2])
            module.base_layer.weight.sub_(scaling * b[:, :2] @ a[:2])

    class Project(TrainerCallback):
        def on_optimizer_step(self, *args, **kwargs):
            for name, q in first.directions.items():
                a = plain.model.get_submodule(name).lora_A["default"].weight.data
                a.sub_((a @ q) @ q.mT)

    plain.add_callback(Project())
    made.train()
    plain.train()
    norms = [[e["grad_norm"] for e in one.state.log_history if "grad_norm" in e] for one in (made, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3), "the other half has no part in the clipping"
    by_hand = factors(plain)
    for name, (b, a, _) in factors(made).items():
        assert torch.allclose(b[:, :2], by_hand[name][0], atol=1e-5)
        assert torch.allclose(a[:2], by_hand[name][1], atol=1e-5)
        assert not torch.allclose(b[:, :2], starts[name][0][:, :2], atol=1e-3)


def test_the_start_with_accumulation_and_after_a_resume(tmp_path):
    def trained(folder, resume=False, **more):
        made = trainers.trainer(
            "guardspace", folder, net=subspace_net(), max_steps=4, save_strategy="steps", save_steps=2,
            **SUBSPACE, **more,
        )  # fmt: skip
        made.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return trainers.weights(made)

    whole = trained(tmp_path / "a")
    assert trainers.same(trained(tmp_path / "a", resume=True), whole)
    half = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert trainers.distance(trained(tmp_path / "b", **half), whole) < 1e-5


def test_the_start_knows_the_adapters_below(tmp_path):
    """W is that of the aligned model, also if its alignment is an adapter that is stacked below."""
    made = subspace_net()
    module = made.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    before = guardspace._weight_below(module)
    made.add_adapter("stage0", LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"]))
    b, a = module.lora_B["stage0"].weight, module.lora_A["stage0"].weight
    torch.nn.init.normal_(b)
    made.base_model.set_adapter(["stage0", "default"])
    b.requires_grad_(False)
    a.requires_grad_(False)
    assert torch.allclose(guardspace._weight_below(module), before + 3 * (b @ a).double(), atol=1e-6)
    assert torch.equal(before, module.base_layer.weight.detach().double())


def test_an_odd_rank_has_no_half(tmp_path):
    net = trainers.tiny.llama(len(trainers.TOKENIZER))
    net = get_peft_model(net, LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"]))
    with pytest.raises(ModelError, match=r"needs an even rank of at most .* found 3"):
        trainers.trainer("guardspace", tmp_path, net=net, **SUBSPACE)
