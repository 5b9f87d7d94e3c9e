"""The rows of `evaluation.py --gpu`: answers in batches beside one prompt at a time, and a SafetyProbe."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _gpu_models import base, device, with_lora, without_lora
from _rows import Rows
from evaluation import LORA, TimedProbe, one_at_a_time, ours
from transformers import GenerationConfig

from holdfast import data, get_defense, world
from holdfast.data.prompts import render
from holdfast.models.loading import load_tokenizer
from holdfast.registry import get

PROMPTS, ALONE, NEW = 200, 24, 48
"""Prompts of a batch, prompts that are answered one at a time, and new tokens of each answer."""
GOAL = 20
PROBE = {"steps": 100, "every": 50}
KEYWORD = {"path": None, "threshold": None, "max_length": None}


def measure(given: argparse.Namespace) -> None:
    """Measure the missing rows: the two ways of answering, a probe, then continuous batching."""
    add, trial = Rows("evaluation", given), given.trial
    case = {"prompts": 6, "alone": 2, "new": 4} if trial else {"prompts": PROMPTS, "alone": ALONE, "new": NEW}
    held: dict[str, Any] = {}

    def model() -> Any:
        if "model" not in held:
            words = len(load_tokenizer(world.MODEL))
            # with a spread of 0.02, every answer repeats one token
            held["model"] = base("llama-2-7b", "bfloat16", trial, vocab_size=words, initializer_range=0.1)
            held["model"].eval()
        return held["model"]

    place = ("evaluation", "llama-2-7b, cuda")
    add((*place, "one at a time"), lambda: alone(model(), case))
    add((*place, "batches"), lambda: batches(model(), case))
    steps = {"steps": 4, "every": 2} if trial else PROBE
    add(("probe on a GPU", "llama-2-7b"), lambda: probe(model(), steps, 16 if trial else 64))
    add((*place, "continuous batching"), lambda: continuous(model(), case))


def asked(number: int) -> list[dict[str, Any]]:
    """Rendered harmful prompts of the embedded world."""
    tokenizer = load_tokenizer(world.MODEL)
    rows = [row for row in data.test_rows(harmful="world", prompts=number).rows if row["set"] == "harmful"]
    return [{**row, "prompt": render(row, tokenizer, "chat")[0]} for row in rows]


def alone(model: Any, case: dict[str, int]) -> dict[str, Any]:
    """`model.generate` for each prompt, and the judge for each answer, as in the reference code."""
    tokenizer, judge = load_tokenizer(world.MODEL), get("judges", "keyword").load(**KEYWORD)
    rows, room = asked(case["alone"]), {"harmful": case["new"]}
    one_at_a_time(model, tokenizer, judge, rows[:1], room)
    began = time.perf_counter()
    one_at_a_time(model, tokenizer, judge, rows, room)
    return _speed(began, len(rows), case)


def batches(model: Any, case: dict[str, int]) -> dict[str, Any]:
    """The steps of a run, with all prompts."""
    tokenizer, judge = load_tokenizer(world.MODEL), get("judges", "keyword").load(**KEYWORD)
    rows, room = asked(case["prompts"]), {"harmful": case["new"]}
    ours(model, tokenizer, judge, rows[:2], room)
    began = time.perf_counter()
    ours(model, tokenizer, judge, rows, room)
    return _speed(began, len(rows), case) | {"goal over one at a time": GOAL}


def continuous(model: Any, case: dict[str, int]) -> dict[str, Any]:
    """The same prompts through transformers' continuous batching."""
    tokenizer = load_tokenizer(world.MODEL)
    ids = [tokenizer(r["prompt"], add_special_tokens=False)["input_ids"] for r in asked(case["prompts"])]
    config = GenerationConfig(
        max_new_tokens=case["new"], do_sample=False, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    began = time.perf_counter()
    found = model.generate_batch(inputs=ids, generation_config=config)
    answered = sum(bool(one.generated_tokens) for one in found.values())
    return _speed(began, len(ids), case) | {"answered": answered, "with start-up": True}


def _speed(began: float, prompts: int, case: dict[str, int]) -> dict[str, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {
        "prompts": prompts,
        "new_tokens": case["new"],
        "seconds": seconds,
        "seconds_per_prompt": seconds / prompts,
    }


def probe(model: Any, steps: dict[str, int], length: int) -> dict[str, Any]:
    """The share of a training's time that a SafetyProbe with default settings takes."""
    tokenizer, method = load_tokenizer(world.MODEL), get_defense("sft")
    assert method.config is not None
    assert method.trainer is not None
    watcher = TimedProbe([row["instruction"] for row in asked(150)], every=steps["every"])
    model = with_lora(model, LORA)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, len(tokenizer), (40, length), generator=generator).tolist()
    train = [
        {"input_ids": x, "attention_mask": [1] * length, "labels": [-100] * (length - 2) + x[-2:]}
        for x in ids
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = method.config(
            output_dir=str(Path(folder)), use_cpu=device() == "cpu", max_steps=steps["steps"],
            report_to="none", disable_tqdm=True, per_device_train_batch_size=5, learning_rate=1e-5,
            logging_steps=10, save_strategy="no", bf16=device() == "cuda",
        )  # fmt: skip
        made = method.trainer(
            model=model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=[watcher]
        )
        began = time.perf_counter()
        made.train()
        seconds = time.perf_counter() - began
    without_lora(model).eval()
    return {
        "steps": steps["steps"],
        "measurements": len(watcher.history),
        "seconds": seconds,
        "probe_seconds": watcher.seconds,
        "own_time_over_the_rest": watcher.seconds / (seconds - watcher.seconds),
    }
