"""Tiny random models of thirteen kinds, two layers each."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import trainers

SIZES = {
    "vocab_size": len(trainers.TOKENIZER), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 1, "head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 16},
    "Qwen2": {**SIZES, "num_key_value_heads": 1},
    "Qwen3": GROUPED,
    "Gemma": GROUPED,
    "Gemma2": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "Gemma3Text": {**GROUPED, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.1},
    "Phi3": {**SIZES, "num_key_value_heads": 1},
    "GPT2": {**SIZES, "n_inner": 24},
    "GPTNeoX": SIZES,
    "GPTNeo": {**SIZES, "num_heads": 2, "window_size": 16},
    "Mixtral": {**SIZES, "num_key_value_heads": 1, "num_local_experts": 2},
}


def build(kind: str, **more: Any) -> Any:
    """A model of one kind, with random weights."""
    given = {**MODELS[kind], **more}
    if kind == "GPTNeo":  # which kind of attention each layer has is listed
        given["attention_types"] = [[["global"], given["num_hidden_layers"]]]
    config = getattr(transformers, f"{kind}Config")(**given)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)
