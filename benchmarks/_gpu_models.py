"""Models with random weights in published shapes, quantised in memory, with one LoRA after another.

Writing a 7B model to disk only to load it in 4 bits takes minutes; here its linear layers are replaced.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from _shapes import LORA, SHAPES
from torch import nn

from holdfast.models.lora import add_lora
from holdfast.training.quantised import keep_differentiable

TRIAL = {
    "vocab_size": 1305, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
"""Sizes that replace those of a shape in a trial."""


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def base(shape: str, precision: str, trial: bool = False, **changed: Any) -> Any:
    """A frozen model: linear layers in "bfloat16", "nf4" or "int8", everything else in bfloat16.

    A trial has tiny sizes, and float32 instead of bfloat16.
    """
    torch.manual_seed(0)
    options = {k: v for k, v in SHAPES[shape].items() if k != "kind"} | (TRIAL if trial else {}) | changed
    config = getattr(transformers, f"{SHAPES[shape]['kind']}Config")(**options)
    stored = torch.float32 if trial else torch.bfloat16
    with torch.device(device()):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=stored)
    model.requires_grad_(False)
    if precision in ("nf4", "int8"):
        _quantise(model, precision, stored)
        keep_differentiable(model)
    return model


def _quantise(model: Any, precision: str, compute: torch.dtype) -> None:
    """Replace the linear layers of the decoder, as bitsandbytes does while a model is loaded."""
    import bitsandbytes as bnb

    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        sizes = module.in_features, module.out_features
        weight = module.weight.data
        if precision == "nf4":
            made = bnb.nn.Linear4bit(
                *sizes, bias=module.bias is not None, compute_dtype=compute, compress_statistics=True,
                quant_type="nf4", device="meta",
            )  # fmt: skip
            new: Any = bnb.nn.Params4bit(
                weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=made
            )
        else:
            made = bnb.nn.Linear8bitLt(
                *sizes, bias=module.bias is not None, has_fp16_weights=False, threshold=6.0, device="meta"
            )
            new = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        made.weight = new._quantize(torch.device(device()))  # `to` would not quantise int8 that is on a GPU
        made.bias = module.bias
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], made)
        module.weight = None
        del weight
    four = precision == "nf4"
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = four, not four


def with_lora(model: Any, lora: dict[str, Any] | None = None) -> Any:
    """A new LoRA on the model, which `without_lora` takes off again."""
    torch.manual_seed(1)
    return add_lora(model, lora or LORA, "shape")


def without_lora(model: Any) -> Any:
    """The base model without the LoRA, so that the next method starts from the same base."""
    found = model.unload()
    if hasattr(found, "peft_config"):
        del found.peft_config
    return found
