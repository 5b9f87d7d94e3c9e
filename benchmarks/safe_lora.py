"""Claim: repairing a 7B adapter takes at most 1/20 of the time of the dense arithmetic, at most 3 times the
time of reading the two models, and less than 900 MB of memory, for any number of layers.

The benchmark creates a pair of models in Llama-2-7B's shapes (random bf16 weights, four shards each, target
modules only) and an adapter of rank 8. These are measured in turns, and medians are kept:
- the whole command in its own process, including start-up;
- V V^T B / ||V||_F with the d x d product of the formula, in torch on all cores: arithmetic only, for two
  modules, times the number of modules (an extrapolation);
- two plain reads of the same weight files from the page cache: each file completely into memory
  (`read_bytes`), and through a buffer of 1 MiB that stays in the processor's cache (no program that uses the
  values can be as fast).

`--gpu` measures only `--device cuda` beside the CPU on the 7B pair, and merges the row into the results.

Needs 7 GB of disk under TMPDIR, 5 GB of free memory for the page cache, and 3 to 5 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from _record import RESULTS, save
from _rows import Rows
from _rows import arguments as add_options

ROUNDS = 3
SHARDS = 4
RANK = 8
PROJECTED = 0.11
"""Share of the modules that is projected, as in the paper for Llama-2 7B Chat."""
GOALS = {"dense_over_command": 20, "command_over_read": 3, "peak_resident_bytes": 900_000_000}
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
LLAMA_2_7B = dict.fromkeys(ATTENTION, (4096, 4096))
LLAMA_2_7B_ALL = {f"self_attn.{x}_proj": (4096, 4096) for x in "qkvo"} | {
    "mlp.gate_proj": (11_008, 4096), "mlp.up_proj": (11_008, 4096), "mlp.down_proj": (4096, 11_008),
}  # fmt: skip
LLAMA_2_70B = {"self_attn.q_proj": (8192, 8192), "self_attn.v_proj": (1024, 8192)}
LAYERS_OF_70B = 80
ON_GPU = "llama-2-7b, q and v, --device cuda"
Shapes = dict[str, tuple[int, int]]

MEASURED = """
import atexit, json, re, runpy, sys, time
place = sys.argv.pop()
def note():
    status, io = (open(f"/proc/self/{name}").read() for name in ("status", "io"))
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024
    read = int(re.search(r"rchar: (\\d+)", io)[1])
    cpu = time.process_time()
    json.dump({"peak_resident_bytes": peak, "bytes_read": read, "cpu_seconds": cpu}, open(place, "w"))
atexit.register(note)
runpy.run_module("holdfast", run_name="__main__", alter_sys=True)
"""
"""`python -m holdfast` that records its own peak memory and bytes read when it ends. Measured from a parent
process, the peak would be at least the parent's own."""


def make_pair(folder: Path, shapes: Shapes, layers: int) -> Path:
    """Write `base`, `aligned` and `adapter` to `folder`; all modules use the same noise, shifted."""
    random = np.random.default_rng(0)
    most = max(math.prod(shape) for shape in shapes.values())
    noise = random.standard_normal(most, dtype=np.float32) * 0.02
    step = random.standard_normal(most, dtype=np.float32) * 0.001
    names = [(f"model.layers.{i}.{kind}", kind) for i in range(layers) for kind in shapes]
    for model, values in (("base", noise), ("aligned", noise + step)):
        bits = ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype(np.uint16)
        (folder / model).mkdir(parents=True)
        places = {}
        for shard in range(SHARDS):
            part = names[shard * len(names) // SHARDS : (shard + 1) * len(names) // SHARDS]
            file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
            tensors = {
                f"{name}.weight": ("BF16", shapes[kind], np.roll(bits[: math.prod(shapes[kind])], 4099 * i))
                for i, (name, kind) in enumerate(part)
            }
            write_tensors(folder / model / file, tensors)
            places |= {f"{name}.weight": file for name, _ in part}
        write(folder / model / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
        write(folder / model / "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    factors = {}
    for name, kind in names:
        out, inner = shapes[kind]
        for factor, shape in (("A", (RANK, inner)), ("B", (out, RANK))):
            values = random.standard_normal(shape, dtype=np.float32) * 0.01
            factors[f"base_model.model.{name}.lora_{factor}.weight"] = ("F32", shape, values)
    (folder / "adapter").mkdir()
    write_tensors(folder / "adapter" / "adapter_model.safetensors", factors)
    kinds = [kind.rsplit(".", 1)[-1] for kind in shapes]
    write(
        folder / "adapter" / "adapter_config.json",
        {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 4, "target_modules": kinds},
    )
    return folder


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_tensors(path: Path, tensors: dict[str, tuple[str, tuple[int, ...], np.ndarray]]) -> None:
    """Write a safetensors file, tensor by tensor."""
    header, end = {}, 0
    for name, (dtype, shape, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + values.nbytes)}
        end += values.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, values in tensors.values():
            file.write(values.tobytes())


def weight_files(folder: Path) -> list[Path]:
    return sorted(p for model in ("base", "aligned") for p in (folder / model).glob("*.safetensors"))


def read_through(folder: Path) -> float:
    """Seconds to read both models' weight files through one buffer."""
    buffer = memoryview(bytearray(2**20))
    began = time.perf_counter()
    for path in weight_files(folder):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - began


def read_whole(folder: Path) -> float:
    """Seconds to read both models' weight files into memory, one file at a time."""
    began = time.perf_counter()
    for path in weight_files(folder):
        path.read_bytes()
    return time.perf_counter() - began


def command(folder: Path, modules: int, device: str = "cpu") -> dict[str, float]:
    """Run `holdfast safe-lora` on the pair like a user: seconds, peak resident bytes, bytes read."""
    out, notes = folder / "out", folder / "notes.json"
    shutil.rmtree(out, ignore_errors=True)
    arguments = [
        "safe-lora", f"{folder}/adapter", "--base", f"{folder}/base", "--aligned", f"{folder}/aligned",
        "--out", str(out), "--num-layers", str(modules), "--device", device, str(notes),
    ]  # fmt: skip
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment()
    )
    return {"seconds": time.perf_counter() - began, **json.loads(notes.read_text(encoding="utf-8"))}


def environment() -> dict[str, str]:
    """The environment without settings of thread numbers, because users do not set them."""
    return {key: value for key, value in os.environ.items() if not key.endswith("_NUM_THREADS")}


def dense(folder: Path, modules: int = 2) -> float:
    """Seconds of arithmetic for one module, measured in a separate process."""
    done = subprocess.run(
        [sys.executable, __file__, "--dense", str(folder), str(modules)],
        check=True, capture_output=True, text=True, env=environment(),
    )  # fmt: skip
    return float(done.stdout)


def dense_seconds(folder: Path, modules: int) -> float:
    """Seconds to compute V V^T / ||V||_F as a d x d matrix, times B; the median over the first modules."""
    import torch
    from safetensors import safe_open

    first = [safe_open(folder / m / weight_files(folder)[0].name, "pt") for m in ("base", "aligned")]
    times = []
    for name in sorted(first[0].keys())[: modules + 1]:  # the first module is a warm-up
        base, aligned = (file.get_tensor(name) for file in first)
        update = torch.randn(base.shape[0], RANK)
        began = time.perf_counter()
        v = aligned.float() - base.float()
        (v @ v.T / v.norm()) @ update
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def measure(shapes: Shapes, layers: int, with_dense: bool = False) -> dict[str, Any]:
    """Medians over the rounds; each round measures everything once."""
    modules = layers * len(shapes)
    chosen = round(PROJECTED * modules)
    with tempfile.TemporaryDirectory(prefix="safe-lora-") as name:
        folder = make_pair(Path(name), shapes, layers)
        command(folder, chosen)  # fills the page cache
        runs, whole, through, products = [], [], [], []
        for _ in range(ROUNDS):
            runs.append(command(folder, chosen))
            whole.append(read_whole(folder))
            through.append(read_through(folder))
            products.append(dense(folder) if with_dense else 0.0)
        size = sum(p.stat().st_size for p in weight_files(folder))
    seconds = statistics.median(run["seconds"] for run in runs)
    found = {
        "layers": layers,
        "modules": modules,
        "projected": chosen,
        "weight_bytes": size,
        "command_seconds": seconds,
        "command_seconds_all": [run["seconds"] for run in runs],
        "command_cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "peak_resident_bytes": max(run["peak_resident_bytes"] for run in runs),
        "bytes_read": max(run["bytes_read"] for run in runs),
        "read_seconds": statistics.median(whole),
        "read_seconds_all": whole,
        "command_over_read": seconds / statistics.median(whole),
        "read_through_one_buffer_seconds": statistics.median(through),
        "command_over_read_through_one_buffer": seconds / statistics.median(through),
    }
    if with_dense:
        arithmetic = statistics.median(products) * modules
        found |= {
            "dense_seconds_per_module_all": products,
            "dense_seconds_extrapolated": arithmetic,
            "dense_over_command": arithmetic / seconds,
        }
    return found


def on_gpu(given: argparse.Namespace) -> None:
    """Measure the command with --device cuda and on the CPU of the same machine, in turns."""

    def row() -> dict[str, Any]:
        shapes = dict.fromkeys(ATTENTION, (64, 64)) if given.trial else LLAMA_2_7B
        layers, device = (2, "cpu") if given.trial else (32, "cuda")
        chosen = max(1, round(PROJECTED * layers * len(shapes)))
        with tempfile.TemporaryDirectory(prefix="safe-lora-") as name:
            folder = make_pair(Path(name), shapes, layers)
            command(folder, chosen)
            pairs = [(command(folder, chosen, device), command(folder, chosen)) for _ in range(ROUNDS)]
        found: dict[str, Any] = {"modules": layers * len(shapes), "projected": chosen, "rounds": ROUNDS}
        for place, runs in zip(("cuda", "cpu"), zip(*pairs, strict=True), strict=True):
            found[f"command_seconds_{place}"] = statistics.median(run["seconds"] for run in runs)
            found[f"command_seconds_{place}_all"] = [run["seconds"] for run in runs]
            found[f"peak_resident_bytes_{place}"] = max(run["peak_resident_bytes"] for run in runs)
        return found

    Rows("safe_lora", given)(("cases", ON_GPU), row)


def of_70b(small: dict[str, Any], measured_7b: dict[str, Any]) -> dict[str, Any]:
    """Estimates for 80 layers: from several runs of a few layers, and from the 7B run's seconds per byte."""
    times = LAYERS_OF_70B / small["layers"]
    return {
        "how": "estimated: the run with few layers, including start-up, multiplied; and the 7B run by bytes",
        "weight_bytes": small["weight_bytes"] * times,
        "command_seconds_at_most": small["command_seconds"] * times,
        "command_seconds_by_bytes": measured_7b["command_seconds"]
        * small["weight_bytes"] * times / measured_7b["weight_bytes"],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dense", nargs=2, metavar=("FOLDER", "MODULES"), help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="only 8 layers of the 7B pair; nothing is saved")
    parser.add_argument("--note", help="a note to save with the numbers, such as other work on the machine")
    add_options(parser)
    arguments = parser.parse_args()
    if arguments.gpu:
        on_gpu(arguments)
        return
    if arguments.dense:
        print(dense_seconds(Path(arguments.dense[0]), int(arguments.dense[1])))
        return
    place = RESULTS / "safe_lora.json"
    earlier = json.loads(place.read_text(encoding="utf-8"))["cases"] if place.is_file() else {}
    few = measure(LLAMA_2_7B, 8, with_dense=arguments.quick)
    if arguments.quick:
        print(json.dumps(few, indent=1))
        return
    many = measure(LLAMA_2_7B, 32, with_dense=True)
    every = measure(LLAMA_2_7B_ALL, 4)
    large = measure(LLAMA_2_70B, 4)
    save(
        "safe_lora",
        {
            "claim": GOALS,
            "rank": RANK,
            "rounds": ROUNDS,
            "note": arguments.note,
            "cases": {
                "llama-2-7b, q and v": many,
                "llama-2-7b, q and v, 8 of 32 layers": few,
                "llama-2-7b, all 7 targets, 4 of 32 layers": every,
                "llama-2-70b, q and v, 4 of 80 layers": large,
                "llama-2-70b, q and v, 80 layers": of_70b(large, many),
                ON_GPU: earlier.get(ON_GPU, {"not measured": "no GPU"}),
            },
        },
    )


if __name__ == "__main__":
    main()
