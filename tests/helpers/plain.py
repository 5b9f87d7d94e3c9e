"""The methods as plain loops: cross-entropy by hand, the penalty in the loss, its gradient by autograd."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

import trainers
from holdfast.machine.seeds import derive_seed
from holdfast.training.tokenising import collator, prepare_rows

SEED, BATCH, STEPS = 11, 4, 12
USER = prepare_rows(trainers.USER, trainers.TOKENIZER, 2048)
ALIGNMENT = prepare_rows(trainers.ALIGNMENT, trainers.TOKENIZER, 2048)
COLLATE = collator(trainers.TOKENIZER)

Penalty = Callable[[list[torch.Tensor]], torch.Tensor]
"""A penalty of the current weights, with its graph."""


def cross_entropy(net: Any, windows: list[Any]) -> torch.Tensor:
    """The mean over the completion tokens of all micro-batches together."""
    logits = [net(input_ids=b["input_ids"], attention_mask=b["attention_mask"]).logits for b in windows]
    flat = torch.cat([x[:, :-1].float().reshape(-1, x.shape[-1]) for x in logits])
    labels = torch.cat([b["labels"][:, 1:].reshape(-1) for b in windows])
    return torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100)


def l2(net: Any, weights: list[torch.Tensor], step: int) -> Penalty:
    """1/2 ||w - a||^2."""
    anchor = [w.detach().clone() for w in weights]
    return lambda now: sum(((w - a) ** 2).sum() for w, a in zip(now, anchor, strict=True)) / 2


def two_anchors() -> Any:
    """`l2` as in the authors' code: it keeps each state's last iterate; the other state's iterate is the anchor."""
    last: dict[str, list[torch.Tensor]] = {}
    ended = "user"

    def at_switch(net: Any, weights: list[torch.Tensor], step: int) -> Penalty:
        nonlocal ended
        now = [w.detach().clone() for w in weights]
        begins = {"user": "alignment", "alignment": "user"}[ended]
        last[ended], ended = now, begins
        anchor = last[{"user": "alignment", "alignment": "user"}[begins]]
        return lambda w: sum(((x - a) ** 2).sum() for x, a in zip(w, anchor, strict=True)) / 2

    return at_switch


def fisher_of(net: Any, weights: list[torch.Tensor], step: int, rows: int | None) -> list[torch.Tensor]:
    """The sum of the squared gradients of the batches of four alignment rows."""
    order = torch.randperm(
        len(ALIGNMENT), generator=torch.Generator().manual_seed(derive_seed(SEED, "fisher", step))
    )
    order = order.tolist()[:rows]
    total = [torch.zeros_like(w) for w in weights]
    net.eval()
    for i in range(0, len(order), BATCH):
        loss = cross_entropy(net, [COLLATE([ALIGNMENT[j] for j in order[i : i + BATCH]])])
        for f, g in zip(total, torch.autograd.grad(loss, weights), strict=True):
            f += g**2
    net.train()
    return total


def fisher(rows: int | None, mean_1: bool) -> Any:
    """1/2 sum F (w - a)^2, with F divided by its mean or not."""

    def at_switch(net: Any, weights: list[torch.Tensor], step: int) -> Penalty:
        anchor = [w.detach().clone() for w in weights]
        found = fisher_of(net, weights, step, rows)
        mean = sum(f.sum() for f in found) / sum(f.numel() for f in found) if mean_1 else 1.0
        return lambda now: (
            sum((f / mean * (w - a) ** 2).sum() for f, w, a in zip(found, now, anchor, strict=True)) / 2
        )

    return at_switch


def delta_w(net: Any, weights: list[torch.Tensor], step: int) -> Penalty:
    """1/2 sum ||s B A - s B_a A_a||_F^2, with full products."""
    modules = [m for m in net.modules() if hasattr(m, "lora_A")]

    def products() -> list[torch.Tensor]:
        return [
            m.scaling["default"] * m.lora_B["default"].weight @ m.lora_A["default"].weight for m in modules
        ]

    anchor = [p.detach().clone() for p in products()]
    return lambda now: sum(((p - a) ** 2).sum() for p, a in zip(products(), anchor, strict=True)) / 2


def batches(rows: int, size: int, seeds: list[int], first: int = 0) -> list[list[int]]:
    """The row numbers of the batches of several epochs, one for each seed of its order."""
    found = []
    for seed in seeds:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
        found += [[first + i for i in order[at : at + size]] for at in range(0, rows, size)]
    return found


def train(
    k1: int, k2: int, strength: float, accumulation: int = 1, *, at_switch: Any = l2, warmup: float = 0.0,
    net: Any = None, steps: int = STEPS, autocast: bool = False,
) -> Any:  # fmt: skip
    """Weights after the steps, and for each step its state, loss, gradient norm, drift and penalty."""
    net = net or trainers.model()
    net.train()
    weights = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * s / steps)).item())
    )
    rows = USER + ALIGNMENT
    size = BATCH // accumulation
    source = {
        "user": batches(len(USER), size, [SEED + epoch for epoch in range(steps)]),
        "alignment": batches(
            len(ALIGNMENT), size, [derive_seed(SEED, "alignment", e) for e in range(steps)], len(USER)
        ),
    }
    state, record, aligned = None, [], 0
    for step in range(steps):
        now = "alignment" if step % (k1 + k2) < k1 else "user"
        if now != state:
            start = [w.detach().clone() for w in weights]
            penalty = at_switch(net, weights, step)
            state = now
        at = accumulation * (aligned if state == "alignment" else step)
        window = [COLLATE([rows[i] for i in b]) for b in source[state][at : at + accumulation]]
        aligned += state == "alignment"
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            loss = cross_entropy(net, window)
        entry = {"state": state, "loss": loss.item()}
        active = strength if not warmup or step > warmup * steps else 0.0
        if active:
            loss = loss + active * penalty(weights)
        optimizer.zero_grad()
        loss.backward()
        entry["grad_norm"] = torch.nn.utils.clip_grad_norm_(weights, 1.0).item()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            entry["penalty"] = float(active * penalty(weights)) if active else 0.0
            squares = [((w - s).float() ** 2).sum() for w, s in zip(weights, start, strict=True)]
            entry["drift"] = float(torch.stack(squares).sum().sqrt())
        record.append(entry)
    return [w.detach() for w in weights], record
