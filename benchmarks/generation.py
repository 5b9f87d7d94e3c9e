"""Claim: batched generation is at least 8 times as fast as one prompt at a time, with the same answers.

On the embedded world model and its test prompts, one thread, alternating in one run; medians of the pairs.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import torch
from _record import save

from holdfast import data, world
from holdfast.data.prompts import render
from holdfast.evaluation.generate import generate
from holdfast.weights.model import load_model, load_tokenizer

ROUNDS = 5
NEW_TOKENS = {"harmful": 48, "task": 16, "benign": 48}


def main() -> None:
    torch.set_num_threads(1)
    model, tokenizer = load_model(world.MODEL), load_tokenizer(world.MODEL)
    rows = data.test_rows(task="world", harmful="world", benign="world", prompts=150, task_size=100).rows
    prompts = [{**row, "prompt": render(row, tokenizer, "chat")[0]} for row in rows]

    def timed(batch_tokens: int) -> tuple[float, dict[str, str]]:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            answers = generate(
                model, tokenizer, prompts, Path(folder) / "g.jsonl",
                max_new_tokens=NEW_TOKENS, batch_tokens=batch_tokens,
            )  # fmt: skip
            return time.perf_counter() - began, {row["id"]: row["answer"] for row in answers}

    timed(8192)
    pairs = []
    for _ in range(ROUNDS):
        (one, separate), (many, batched) = timed(1), timed(8192)
        pairs.append((one, many))
        same = sum(batched[key] == separate[key] for key in batched)
    save(
        "generation",
        {
            "claim": "at least 8 times one-at-a-time, same answers",
            "prompts": len(prompts),
            "same_answers": same,
            "ratio_median": statistics.median(one / many for one, many in pairs),
            "ratios": [one / many for one, many in pairs],
            "seconds_one_at_a_time_median": statistics.median(one for one, _ in pairs),
            "seconds_batched_median": statistics.median(many for _, many in pairs),
            "threads": 1,
        },
    )


if __name__ == "__main__":
    main()
