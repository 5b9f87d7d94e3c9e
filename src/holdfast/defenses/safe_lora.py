"""Safe LoRA: project the updates that differ from the direction from base to aligned (arXiv 2405.16833).

For each module with update dW, V = W_aligned - W_base and C = V V^T / ||V||_F (both out x in, C out x out):

    dW <- C dW   if   <dW, C dW>_F / (||dW||_F ||C dW||_F) < threshold

or for the `num_layers` modules with the smallest cosine. For LoRA, dW = scaling B A and only B changes:
B' = V (V^T B) / ||V||_F. No training, no data, no GPU; see `safe_lora_parts/projection.py` for the
arithmetic.

`projection` replaces C in the update (the gate is the cosine with C in every case, so that a threshold means
the same): "approx" is C; "exact" is V (V^T V)^-1 V^T, the orthogonal projector onto the column space of V,
which is the identity for a V of full row rank; "normalised" is the direction of C dW with the norm of dW.

Where we differ from the authors' code, and why: modules are matched by name, not by position; no matrix of
size out x out is built; cosines are not rounded, so that `num_layers` projects exactly that number; the gate
is `<` as in the paper, not `<=`.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from holdfast import __version__
from holdfast.defenses import Defense, Planned, Tuned
from holdfast.defenses.safe_lora_parts.config import SafeLoraConfig
from holdfast.defenses.safe_lora_parts.directions import modules_with_direction
from holdfast.defenses.safe_lora_parts.result import RECORD, SafeLoraResult
from holdfast.defenses.safe_lora_parts.updates import Sources, open_sources
from holdfast.defenses.safe_lora_parts.work import Work
from holdfast.errors import RecipeError
from holdfast.machine.files import write_json
from holdfast.weights.card import name_base
from holdfast.weights.writer import copy_beside, new_folder, overwrite


def safe_lora(
    adapter: str | Path,
    *,
    base: str | Path,
    aligned: str | Path,
    out: str | Path | None,
    threshold: float | str | None = None,
    num_layers: int | None = None,
    projection: str = "approx",
    control: str | None = None,
    seed: int = 42,
    device: str = "cpu",
    dtype: str = "float32",
    dry_run: bool = False,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SafeLoraResult:
    """Write a copy of `adapter` to `out` with its dissimilar updates projected. The sources do not change.

    Args:
        adapter: a PEFT LoRA folder or Hub id, or a folder of full fine-tuned weights (then the update is
            W_finetuned - W_aligned).
        base: the model before alignment, unquantised: a folder or Hub id.
        aligned: the model that was fine-tuned, or the folder of an alignment adapter on `base`.
        out: a new or empty folder, or an earlier result, which is replaced.
        device: "cpu", or a torch device ("cuda") for the products with V.
        dtype: dtype of the products, "float32" or "float64".
        dry_run: only measure; `out` may be None, and the gate may be missing.
        workers: threads over modules. Meanwhile numpy's BLAS has one thread, except for dense products.
        progress: called with the number of modules done and the number of all modules.

    Raises:
        RecipeError: an option is not valid.
        ModelError: a source cannot be used; see `weights/`.
        OutputError: `out` cannot be written, or overlaps a source.
    """
    config = checked(threshold, num_layers, projection, control, seed, dtype, gate=not dry_run)
    if out is None and not dry_run:
        raise RecipeError("Safe LoRA: give out, the folder to write to, or ask for a dry run.")
    with open_sources(adapter, base, aligned) as sources:
        written: Any = (
            nullcontext() if dry_run else new_folder(Path(out or ""), sources.folders.values(), RECORD)
        )
        options = {
            "kind": "full weights" if sources.full else "adapter",
            "threshold": threshold, "num_layers": num_layers, "projection": projection, "control": control,
            "seed": seed, "device": device, "dtype": dtype,
        }  # fmt: skip
        given = {"adapter": adapter, "base": base, "aligned": aligned}
        facts = _facts(given, sources.fingerprints)
        with written as copy:
            if copy is not None:
                _copy_adapter(sources, copy)
            write = None if copy is None else partial(overwrite, copy)
            work = Work(
                sources, config, write, device, dtype, workers, progress or (lambda done, total: None)
            )
            modules, chosen, notes = work.run()
            result = SafeLoraResult(
                None if dry_run else Path(out or ""), modules, options | chosen, facts, notes,
                sources.left_alone, versions(),
            )  # fmt: skip
            if copy is not None:
                write_json(copy / RECORD, result.to_json(), indent=2)
                (copy / "README.md").write_text(result.card(), encoding="utf-8", newline="\n")
    return result


def checked(
    threshold: float | str | None,
    num_layers: int | None,
    projection: str,
    control: str | None,
    seed: int,
    dtype: str,
    *,
    gate: bool = True,
) -> SafeLoraConfig:
    """Return the options as a config.

    Args:
        gate: whether a threshold or a number of layers is needed; a dry run needs none.

    Raises:
        RecipeError: an option is not valid, or missing.
    """
    try:
        config = SafeLoraConfig(threshold, num_layers, projection, control, seed)
    except ValueError as error:
        raise RecipeError(f"Safe LoRA: {error}.") from None
    if dtype not in ("float32", "float64"):
        raise RecipeError(f"Safe LoRA: dtype must be float32 or float64, found {dtype!r}.")
    if gate and threshold is None and num_layers is None:
        raise RecipeError("Safe LoRA: give threshold or num_layers; a dry run shows what each would project.")
    return config


def _copy_adapter(sources: Sources, copy: Path) -> None:
    copy_beside(sources.folder, copy, leave=[RECORD])
    if not sources.full:
        name_base(copy)
    for file in sources.files:
        shutil.copyfile(file.path, copy / file.path.name)


def _facts(given: Mapping[str, str | Path], fingerprints: Mapping[str, str]) -> dict[str, dict[str, str]]:
    return {role: {"path": str(path), "fingerprint": fingerprints[role]} for role, path in given.items()}


def versions() -> dict[str, str]:
    """Return the versions that a result records."""
    return {"holdfast": __version__, "python": platform.python_version(), "numpy": np.__version__}


def apply(tuned: Tuned, **parameters: Any) -> dict[str, Any]:
    """The post-hoc stage: adapter folder to adapter folder, or model folder to model folder."""
    assert tuned.base is not None
    assert tuned.aligned is not None
    result = safe_lora(tuned.source, base=tuned.base, aligned=tuned.aligned, out=tuned.out, **parameters)
    return {
        "modules": len(result.modules),
        "projected": len(result.projected),
        "share": result.share,
        "threshold": result.options["threshold"],
        "notes": list(result.notes),
    }


def check(planned: Planned, **parameters: Any) -> None:
    """Check before training that a repair is possible: the weights fit, and there are enough modules.

    Raises:
        RecipeError: nothing that the user stage trains has a direction.
        ValueError: `num_layers` is too large.
        ModelError: the weights of the base cannot be read, or are of another architecture.
    """
    SafeLoraConfig(**parameters).check_modules(len(modules_with_direction(planned)))


DEFENSE = Defense(
    name="safe_lora",
    label="Safe LoRA",
    stages=("post_hoc",),
    paper="arXiv 2405.16833",
    needs=("base", "aligned"),
    config=SafeLoraConfig,
    apply=apply,
    check=check,
    repairs=("new", "full"),
    one_of=("threshold", "num_layers"),
    controls=("control",),
    facts={
        "modules": "modules that have a direction",
        "projected": "modules whose update was projected",
        "share": "share of the modules that were projected",
        "threshold": "the largest cosine that was projected, as asked for or chosen",
        "notes": "remarks",
    },
    headline="{projected} of {modules} modules",
    strong={"threshold": 1.0},
    identity={"threshold": 0.0},
    # The paper's threshold for Llama-2-7B-Chat, and NLSR's (AAAI-25) for Llama-3-8B. There V is chat minus
    # base, here it is the alignment stage's LoRA: look at the cosines.
    protocols={
        "lisa-code": {"post_hoc": {"threshold": [0.35, 0.6], "control": ["none", "drop"]}},
        "safe-lora-llama-2": {"post_hoc": {"threshold": 0.35}},
        "safe-lora-llama-3": {"post_hoc": {"num_layers": 22}},
        "safe-lora-gemma": {"post_hoc": {"threshold": 0.35}},
        "safe-lora-code": {"post_hoc": {"num_layers": 10}},
        "medical-assistant": {"post_hoc": {"threshold": 0.35}},
        # A quarter of the 8 modules. More is safer, but costs accuracy at some seeds.
        "world": {"post_hoc": {"num_layers": 2}},
    },
)
