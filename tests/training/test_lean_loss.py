"""The lean training loss: the same numbers with fewer logits in memory."""

from __future__ import annotations

import sys
from contextlib import nullcontext

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import tiny
import trainers
from holdfast.errors import ModelError
from holdfast.training import lean_loss as lean_module
from holdfast.training.lean_loss import is_exact, lean_loss
from holdfast.training.tokenising import IGNORED
from places import BENCHMARKS

sys.path.append(str(BENCHMARKS))
from _memory import peak_live_bytes

SIZES = {
    "vocab_size": 100, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
MODELS = {
    "Llama": GROUPED,
    "Mistral": GROUPED,
    "Mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2, "output_router_logits": True},
    "Qwen2": {**SIZES, "num_key_value_heads": 1},
    "Qwen3": GROUPED,
    "Gemma": GROUPED,
    "Gemma2": {**GROUPED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.05},
    "Gemma3Text": {**GROUPED, "query_pre_attn_scalar": 8, "final_logit_softcapping": 0.05},
    "Cohere": {**SIZES, "num_key_value_heads": 1, "logit_scale": 20.0},
    "Granite": {**SIZES, "num_key_value_heads": 1, "logits_scaling": 0.05},
    "FalconH1": {
        **SIZES, "num_key_value_heads": 1, "lm_head_multiplier": 20.0, "mamba_n_heads": 4, "mamba_d_head": 8,
        "mamba_d_ssm": 32, "mamba_d_state": 8,
    },
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
    "Phi": SIZES,
    "Phi3": {**SIZES, "num_key_value_heads": 1},
    "GPT2": {**SIZES, "n_inner": 24, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "GPTNeoX": SIZES,
    "GPTNeo": {
        **SIZES, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]],
        "embed_dropout": 0.0, "attention_dropout": 0.0, "resid_dropout": 0.0,
    },
}  # fmt: skip
"""Softcaps and scales strong enough to change the loss."""


def causal_lm(kind):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MODELS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).train()


def batch(where="end", rows=3, length=12):
    """Right-padded rows; labels at the end of each, everywhere, or on a single token of one row."""
    ids = torch.randint(3, 100, (rows, length), generator=torch.Generator().manual_seed(1))
    mask, labels = torch.ones_like(ids), ids.clone()
    for row, real in enumerate([length, length - 3, length - 5][:rows]):
        mask[row, real:], labels[row, real:] = 0, IGNORED
        if where == "end":
            labels[row, : real - 3] = IGNORED
    if where == "one":
        labels[:] = IGNORED
        labels[1, 4] = ids[1, 4]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(net, inputs, lean, items=None, **chunk):
    """The loss, and the gradient of every trainable weight; `net` is the language model itself."""
    net.zero_grad()
    with lean_loss(net, **chunk) if lean else nullcontext():
        loss = net(**inputs, **({} if items is None else {"num_items_in_batch": items})).loss
    loss.backward()
    return loss.item(), {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}


def assert_same(left, right, value=1e-6, gradient=1e-6):
    assert left[0] == pytest.approx(right[0], rel=value)
    assert left[1].keys() == right[1].keys()
    for key in left[1]:
        scale = float(right[1][key].abs().max()) + 1e-12
        assert float((left[1][key] - right[1][key]).abs().max()) <= gradient * max(scale, 1), key


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_has_its_plain_loss_and_gradients(kind):
    """All weights are trained, including embeddings and head; chunks have four tokens."""
    net = causal_lm(kind)
    for where in ("end", "everywhere"):
        plain = loss_and_gradients(net, batch(where), lean=False)
        assert_same(loss_and_gradients(net, batch(where), lean=True, chunk=400), plain, value=2e-6)
    assert is_exact(net, net, batch())


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite", "FalconH1"])
def test_control_what_a_model_does_to_its_logits_matters(kind, monkeypatch):
    monkeypatch.setattr(lean_module._Recorded, "steps", property(lambda self: (), lambda self, new: None))
    net = causal_lm(kind)
    plain, lean = (loss_and_gradients(net, batch(), lean=lean)[0] for lean in (False, True))
    assert abs(plain - lean) > 0.01
    assert not is_exact(net, net, batch())


def test_tokens_are_counted_as_transformers_counts_them():
    """The mean is over the step's tokens if their number is given, else over the micro-batch's tokens."""
    net = causal_lm("Llama")
    for items in (None, 50, torch.tensor(50)):
        for where in ("end", "everywhere", "one"):
            plain = loss_and_gradients(net, batch(where), lean=False, items=items)
            assert_same(loss_and_gradients(net, batch(where), lean=True, items=items), plain)


