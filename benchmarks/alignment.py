"""Claim: aligning with T-Vaccine takes at most 1.05 times the memory of SFT.

Its time was to be 1.5 times SFT's; the arithmetic of two passes with checkpointing is 1.9 (docs/memory.md).
For 7B: at most 17 GB in bf16 (the weights alone are 13.5 GB) and 8 GB with NF4 weights, batch 10, length 200,
r = 8 on all linear layers. Vaccine takes 2 times the time of SFT (two passes). Memory is the peak of live
tensors, including weights; resident memory is reported too. Every method runs with the same model, rows and
design (non-reentrant checkpointing, no gradient at the embeddings, lean loss); `designs` adds the parts of
the design one by one.

On the CPU: a Llama of 110 M parameters, length reduced to 40, T-Vaccine with 3 of 12 layers (8 of 32 in the
paper). TAR attacks for 4 steps instead of 64; its time grows with this number, its memory does not. `--gpu`
measures only the shapes of Llama-2-7B, Qwen2-7B and Gemma-2-2B with random weights, row by row, and merges
each row into the results; without a GPU they are "not measured", and only `predicted_bytes` covers them.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import resource
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import torch
from _memory import held_bytes, peak_live_bytes
from _record import RESULTS, save
from _rows import arguments as add_options
from _rows import merged
from _shapes import SHAPES, build, predicted_bytes
from transformers import TrainerCallback

from holdfast import get_defense, registry
from holdfast.machine.files import read_json
from holdfast.training import trainer

TIMED = {"probability_steps": 200, "resample_steps": 1}
"""Each step draws other layers, so the median is over draws. Computing the probabilities is not timed."""
SEEN = {"probability_steps": 1, "resample_steps": 1}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "vaccine": {"rho": 2.0},
    "tvaccine": {"rho": 3.0, "probe_rows": 20},
    "repnoise": {},
    "tar": {"inner_steps": 4},
    "booster": {},
}
LEAN = {"checkpoint": True, "free": True, "lean": True}
DESIGNS: dict[str, dict[str, bool]] = {
    "plain": {"checkpoint": False, "free": False, "lean": False},
    "+ checkpointing": {"checkpoint": True, "free": False, "lean": False},
    "+ no gradient at the embeddings": {"checkpoint": True, "free": True, "lean": False},
    "+ lean loss": LEAN,
}
GOALS = {
    "peak over SFT's": {"tvaccine": 1.05},
    "step time over SFT's": {"tvaccine": 1.9, "vaccine": 2.0},
    "llama-2-7b, GB": {"bfloat16": 17, "nf4": 8},
}
CPU = {
    "shape": "llama-110m", "precision": "float32", "stored": "float32", "device": "cpu",
    "batch": 10, "length": 40,
}  # fmt: skip
GPU = {"stored": "bfloat16", "device": "cuda", "batch": 10, "length": 200}
COMPLETION = 0.5
STEPS = 3
"""Optimizer steps of a timed run; the first is not counted."""


class Clock(TrainerCallback):
    """Seconds from the end of one optimizer step to the end of the next, with work before a step begins."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.ends.append(_now(args.device))

    def steps(self) -> list[float]:
        """Seconds of all steps except the first."""
        return [after - before for before, after in pairwise(self.ends)]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def methods() -> list[str]:
    """The names in METHODS that are registered."""
    return [name for name in METHODS if name in registry.list_defenses("alignment")]


def rows(model: Any, case: dict[str, Any], seed: int) -> list[dict[str, list[int]]]:
    """Tokenised rows of one length; the second half of each is the completion."""
    generator, length = torch.Generator().manual_seed(seed), case["length"]
    start = round(length * (1 - COMPLETION))
    ids = torch.randint(4, model.config.vocab_size, (40, length), generator=generator).tolist()
    return [
        {"input_ids": x, "attention_mask": [1] * length, "labels": [-100] * start + x[start:]} for x in ids
    ]


def make_trainer(name: str, model: Any, case: dict[str, Any], design: dict[str, bool], steps: int,
                 folder: str, often: dict[str, int], **arguments: Any) -> Any:  # fmt: skip
    """Make a trainer of the method; `often` sets how often T-Vaccine computes probabilities and draws.

    `arguments` are more training arguments.
    """
    defense = get_defense(name)
    known = registry.faces("defenses")[name].parameters
    layers = round(model.config.num_hidden_layers / 4)
    settings = {**METHODS[name], **{k: v for k, v in often.items() if k in known}}
    if "num_layers" in known:
        settings["num_layers"] = layers
    need = {key: rows(model, case, 2) for key in defense.needs}
    assert defense.config is not None
    assert defense.trainer is not None
    config = defense.config(
        output_dir=folder, use_cpu=case["device"] == "cpu", max_steps=steps, report_to="none",
        disable_tqdm=True, per_device_train_batch_size=case["batch"], learning_rate=1e-3, save_strategy="no",
        logging_strategy="no", logging_nan_inf_filter=False, gradient_checkpointing=design["checkpoint"],
        gradient_checkpointing_kwargs={"use_reentrant": False}, lean_loss=design["lean"], **settings,
        **arguments,
    )  # fmt: skip
    return defense.trainer(model=model, args=config, train_dataset=rows(model, case, 1), **need)


