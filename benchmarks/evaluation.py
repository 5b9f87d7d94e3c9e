"""Claim: evaluation is at least 8 times as fast as one prompt at a time with a judge called for each answer.

The answers and verdicts are the same. Measured on the embedded world model and on a Llama of about 100
million parameters with random weights, on the CPU and, if there is one, on a GPU; both ways take turns in one
run. `--gpu` measures only Llama-2-7B's shapes, row by row, and merges each row into the results.

Also measured: the judge alone (no goal), and the time that a SafetyProbe with default settings adds to a
training as long as the packaged recipe's (goal: at most 5 %; the trained weights must not change). The
probe's cost is measured in two ways: training with and without it in turns, which other work on the machine
disturbs, and the probe's own seconds divided by the rest of the training, which other work hardly disturbs.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _judging import judge_speed
from _record import RESULTS, save
from _rows import arguments as add_options
from transformers import LlamaConfig, LlamaForCausalLM

from holdfast import SafetyProbe, data, get_defense, world
from holdfast.data.prompts import render
from holdfast.evaluation.answering import answer_prompts
from holdfast.evaluation.judges import LoadedJudge
from holdfast.evaluation.moderation import give_verdicts
from holdfast.machine.files import read_json
from holdfast.models.loading import load_model, load_tokenizer
from holdfast.models.lora import add_lora
from holdfast.registry import get

CORES = torch.get_num_threads()
GOAL, PROBE_GOAL = 8, 1.05
CASES: dict[str, dict[str, Any]] = {
    "world": {"harmful": 150, "task": 100, "new_tokens": {"harmful": 48, "task": 16}, "rounds": 3},
    "llama-100m": {"harmful": 48, "task": 0, "new_tokens": {"harmful": 32}, "rounds": 3},
}
PROBE = {"steps": 500, "rounds": 5}
LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}

Answers = dict[str, tuple[str, str | None]]
"""By the row's id: the answer, and the verdict if the prompt is harmful."""


def build(name: str, device: str) -> Any:
    """The embedded model, or random weights in a Llama's shape, with the embedded tokenizer."""
    if name == "world":
        return load_model(world.MODEL, device=device)
    tokenizer = load_tokenizer(world.MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=768, intermediate_size=2560, num_hidden_layers=12,
        num_attention_heads=12, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,  # with 0.02, every answer repeats one token
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device).eval()


def one_at_a_time(
    model: Any, tokenizer: Any, judge: LoadedJudge, rows: Sequence[Any], room: dict[str, int]
) -> Answers:
    """As in the reference implementations: `model.generate` for each prompt, the judge for each answer."""
    found: Answers = {}
    for row in rows:
        given = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=given["input_ids"], attention_mask=given["attention_mask"],
                max_new_tokens=room[row["set"]], do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
        new = output[0, given["input_ids"].shape[1] :]
        answer = tokenizer.decode(new, skip_special_tokens=True).strip()
        verdict = judge([row["instruction"]], [answer])[0].verdict if row["set"] == "harmful" else None
        found[row["id"]] = answer, verdict
    return found


def ours(
    model: Any, tokenizer: Any, judge: LoadedJudge, rows: Sequence[Any], room: dict[str, int]
) -> Answers:
    """The steps of a run, including its files."""
    with tempfile.TemporaryDirectory() as folder:
        answers = answer_prompts(model, tokenizer, rows, Path(folder) / "g.jsonl", max_new_tokens=room)
        verdicts = give_verdicts(answers, judge, Path(folder) / "v.jsonl")
    judged = {row["id"]: row["verdict"] for row in verdicts}
    return {row["id"]: (row["answer"], judged.get(row["id"])) for row in answers}


def throughput(name: str, device: str, case: dict[str, Any]) -> dict[str, Any]:
    """Time both ways in turns; return medians, their ratio, and the number of equal answers and verdicts."""
    # As in a run: one thread for a small model, all cores for a larger one.
    torch.set_num_threads(1 if name == "world" else CORES)
    model, tokenizer = build(name, device), load_tokenizer(world.MODEL)
    judge = world_judge(device)
    sets = {"task": "world", "task_size": case["task"]} if case["task"] else {}
    asked = data.test_rows(harmful="world", prompts=case["harmful"], **sets).rows
    asked = [row for row in asked if row["set"] in case["new_tokens"]]
    rows = [{**row, "prompt": render(row, tokenizer, "chat")[0]} for row in asked]

    def timed(way: Any) -> tuple[float, Answers]:
        began = time.perf_counter()
        found = way(model, tokenizer, judge, rows, case["new_tokens"])
        return time.perf_counter() - began, found

    for way in (one_at_a_time, ours):  # warm-up
        way(model, tokenizer, judge, rows[:1], case["new_tokens"])
    pairs = []
    for _ in range(case["rounds"]):
        (one, separate), (many, batched) = timed(one_at_a_time), timed(ours)
        pairs.append((one, many))
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "prompts": len(rows),
        "new_tokens": case["new_tokens"],
        "judge": judge.stamp,
        "same_answers": sum(batched[key][0] == separate[key][0] for key in batched),
        "same_verdicts": sum(batched[key][1] == separate[key][1] for key in batched),
        "ratio_median": statistics.median(one / many for one, many in pairs),
        "ratios": [one / many for one, many in pairs],
        "goal": GOAL,
        "seconds_one_at_a_time_median": statistics.median(one for one, _ in pairs),
        "seconds_ours_median": statistics.median(many for _, many in pairs),
    }