def test_a_micro_batch_without_labels_adds_nothing():
    """With a step's token count, its loss is 0 and every weight has a gradient of zeros."""
    net, inputs = causal_lm("Llama"), batch()
    inputs["labels"][:] = IGNORED
    plain = loss_and_gradients(net, inputs, lean=False, items=7)
    lean = loss_and_gradients(net, inputs, lean=True, items=7)
    assert lean[0] == plain[0] == 0
    assert lean[1].keys() == plain[1].keys()
    assert not any(g.any() for g in lean[1].values())


def test_logits_are_made_where_labels_are_and_for_a_chunk_at_a_time():
    net, widths = causal_lm("Llama"), []
    net.lm_head.register_forward_hook(lambda module, args, made: widths.append(made.shape[:2].numel()))
    loss_and_gradients(net, batch("end"), lean=True, chunk=400)
    assert widths == [1, 4, 4, 1], (
        "one token to see what the model does to logits, then nine tokens in chunks of four"
    )
    widths.clear()
    loss_and_gradients(net, batch("end"), lean=False)
    assert widths == [36]


def test_the_model_is_left_as_it_was():
    net = causal_lm("Gemma2")
    function, modes = net.loss_function, [m.training for m in net.modules()]
    with pytest.raises(KeyError), lean_loss(net):
        raise KeyError
    loss_and_gradients(net, batch(), lean=True)
    is_exact(net, net, batch())
    assert net.loss_function is function
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_without_gradients_it_is_the_plain_loss_too():
    """As in a first pass without training: nothing is differentiated, chunk by chunk."""
    net, widths = causal_lm("Gemma2"), []
    plain = loss_and_gradients(net, batch(), lean=False)[0]
    net.get_output_embeddings().register_forward_hook(
        lambda m, a, made: widths.append(made.shape[:2].numel())
    )
    with torch.no_grad(), lean_loss(net, chunk=400):
        loss = net(**batch()).loss
    assert loss.item() == pytest.approx(plain, rel=2e-6)
    assert not loss.requires_grad
    assert max(widths) == 4


def test_a_second_derivative_is_refused():
    net = causal_lm("Llama")
    with lean_loss(net):
        loss = net(**batch()).loss
    with pytest.raises(ModelError, match="second derivative"):
        torch.autograd.grad(loss, [net.model.norm.weight], create_graph=True)


@pytest.mark.parametrize("break_it", ["another loss", "no head", "z loss"])
def test_what_cannot_be_lean_is_found_out(break_it, monkeypatch):
    net, inputs = causal_lm("Llama"), batch()
    assert is_exact(net, net, inputs)
    if break_it == "another loss":
        net.loss_function = lambda logits, labels, **rest: logits.mean()
    elif break_it == "no head":
        monkeypatch.setattr(type(net), "get_output_embeddings", lambda self: None)
    else:
        forward = net.forward

        def with_z_loss(**given):
            made = forward(**given)
            made.loss = made.loss + 0.01 * made.logits.logsumexp(-1).pow(2).mean()
            return made

        monkeypatch.setattr(net, "forward", with_z_loss)
        torch.nn.init.normal_(net.lm_head.weight)
    assert not is_exact(net, net, inputs)


