"""The paper's dense formulas in float64, and Safe LoRA on a pair of models and an adapter."""

from __future__ import annotations

import torch
from peft import PeftModel

import holdfast
from pairs import llama, weights_of


def updates(adapter, make):
    """dW (out x in, float64) of each module, as PEFT computes it."""
    model = PeftModel.from_pretrained(make().double(), adapter).base_model.model.double()
    found = {}
    for name, module in model.named_modules():
        if "default" in getattr(module, "lora_A", {}):
            delta = module.get_delta_weight("default").detach()
            found[name] = delta.T if module.fan_in_fan_out else delta
    return found


def dense(base, aligned, adapter, make=llama, transposed=lambda name: False):
    """The paper's formulas with out x out matrices: cosine, and C dW, of each module."""
    first, second = weights_of(base), weights_of(aligned)
    found = {}
    for name, delta in updates(adapter, make).items():
        key = f"{name}.weight"
        if name == "lm_head" and key not in first:
            key = "model.embed_tokens.weight" if make is llama else "transformer.wte.weight"
        v = second[key].double() - first[key].double()
        v = v.T if transposed(name) else v
        c = v @ v.T / torch.linalg.norm(v)
        moved = c @ delta
        cosine = (delta * moved).sum() / (torch.linalg.norm(delta) * torch.linalg.norm(moved))
        exact = v @ torch.linalg.pinv(v, rtol=max(v.shape) * 2**-23) @ delta
        found[name] = {"cosine": float(cosine), "approx": moved, "exact": exact, "delta": delta}
    return found


def close(mine, theirs, tolerance=1e-5):
    """Whether two updates agree, relative to their norms."""
    return torch.linalg.norm(mine - theirs) <= tolerance * max(float(torch.linalg.norm(theirs)), 1e-12)


def run(three, out=None, **options):
    """Run Safe LoRA on base, aligned and adapter."""
    base, aligned, adapter = three
    return holdfast.safe_lora(adapter, base=base, aligned=aligned, out=out, **options)
