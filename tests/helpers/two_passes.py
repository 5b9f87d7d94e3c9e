"""Vaccine and T-Vaccine as a plain loop: two backwards with hooks on the attention outputs, AdamW, no accumulation."""

from __future__ import annotations

import copy
import json
import math
from functools import cache
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import tiny
import trainers
from holdfast.machine.seeds import derive_seed
from holdfast.training.tokenising import collator, prepare_rows

LAYERS = 4
HARMFUL = prepare_rows(trainers.HARMFUL, trainers.TOKENIZER, 2048)
COLLATE = collator(trainers.TOKENIZER)


def model(dropout: float = 0.0, **options: Any) -> Any:
    """A tiny Llama of four layers with a LoRA in attention and MLP that is no longer at 0."""
    given = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_dropout": dropout, **options}
    made, state = _made(json.dumps(given))
    torch.set_rng_state(state)
    return copy.deepcopy(made)


@cache
def _made(given: str) -> tuple[Any, torch.Tensor]:
    """The model, made once, and the state of the random numbers after that."""
    torch.manual_seed(3)
    net = get_peft_model(
        tiny.llama(len(trainers.TOKENIZER), layers=LAYERS),
        LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, **json.loads(given)),
    )
    for name, p in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.02)
    return net, torch.get_rng_state()


def attention(net: Any) -> list[Any]:
    return [m for name, m in net.named_modules() if name.endswith("self_attn")]


def layer_of(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def cross_entropy(net: Any, batch: Any) -> torch.Tensor:
    """The mean over the completion tokens."""
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().reshape(-1, logits.shape[-1]), batch["labels"][:, 1:].reshape(-1)
    )


def output_gradients(net: Any, batch: Any) -> list[torch.Tensor]:
    """d loss / d attention output of every layer, by `retain_grad` and a whole backward."""
    outputs: list[torch.Tensor] = []

    def keep(module: Any, arguments: Any, out: Any) -> Any:
        kept = out[0] + torch.zeros(1, requires_grad=True)  # needs a graph even if everything below is frozen
        kept.retain_grad()
        outputs.append(kept)
        return kept, *out[1:]

    hooks = [m.register_forward_hook(keep) for m in attention(net)]
    cross_entropy(net, batch).backward()
    for hook in hooks:
        hook.remove()
    net.zero_grad()
    return [out.grad for out in outputs]


def probabilities(net: Any) -> torch.Tensor:
    """p_l = s_l / sum s over all harmful rows in one batch."""
    net.eval()
    s = torch.stack([g.norm() for g in output_gradients(net, COLLATE(HARMFUL))])
    net.train()
    return s / s.sum()


def train(
    batches: list[Any], rho: float, *, gamma: int | None = None, k: int = 4, j: int = 3, seed: int = 11,
    net: Any = None, weight_decay: float = 0.0, freeze: str = "",
) -> Any:  # fmt: skip
    """Weights, p at every probe, layers at every draw; gamma None is Vaccine, `freeze` a part of frozen names."""
    net = net or model()
    net.train()
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(named.values(), lr=5e-3, weight_decay=weight_decay)
    probes, draws, layers = [], [], list(range(LAYERS))
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        if gamma is not None and step % k == 0:
            probes.append(probabilities(net))
        if gamma is not None and step % j == 0:
            generator = torch.Generator().manual_seed(derive_seed(seed, "layers", step // j))
            drawn = torch.multinomial(probes[-1], gamma, generator=generator)
            layers = sorted(drawn.tolist())
            draws.append(layers)
            for name, p in named.items():
                p.requires_grad_(layer_of(name) in layers or freeze not in name)
        g = {i: g for i, g in enumerate(output_gradients(net, batch)) if i in layers}
        norm = math.sqrt(sum(float(x.square().sum()) for x in g.values()))
        hooks = [
            attention(net)[i].register_forward_hook(
                lambda m, a, out, e=rho * x / norm: (out[0] + e, *out[1:])
            )
            for i, x in g.items()
        ]
        cross_entropy(net, batch).backward()
        for hook in hooks:
            hook.remove()
        torch.nn.utils.clip_grad_norm_(named.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    for p in named.values():
        p.requires_grad_(True)
    return [p.detach() for p in named.values()], probes, draws


def parts(accumulation):
    """Four rows a step, in as many micro-batches."""
    return {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