def world_judge(device: str = "cpu") -> LoadedJudge:
    """Load the embedded judge, which has beaver-dam's format."""
    return get("judges", "beaver_dam").load(path="world", threshold=None, max_length=None, device=device)


def judging(prompts: int, rounds: int) -> dict[str, Any]:
    """Measure the embedded judge on the answers of the world's harmful rows."""
    torch.set_num_threads(1)
    rows = data.to_rows(data.read_records("world", role="harmful"), role="harmful")[:prompts]
    return judge_speed(world_judge(), [r["instruction"] for r in rows], [r["output"] for r in rows], rounds)


class TimedProbe(SafetyProbe):
    """A SafetyProbe that records its own seconds."""

    seconds = 0.0

    def _measure(self, *args: Any, **kwargs: Any) -> None:
        began = time.perf_counter()
        super()._measure(*args, **kwargs)
        self.seconds += time.perf_counter() - began


def probe(steps: int, rounds: int) -> dict[str, Any]:
    """Train the world model with and without a SafetyProbe with default settings, in turns."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(world.MODEL)
    user = data.user_rows(task="world", harmful="world", size=1000, poison_ratio=0.1, seed=0).rows
    train = [dict(zip(("prompt", "completion"), render(row, tokenizer, "chat"), strict=True)) for row in user]
    asked = data.test_rows(harmful="world", prompts=150).rows
    prompts = [row["instruction"] for row in asked if row["set"] == "harmful"]

    def timed(callbacks: list[Any]) -> tuple[float, list[torch.Tensor]]:
        torch.manual_seed(0)
        model, method = add_lora(load_model(world.MODEL), LORA, "world"), get_defense("sft")
        assert method.config is not None
        assert method.trainer is not None
        with tempfile.TemporaryDirectory() as folder:
            config = method.config(
                output_dir=folder, use_cpu=True, max_steps=steps, report_to="none", disable_tqdm=True,
                per_device_train_batch_size=10, learning_rate=3e-4, logging_steps=10, save_strategy="no",
            )  # fmt: skip
            trainer = method.trainer(
                model=model, args=config, train_dataset=train, processing_class=tokenizer, callbacks=callbacks
            )
            began = time.perf_counter()
            trainer.train()
            seconds = time.perf_counter() - began
        return seconds, [p.detach().clone() for p in model.parameters() if p.requires_grad]

    pairs, own, same, measured = [], [], True, 0
    for turn in range(rounds):
        watcher = TimedProbe(prompts)
        first, second = ([], [watcher]) if turn % 2 == 0 else ([watcher], [])
        times = {bool(callbacks): timed(callbacks) for callbacks in (first, second)}
        pairs.append((times[True][0], times[False][0]))
        own.append(watcher.seconds / (times[True][0] - watcher.seconds))
        same &= all(torch.equal(a, b) for a, b in zip(times[True][1], times[False][1], strict=True))
        measured = len(watcher.history)
    return {
        "steps": steps,
        "measurements": measured,
        "same_weights": same,
        "own_time_over_the_rest_median": statistics.median(own),
        "own_times_over_the_rest": own,
        "ratio_median": statistics.median(a / b for a, b in pairs),
        "ratios": [a / b for a, b in pairs],
        "goal": PROBE_GOAL,
        "seconds_without_median": statistics.median(b for _, b in pairs),
    }


def measure(cases: dict[str, dict[str, Any]], watched: dict[str, int], judged: int = 200) -> dict[str, Any]:
    """Measure everything, on every available device."""
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found: dict[str, Any] = {
        f"{name}, {device}": throughput(name, device, case)
        for name, case in cases.items()
        for device in devices
    }
    if "cuda" not in devices:
        found["cuda"] = {"not measured": "no GPU"}
    return {
        "claim": f"at least {GOAL} times one prompt at a time, same answers; a probe costs at most 5 %",
        "evaluation": found,
        "judge": judging(judged, 5),
        "probe": probe(**watched),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.gpu:
        from _gpu_evaluation import measure as measure_on_gpu

        measure_on_gpu(arguments)
        return
    place = RESULTS / "evaluation.json"
    earlier = read_json(place) if place.is_file() else {}
    found = measure(CASES, PROBE)
    kept = {k: v for k, v in earlier.get("evaluation", {}).items() if k == "llama-2-7b, cuda"}
    found["evaluation"] |= kept
    save("evaluation", found | {k: v for k, v in earlier.items() if k == "probe on a GPU"})


if __name__ == "__main__":
    main()