def run(name: str, case: dict[str, Any], design: dict[str, bool], profile: bool) -> dict[str, Any]:
    """Run once; return the peak of live tensors (`profile`), or step times and resident memory."""
    if not design["free"]:
        trainer.free_inputs = lambda model: 0
    model = build(case["shape"], case["precision"], case["stored"], case["device"])
    with tempfile.TemporaryDirectory() as folder:
        made = make_trainer(
            name, model, case, design, 2 if profile else STEPS, folder, SEEN if profile else TIMED
        )
        clock = Clock()
        made.add_callback(clock)
        if case["device"] == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            made.train()
            return {"peak_bytes": torch.cuda.max_memory_allocated(), "seconds": clock.steps()}
        if profile:
            return {"peak_bytes": held_bytes(model) + peak_live_bytes(made.train)}
        made.train()
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"seconds": clock.steps(), "resident_bytes": resident}


def apart(*given: Any) -> dict[str, Any]:
    """Call `run` in a separate process, to measure its own resident memory; on a GPU, in this process."""
    if given[1]["device"] == "cuda":
        found = run(*given)
        trainer.free_inputs = FREE
        return found
    here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: there.send(run(*given)))
    child.start()
    there.close()
    found = here.recv()
    child.join()
    return found


FREE = trainer.free_inputs


def compare(case: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Every method with the leanest design: peak and step time, absolute and relative to SFT."""
    found: dict[str, Any] = {}
    for turn in range(rounds):
        for name in methods() if turn % 2 == 0 else methods()[::-1]:
            one = apart(name, case, LEAN, False)
            entry = found.setdefault(name, {"seconds": [], "resident_bytes": 0})
            entry["seconds"].append(statistics.median(one["seconds"]))
            entry["resident_bytes"] = max(entry["resident_bytes"], one.get("resident_bytes", 0))
            entry["peak_bytes"] = one.get("peak_bytes", 0)
    sft = list(found["sft"]["seconds"])
    if case["device"] == "cpu":
        for name, peak in zip(found, peaks([(name, case, LEAN) for name in found]), strict=True):
            found[name]["peak_bytes"] = peak
    for entry in found.values():
        ratios = [a / b for a, b in zip(entry["seconds"], sft, strict=True)]
        entry["seconds_per_step"] = statistics.median(entry.pop("seconds"))
        entry["step_time_over_sft"] = statistics.median(ratios)
    for entry in found.values():
        entry["peak_over_sft"] = entry["peak_bytes"] / found["sft"]["peak_bytes"]
    return found


def peaks(cases: list[tuple[Any, ...]]) -> list[int]:
    """Peak bytes of live tensors, two runs at a time: other work on the machine does not change them."""
    with ThreadPoolExecutor(2) as pool:
        return [one["peak_bytes"] for one in pool.map(lambda given: apart(*given, True), cases)]


def designs(case: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes of SFT and T-Vaccine while the parts of the design are added."""
    chosen = [name for name in ("sft", "tvaccine") if name in methods()]
    found = iter(peaks([(name, case, parts) for parts in DESIGNS.values() for name in chosen]))
    return {design: {name: next(found) for name in chosen} for design in DESIGNS}


def predictions(case: dict[str, Any], measured: dict[str, Any] | None = None) -> dict[str, Any]:
    """The predicted bytes of the methods that have a prediction, and their ratio to the measured bytes."""
    layers = SHAPES[case["shape"]]["num_hidden_layers"]
    size = case["shape"], case["precision"], case["stored"], case["batch"], case["length"], COMPLETION
    found: dict[str, Any] = {}
    for name, perturbed in {"sft": 0, "tvaccine": round(layers / 4), "vaccine": layers}.items():
        found[name] = predicted_bytes(*size, perturbed)
        if measured and name in measured:
            found[name]["predicted_over_measured"] = found[name]["total"] / measured[name]["peak_bytes"]
    return found


def cpu(rounds: int) -> dict[str, Any]:
    """Measure on the CPU: all methods in float32, the designs, and NF4 weights."""
    nf4 = {**CPU, "precision": "nf4"}
    methods_found = compare(CPU, rounds)
    chosen = [name for name in ("sft", "tvaccine") if name in methods()]
    found = peaks([(name, nf4, LEAN) for name in chosen])
    quantised = {name: {"peak_bytes": peak} for name, peak in zip(chosen, found, strict=True)}
    return {
        "case": CPU,
        "steps": STEPS,
        "rounds": rounds,
        "methods": methods_found,
        "designs_peak_bytes": designs(CPU),
        "nf4": quantised,
        "predicted": predictions(CPU, methods_found),
        "predicted_nf4": predictions(nf4, quantised),
    }


def predicted() -> dict[str, Any]:
    """The predictions for the three real shapes, in bf16 and NF4; the rows of --gpu stay as they are."""
    found: dict[str, Any] = {}
    for shape in ("llama-2-7b", "qwen2-7b", "gemma-2-2b"):
        for precision in ("bfloat16", "nf4"):
            case = {"shape": shape, "precision": precision, **GPU}
            found[f"{shape} {precision}"] = {
                "case": case,
                "methods": "not measured: no GPU; run with --gpu",
                "predicted": predictions(case),
            }
    place = RESULTS / "alignment.json"
    return merged(found, read_json(place)["gpu"]) if place.is_file() else found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.gpu:
        from _gpu_alignment import measure

        measure(arguments)
        return
    missing = [name for name in METHODS if name not in methods()]
    result = {"claim": GOALS, "threads": 1, "missing methods": missing, "cpu": cpu(arguments.rounds)}
    save("alignment", {**result, "gpu": predicted()})


if __name__ == "__main__":
    main()
