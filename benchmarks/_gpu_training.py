"""The rows of `training.py --gpu`: step times of Lisa, BSO, EWC and a plain Trainer beside SFT, in turns."""

from __future__ import annotations

import argparse
import statistics
import tempfile
from typing import Any

import torch
import training
from _gpu_models import base, device, with_lora, without_lora
from _rows import Rows
from training import LORA, PLAIN, PUBLISHED, WARM

STEPS, TURNS = 53, 2
"""Optimizer steps of a run, the first three not counted; every other turn has the opposite order."""
ORDER = ("sft", PLAIN, "lisa", "bso", "ewc")


def measure(given: argparse.Namespace) -> None:
    """Measure each method in each turn; the ratio of a turn is to that turn's SFT."""
    add = Rows("training", given)
    steps = 8 if given.trial else STEPS
    case = {"shape": "llama-2-7b", "device": device(), "batch": 5, "length": 16 if given.trial else 64}
    held: list[Any] = []
    for turn in range(TURNS):
        for name in ORDER if turn % 2 == 0 else ORDER[::-1]:
            path = ("cases", "llama-2-7b", "turns", f"turn {turn + 1}", name)
            add(path, lambda name=name: one(name, case, steps, held, given.trial))


def one(name: str, case: dict[str, Any], steps: int, held: list[Any], trial: bool) -> dict[str, Any]:
    """Train one method: median and sum of the step times, the first step, and the peak of memory."""
    if not held:
        held.append(base(case["shape"], "bfloat16", trial))
        with tempfile.TemporaryDirectory() as folder:
            model = with_lora(held[0], LORA)
            training.train("sft", model, case, WARM + 1, folder)
            held[0] = without_lora(model)
    model = with_lora(held[0], LORA)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        clock = training.train(name, model, case, steps, folder).steps
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    held[0] = without_lora(model)
    return {
        "seconds_per_step_median": statistics.median(clock[WARM:]),
        "seconds_of_all_steps": sum(clock[WARM:]),
        "first_step_seconds": clock[0],
        "peak_bytes": peak,
        "trainable_bytes": trainable,
        "steps": len(clock) - WARM,
        "published": PUBLISHED.get(name),
    }