LORAS = {
    "lora": {"target_modules": ["q_proj", "v_proj"]},
    "lora on the head": {"target_modules": ["q_proj", "lm_head"], "lora_dropout": 0.0},
    "the head itself": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", LORAS.values(), ids=LORAS)
def test_adapters(options, tmp_path):
    """In the trainer, with micro-batches and padding, the weights equal those of the plain loss."""
    ends, sizes = [], {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 4}
    for lean in (True, False):
        torch.manual_seed(3)
        net = get_peft_model(
            tiny.llama(len(trainers.TOKENIZER)), LoraConfig(task_type="CAUSAL_LM", r=2, **options)
        )
        made = trainers.trainer("sft", tmp_path, net=net, lean_loss=lean, **sizes)
        start = trainers.weights(made)
        made.train()
        assert made.lean is lean
        ends.append((trainers.weights(made), [e["loss"] for e in made.state.log_history if "loss" in e]))
    assert trainers.distance(ends[0][0], ends[1][0]) < 1e-6
    assert ends[0][1] == pytest.approx(ends[1][1], abs=1e-5)
    assert trainers.distance(start, ends[0][0]) > 1e-3


def test_the_check_draws_no_random_number():
    torch.manual_seed(3)
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["lm_head"], lora_dropout=0.5)
    net = get_peft_model(causal_lm("Llama"), config)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert is_exact(net, net.get_base_model(), batch())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "options", [{"bf16": True}, {"weights": torch.bfloat16}], ids=["autocast", "weights"]
)
def test_bf16_is_as_near_to_float32_as_the_plain_loss(options, tmp_path):
    """Gradients of one step, compared with those of the same weights in float32."""
    weights = options.pop("weights", torch.float32)
    gradients = {}
    for name, lean, dtype, more in (
        ("exact", False, torch.float32, {}), ("plain", False, weights, options), ("lean", True, weights, options)
    ):  # fmt: skip
        net = tiny.llama(len(trainers.TOKENIZER)).bfloat16().to(dtype)
        made = trainers.trainer(
            "sft", tmp_path, net=net, lean_loss=lean, max_steps=1, max_grad_norm=0, **more
        )
        made.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.0})
        kept = {}
        for key, p in net.named_parameters():
            p.register_post_accumulate_grad_hook(
                lambda p, key=key, kept=kept: kept.update({key: p.grad.float().clone()})
            )
        made.train()
        assert made.lean is lean
        gradients[name] = torch.cat([kept[key].flatten() for key in sorted(kept)])
    apart = {k: float((g - gradients["exact"]).norm()) for k, g in gradients.items()}
    assert apart["plain"] > 0
    assert apart["lean"] < 1.2 * apart["plain"] < 0.1 * float(gradients["exact"].norm())


def test_evaluation_and_outputs_are_plain(tmp_path):
    made = trainers.trainer("sft", tmp_path, max_steps=1)
    made.train()
    inputs = made.data_collator([made.train_dataset[i] for i in range(3)])
    loss, outputs = made.compute_loss(made.model, dict(inputs), return_outputs=True)
    assert outputs.logits.shape[:2] == inputs["input_ids"].shape
    lean = made.compute_loss(made.model, dict(inputs))
    assert lean.item() == pytest.approx(loss.item(), rel=1e-6)
    assert made.lean


def test_the_check_is_no_part_of_a_step(tmp_path):
    """A method that hooks the model during a step would otherwise see tokens that are not the step's."""
    made, seen = trainers.trainer("sft", tmp_path, max_steps=2), []
    step = made.training_step

    def watched(model, inputs, *rest):
        embeddings = model.get_input_embeddings()
        hook = embeddings.register_forward_hook(lambda module, args, _: seen.append(args[0].shape))
        try:
            return step(model, inputs, *rest)
        finally:
            seen.append(inputs["input_ids"].shape)
            hook.remove()

    made.training_step = watched
    made.train()
    assert made.lean
    assert len(seen) == 4
    assert seen[0] == seen[1]
    assert seen[2] == seen[3]


@pytest.mark.parametrize("options", [{"label_smoothing_factor": 0.1}, {"lean_loss": False}])
def test_another_loss_stays_what_it_is(options, tmp_path):
    made = trainers.trainer("sft", tmp_path, max_steps=1, **options)
    made.train()
    assert made.lean is False


def peak(lean, where, vocabulary=20_000, rows=4, length=64):
    """Peak bytes of one step without those of the weights."""
    torch.manual_seed(0)
    net = tiny.llama(vocabulary).requires_grad_(False)
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if where == "end":
        labels[:, :-2] = IGNORED

    def work():
        hidden = net.get_input_embeddings()(ids).requires_grad_()
        with lean_loss(net, chunk=16 * 20_000) if lean else nullcontext():
            loss = net(inputs_embeds=hidden, labels=labels).loss
        loss.backward()

    return peak_live_bytes(work)


def test_memory_is_that_of_one_chunk():
    """Plain: logits of all 256 tokens, in about three copies. Lean: of 8 completion tokens, or of chunks of 16."""
    all_logits = 4 * 64 * 20_000 * 4
    plain = peak(False, "everywhere")
    assert plain > 2.5 * all_logits
    one_chunk = all_logits / 16
    assert peak(True, "everywhere") < 3.5 * one_chunk + 2 * 2**20
    assert peak(True, "end") < peak(True, "everywhere") * 0.75
    assert peak(False, "end") > 2.5 * all_logits, "the plain loss computes all logits anyway"
