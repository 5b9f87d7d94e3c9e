"""Decoder layers and their attention, on tiny random models of thirteen architectures."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import architectures
import tiny
from holdfast.errors import ModelError
from holdfast.training.layers import decoder_layers, mixers

ATTENTION = {
    "GPT2": "attn", "GPTNeo": "attn", "GPTNeoX": "attention"
}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")


def names(model, modules):
    """The names of modules, from the decoder on."""
    known = {module: name for name, module in model.named_modules()}
    return [known[module] for module in modules]


@pytest.mark.parametrize("kind", architectures.MODELS)
def test_one_for_each_layer_in_order(kind):
    model = architectures.build(kind, num_hidden_layers=3)
    found = names(model, decoder_layers(model))
    assert [name.rsplit(".", 1)[1] for name in found] == [str(i) for i in range(3)]
    attention = ATTENTION.get(kind, "self_attn")
    assert names(model, mixers(model)) == [f"{name}.{attention}" for name in found]


@pytest.mark.parametrize("kind", architectures.MODELS)
def test_the_same_under_peft(kind):
    model = architectures.build(kind)
    plain = decoder_layers(model), mixers(model)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    assert (decoder_layers(wrapped), mixers(wrapped)) == plain


@pytest.mark.parametrize("kind", architectures.MODELS)
def test_the_mixer_is_called_once_with_the_output_that_the_layer_adds(kind):
    """Its output, or its first output, is a tensor of shape (rows, tokens, hidden)."""
    model = architectures.build(kind)
    shapes = []
    for module in mixers(model):
        module.register_forward_hook(
            lambda _, args, out: shapes.append((out[0] if isinstance(out, tuple) else out).shape)
        )
    model(input_ids=torch.tensor([[5, 6, 7], [8, 9, 10]]))
    assert shapes == [(2, 3, 16)] * 2


def test_a_norm_that_trains_in_full_is_no_attention():
    """PEFT wraps it, so that `post_attention_layernorm` has child modules."""
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["post_attention_layernorm"]
    )
    model = get_peft_model(tiny.llama(50), config)
    assert len(list(decoder_layers(model)[0].post_attention_layernorm.children())) > 0
    assert [type(m).__name__ for m in mixers(model)] == ["LlamaAttention"] * 2


def test_within_ddp_and_fsdp2(tmp_path):
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        model = tiny.llama(50, layers=3)
        plain = decoder_layers(model), mixers(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        assert (decoder_layers(ddp), mixers(ddp)) == plain
        for layer in plain[0]:
            fully_shard(layer)
        fully_shard(model)
        assert (decoder_layers(model), mixers(model)) == plain
    finally:
        torch.distributed.destroy_process_group()


def test_what_is_no_language_model_is_refused():
    with pytest.raises(ModelError, match="found Linear, which has no get_decoder"):
        decoder_layers(nn.Linear(2, 2))


def test_layers_that_do_not_add_up_are_refused():
    model = tiny.llama(50, layers=3)
    model.config.num_hidden_layers = 2
    with pytest.raises(ModelError, match=r"configuration says 2, its lists of layers have 3\."):
        decoder_layers(model)


def test_a_layer_without_attention_is_refused():
    model = tiny.llama(50)
    del model.model.layers[1].self_attn
    with pytest.raises(ModelError, match="found none among mlp, input_layernorm, post_attention_layernorm"):
        mixers(model)
