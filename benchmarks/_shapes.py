"""Models with random weights in published shapes, and a prediction of the memory that aligning one needs.

The shapes are those of the models' published configurations.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora
from holdfast.training.lean_loss import LOGITS

SHAPES: dict[str, dict[str, Any]] = {
    "llama-110m": {
        "kind": "Llama", "vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12, "head_dim": 64,
        "tie_word_embeddings": False,
    },
    "llama-2-7b": {
        "kind": "Llama", "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen2-7b": {
        "kind": "Qwen2", "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "gemma-2-2b": {
        "kind": "Gemma2", "vocab_size": 256_000, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
LORA: dict[str, Any] = {"r": 8, "alpha": 4, "dropout": 0.0, "target_modules": "all-linear"}
BYTES = {"float32": 4, "bfloat16": 2}
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes per weight: 4 bits, an 8-bit scale for every 64 weights, a float32 scale for every 256 scales."""


def build(shape: str, precision: str, stored: str, device: str) -> Any:
    """Build a model with a new LoRA on all its linear layers.

    Args:
        precision: data type of the linear layers: "float32", "bfloat16" or "nf4".
        stored: data type of all other weights and of the computation: "float32" or "bfloat16".
    """
    torch.manual_seed(0)
    options = {k: v for k, v in SHAPES[shape].items() if k != "kind"}
    config = getattr(transformers, f"{SHAPES[shape]['kind']}Config")(**options)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, stored))
    model.requires_grad_(False)
    if precision == "nf4":
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            model = load_model(Path(folder), device=device, quantization="nf4")
    return add_lora(model, LORA, shape)


def linear_layers(shape: str) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers of one decoder layer."""
    s = SHAPES[shape]
    d, f = s["hidden_size"], s["intermediate_size"]
    q, kv = (s[k] * s["head_dim"] for k in ("num_attention_heads", "num_key_value_heads"))
    return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]


def predicted_bytes(
    shape: str, precision: str, stored: str, batch: int, length: int, completion: float, perturbed: int
) -> dict[str, int]:
    """Predict the parts of a step's peak memory, with checkpointing, lean loss and LoRA on all linear layers.

    Args:
        completion: share of completion tokens among all tokens.
        perturbed: number of layers whose perturbation is kept (0: SFT; all layers: Vaccine).
    """
    s = SHAPES[shape]
    d, f, layers, vocabulary = (
        s[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")
    )
    tokens, kv = batch * length, s["num_key_value_heads"] * s["head_dim"]
    q = s["num_attention_heads"] * s["head_dim"]
    r, wide = LORA["r"], BYTES[stored]
    linear = layers * sum(a * b for a, b in linear_layers(shape))
    lora = layers * r * sum(a + b for a, b in linear_layers(shape))
    matrices = vocabulary * d * (1 if s["tie_word_embeddings"] else 2)
    chosen = round(tokens * completion)
    logits = min(LOGITS, chosen * vocabulary)
    # LoRA computes in float32: it copies each module's input if the model does not compute in float32.
    copies = 0 if wide == 4 else 4 * (5 * d + q + f) + 2 * 4 * d
    layer = wide * (4 * d + 2 * q + 2 * kv + 7 * f) + copies
    parts = {
        "weights": linear * (NF4 if precision == "nf4" else wide) + matrices * wide,
        "lora_gradients_adamw": lora * 4 * (1 + 1 + 2),
        "layer_inputs": layers * tokens * d * wide,
        "perturbations": perturbed * tokens * d * wide,
    }
    largest_matrix = max(a * b for a, b in linear_layers(shape)) * wide if precision == "nf4" else 0
    phases = {
        "one_layer_again": tokens * layer + largest_matrix,
        "logits_of_a_chunk": logits * (3 * 4 + (wide if wide < 4 else 0)) + 2 * chosen * d * wide,
    }
    largest = max(phases, key=lambda name: phases[name])
    found = {name: round(value) for name, value in {**parts, largest: phases[largest]}.items()}
    return found | {"total": sum(found.values())}
