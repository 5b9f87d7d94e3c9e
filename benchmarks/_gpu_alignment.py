"""The rows of `alignment.py --gpu`: peak memory and step time of each method in the shapes of real models."""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

import torch
from _gpu_models import base, device, with_lora, without_lora
from _rows import Rows
from alignment import GPU, LEAN, TIMED, Clock, make_trainer, predictions, rows
from transformers import Trainer, TrainingArguments, default_data_collator

STEPS = 5
"""Optimizer steps of a timed run; the first is not counted."""
PLAIN = "plain transformers.Trainer"
ARGUMENTS: dict[str, dict[str, Any]] = {
    "autocast": {"bf16": True},
    "TF32": {"tf32": True},
    "compiled layers": {"torch_compile": True},
}
"""Training arguments of a variant of a method, as in "sft, TF32"."""
BY_LAYER = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
"""accelerate then compiles one decoder layer for all of them, instead of the whole model."""
VARIANTS = (
    "sft", PLAIN, "sft, autocast", "sft, TF32", "tvaccine", "tvaccine, autocast", "tvaccine, TF32",
)  # fmt: skip
ORDER: list[tuple[str, str, tuple[str, ...]]] = [
    ("llama-2-7b", "bfloat16", VARIANTS),
    ("llama-2-7b", "nf4", ("sft", "tvaccine", "vaccine", "booster", "repnoise", "tar")),
    ("qwen2-7b", "nf4", ("sft", "tvaccine")),
    ("llama-2-7b", "int8", ("sft", "tvaccine", "vaccine", "booster", "repnoise", "tar")),
    ("llama-2-7b", "bfloat16", ("vaccine", "booster", "repnoise", "tar")),
    ("qwen2-7b", "bfloat16", ("sft", "tvaccine")),
    ("gemma-2-2b", "bfloat16", ("sft", "tvaccine")),
    ("gemma-2-2b", "nf4", ("sft", "tvaccine")),
    ("llama-2-7b", "bfloat16", ("sft, compiled layers",)),
]
"""Shape, precision and methods; a model is built once for all its methods."""


def measure(given: argparse.Namespace) -> None:
    """Measure the missing rows in order."""
    add = Rows("alignment", given)
    size = {"batch": 2, "length": 16} if given.trial else {}
    for shape, precision, methods in ORDER:
        case = {"shape": shape, "precision": precision, **GPU, "device": device(), **size}
        model: list[Any] = []  # built when the first of its rows is measured
        for name in methods:
            path = ("gpu", f"{shape} {precision}", "methods", name)
            add(path, lambda name=name, case=case, model=model: one(name, case, model, given.trial))
        del model


def one(name: str, case: dict[str, Any], held: list[Any], trial: bool) -> dict[str, Any]:
    """Train a method for a few steps on the model in `held`; return peak memory and step time."""
    if not held:
        held.append(base(case["shape"], case["precision"], trial))
    model = with_lora(held[0])
    method, _, variant = name.partition(", ")
    os.environ[BY_LAYER] = "true"
    with tempfile.TemporaryDirectory() as folder:
        made = plain(model, case, folder) if name == PLAIN else make_trainer(
            method, model, case, LEAN, STEPS, folder, TIMED, **ARGUMENTS.get(variant, {})
        )  # fmt: skip
        clock = Clock()
        made.add_callback(clock)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        loss = made.train().training_loss
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    finite = all(bool(p.isfinite().all()) for p in model.parameters() if p.requires_grad)
    del made
    torch.set_float32_matmul_precision("highest")  # a variant may have changed it
    held[0] = without_lora(model)
    found = {
        "peak_bytes": peak,
        "seconds_per_step": statistics.median(clock.steps()),
        "seconds": clock.steps(),
        "training_loss": loss,
        "finite": finite,
        "batch": case["batch"],
        "length": case["length"],
    }
    if name in ("sft", "tvaccine", "vaccine") and case["precision"] != "int8" and not trial:
        predicted = predictions(case)[name]["total"]
        found |= {"predicted_bytes": predicted, "predicted_over_measured": predicted / peak}
    return found


def plain(model: Any, case: dict[str, Any], folder: str) -> Trainer:
    """A `transformers.Trainer` of the same model, rows and arguments, without anything of Holdfast."""
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=case["device"] == "cpu", max_steps=STEPS, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=case["batch"], learning_rate=1e-3, save_strategy="no",
        logging_strategy="no", logging_nan_inf_filter=False, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    return Trainer(
        model=model, args=arguments, train_dataset=rows(model, case, 1), data_collator=default_data_collator
    )
