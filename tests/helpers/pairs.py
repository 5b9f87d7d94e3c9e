"""Tiny pairs of a base and an aligned model, and adapters whose factors are random."""

from __future__ import annotations

import hashlib

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import tiny

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
TWO = ["q_proj", "v_proj"]


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    )  # fmt: skip


def llama():
    return tiny.llama(400, layers=3)


def save_pair(folder, make=llama, dtypes=(torch.float32, torch.float32), shard="1GB"):
    """Base and aligned: the second is the first with another random change in every weight."""
    torch.manual_seed(5)
    for name, dtype in zip(("base", "aligned"), dtypes, strict=True):
        model = make()
        if name == "aligned":
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.02 * (1 + torch.rand(())))
        model.to(dtype).save_pretrained(folder / name, max_shard_size=shard)
    return folder / "base", folder / "aligned"


def save_adapter(folder, make=llama, std=0.1, dtype=None, **options):
    made = get_peft_model(make(), LoraConfig(task_type="CAUSAL_LM", **options))
    torch.manual_seed(1)
    for key, p in made.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=std)
    (made.to(dtype) if dtype else made).save_pretrained(folder)
    return folder


def weights_of(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def digest(folder):
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }
