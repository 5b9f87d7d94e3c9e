"""Claim: a step of Lisa takes at most 1.02 times as long as a step of SFT; of BSO 1.01; of EWC 1.05.

Lisa needs the memory of SFT plus one copy of the trainable weights. A step of SFT takes at most 1.05 times
as long as a step of a plain `transformers.Trainer`.

Every method uses the same Trainer, model and rows of one length, in one run: the methods take turns, and each
round gives one ratio to that round's SFT. `--gpu` measures only Llama-2-7B's shapes (random weights) on a
CUDA device, with a plain `transformers.Trainer` beside the methods, and merges each run into the results.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from typing import Any

import torch
from _memory import peak_live_bytes
from _record import RESULTS, save
from _rows import arguments as add_options
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from holdfast import get_defense, world
from holdfast.machine.files import read_json, write_json
from holdfast.models.loading import load_model
from holdfast.models.lora import add_lora

LORA = {"r": 8, "alpha": 4, "dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
PHASES = {"alignment_steps": 5, "finetune_steps": 10}  # the paper's 100 and 900 would switch less often
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "bso": PHASES,
    "lisa": {**PHASES, "rho": 1.0, "proximal_warmup_ratio": 0.0},
    "ewc": {"lambda_": 0.001, "fisher_rows": 20},
}
PLAIN = "plain transformers.Trainer"
PLAIN_GOAL = 1.05
"""SFT takes at most this many times the step time of the plain Trainer."""
GOALS = {"bso": 1.01, "lisa": 1.02, "ewc": 1.05}
PUBLISHED = {  # Lisa, arXiv 2405.18641, Table 7: seconds per 1000 steps and GB on an H100
    "sft": (115.53, 47.97),
    "bso": (119.22, 50.85),
    "lisa": (125.11, 51.11),
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-110m": {
        "vocab_size": 16_000, "hidden_size": 768, "intermediate_size": 2048,
        "num_hidden_layers": 12, "num_attention_heads": 12,
    },
    "llama-2-7b": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32,
    },
}  # fmt: skip
WARM = 3
"""First steps of a run, which are not counted: they allocate buffers, and EWC computes its Fisher."""


class Clock(TrainerCallback):
    """Seconds of each optimizer step, from the end of one to the end of the next: all of a method's work."""

    def __init__(self) -> None:
        self.steps: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _wait(args.device)
        now = time.perf_counter()
        self.steps.append(now - self.began)
        self.began = now


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def build(shape: str, device: str) -> Any:
    """Build the model with a new LoRA: the embedded model, or random weights in a Llama's shape."""
    torch.manual_seed(0)
    if shape == "world":
        model = load_model(world.MODEL, device=device)
    else:
        with torch.device(device):
            config = LlamaConfig(**SHAPES[shape], dtype=torch.bfloat16 if device == "cuda" else torch.float32)
            model = LlamaForCausalLM(config).to(config.dtype)
        model.requires_grad_(False)
    return add_lora(model, LORA, shape)


def rows(model: Any, number: int, length: int, seed: int) -> list[dict[str, list[int]]]:
    """Tokenised rows of one length with an answer of two tokens, as in SST-2."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, model.config.vocab_size, (number, length), generator=generator).tolist()
    return [
        {"input_ids": x, "attention_mask": [1] * length, "labels": [-100] * (length - 2) + x[-2:]}
        for x in ids
    ]


def train(name: str, model: Any, case: dict[str, Any], steps: int, folder: str, **changed: int) -> Clock:
    """Run a method; return the clock with the time of every step. `changed` overrides method settings."""
    if name == PLAIN:
        return plain(model, case, steps, folder)
    defense, clock = get_defense(name), Clock()
    settings = METHODS[name] | {key: value for key, value in changed.items() if key in METHODS[name]}
    need = {"alignment_dataset": rows(model, 40, case["length"], 2)} if defense.needs else {}
    assert defense.config is not None
    assert defense.trainer is not None
    config = defense.config(
        output_dir=folder, use_cpu=case["device"] == "cpu", max_steps=steps, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=case["batch"], learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=10, save_strategy="no", logging_nan_inf_filter=False, bf16=case["device"] == "cuda",
        **settings,
    )  # fmt: skip
    made = defense.trainer(model=model, args=config, train_dataset=rows(model, 40, case["length"], 1), **need)
    made.add_callback(clock)
    made.train()
    return clock


def plain(model: Any, case: dict[str, Any], steps: int, folder: str) -> Clock:
    """A `transformers.Trainer` of the same model, rows and arguments, without anything of Holdfast."""
    clock = Clock()
    arguments = TrainingArguments(
        output_dir=folder, use_cpu=case["device"] == "cpu", max_steps=steps, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=case["batch"], learning_rate=1e-5,
        lr_scheduler_type="constant", logging_steps=10, save_strategy="no", logging_nan_inf_filter=False,
        bf16=case["device"] == "cuda",
    )  # fmt: skip
    Trainer(
        model=model, args=arguments, train_dataset=rows(model, 40, case["length"], 1),
        data_collator=default_data_collator, callbacks=[clock],
    ).train()  # fmt: skip
    return clock


def timed(case: dict[str, Any], methods: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """The median step time of each method, and its ratio to SFT in each round."""
    model, step, total, first = build(case["shape"], case["device"]), {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        train("sft", model, case, WARM + 1, folder)
        for turn in range(rounds):
            for name in methods if turn % 2 == 0 else methods[::-1]:
                clock = train(name, model, case, steps, folder).steps
                first.setdefault(name, []).append(clock[0])
                step.setdefault(name, []).append(statistics.median(clock[WARM:]))
                total.setdefault(name, []).append(sum(clock[WARM:]))
    return {
        name: {
            "seconds_per_step_median": statistics.median(step[name]),
            "ratio_of_median_steps": _ratio(step, name),
            "ratio_of_all_steps": _ratio(total, name),
            "ratios_of_median_steps": [a / b for a, b in zip(step[name], step["sft"], strict=True)],
            "goal": GOALS.get(name),
            "first_step_seconds": statistics.median(first[name]),
        }
        for name in methods
    }


def _ratio(times: dict[str, list[float]], name: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times["sft"], strict=True))


def memory(case: dict[str, Any], methods: list[str]) -> dict[str, Any]:
    """Peak bytes of live tensors in four steps with switches, including weights.

    The excess over SFT is given in copies of the trainable weights.
    """
    peaks, trainable = {}, 0
    for name in methods:

        def work(name: str = name) -> None:
            nonlocal trainable
            model = build(case["shape"], case["device"])
            trainable = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
            with tempfile.TemporaryDirectory() as folder:
                train(name, model, case, 4, folder, alignment_steps=1, finetune_steps=1)

        gc.collect()
        if case["device"] == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            work()
            peaks[name] = torch.cuda.max_memory_allocated()
        else:
            peaks[name] = peak_live_bytes(work)
    return {
        name: {
            "peak_bytes": peak,
            "above_sft_in_copies_of_the_trainable_weights": (peak - peaks["sft"]) / trainable,
        }
        for name, peak in peaks.items()
    } | {"trainable_bytes": trainable}


def measure(case: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """Measure time and memory for one model."""
    methods = list(METHODS)
    return {
        "case": case,
        "rounds": rounds,
        "steps": steps,
        "time": timed(case, methods, rounds, steps),
        "beside_plain": beside_plain(case, rounds, steps),
        "memory": memory(case, methods),
    }


def beside_plain(case: dict[str, Any], rounds: int, steps: int) -> dict[str, Any]:
    """SFT and the plain Trainer in turns: step times, and SFT's ratio to the plain Trainer in each round."""
    times = timed(case, ["sft", PLAIN], rounds, steps)
    ratios = [1 / ratio for ratio in times[PLAIN]["ratios_of_median_steps"]]
    return {
        "rounds": rounds,
        "steps": steps,
        "seconds_per_step_median": {name: of["seconds_per_step_median"] for name, of in times.items()},
        "ratio_of_median_steps": statistics.median(ratios),
        "ratios_of_median_steps": ratios,
        "goal": PLAIN_GOAL,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--plain", action="store_true", help="only SFT beside the plain Trainer, on the CPU")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.gpu:
        from _gpu_training import measure as measure_on_gpu

        measure_on_gpu(arguments)
        return
    cases: dict[str, Any] = {
        "world": ({"shape": "world", "device": "cpu", "batch": 10, "length": 64}, arguments.rounds, 93),
        "llama-110m": (
            {"shape": "llama-110m", "device": "cpu", "batch": 5, "length": 64},
            arguments.rounds,
            18,
        ),
    }
    place = RESULTS / "training.json"
    if arguments.plain:
        held = read_json(place)
        for name, case in cases.items():
            held["cases"][name]["beside_plain"] = found = beside_plain(*case)
            print(name, found["seconds_per_step_median"], found["ratio_of_median_steps"], flush=True)
            write_json(place, held)
        return
    found = {name: measure(*case) for name, case in cases.items()}
    missing = {"not measured": "no GPU; run with --gpu", "published": PUBLISHED}
    earlier = read_json(place)["cases"] if place.is_file() else {}
    found["llama-2-7b"] = earlier.get("llama-2-7b", missing)
    save("training", {"claim": GOALS, "threads": 1, "cases": found})


if __name__ == "__main__":
    main()
