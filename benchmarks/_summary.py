"""What the study on a real model keeps of the results of a run, and how results are merged."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from _study import Row

from holdfast.machine.files import read_json, write_json

SCORES = ("harmful_score", "finetune_accuracy", "benign_compliance", "over_refusal_rate", "gibberish_rate")


def summary(row: dict[str, Any]) -> dict[str, Any]:
    """The part of a row of results that is committed."""
    found = {key: row[key] for score in SCORES for key in (score, f"{score}_stderr")}
    found |= {key: row[key] for key in ("n_harmful", "n_task", "n_benign", "unparsed", "alignment", "user")}
    found["judges"] = {
        name: {key: judged[key] for key in ("harmful_score", "harmful_score_stderr", "n")}
        for name, judged in row["judges"].items()
    }
    if row["post_hoc"]:
        found |= {"post_hoc": row["post_hoc_parameters"], "repair": _plain(row["repair"])}
    costs = ("alignment_seconds", "seconds", "alignment_peak_memory_bytes", "peak_memory_bytes")
    return found | {key: row[key] for key in costs} | {"hardware": device_name()}


@functools.cache
def device_name() -> str:
    """The name of the GPU, or "CPU"."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def _plain(repair: dict[str, Any] | None) -> dict[str, Any]:
    """A repair's facts without long lists."""
    return {key: value for key, value in (repair or {}).items() if not isinstance(value, list | dict)}


def states(row: Row, results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The states of a row by key: the aligned model, the fine-tuned one, and repairs."""
    first, *after = results["rows"]
    if first["alignment"] is None:
        before = "the model as it is"
    else:
        method = row.method.split(" + ")[0] if first["alignment"] != "sft" else "SFT"
        before = f"aligned, {method}"
    found = {Row(before, row.seed, 0.0, row.task).key: _stated(first, row, before)}
    for state in after:
        method = row.method if state["post_hoc"] is None else _repaired(row.method, state)
        if state["post_hoc"] is None and len(after) > 1:  # the model that the row's last method repairs
            method = row.method.rpartition(" + ")[0]
        found[Row(method, row.seed, row.ratio, row.task).key] = _stated(state, row, method)
    return found


def _stated(state: dict[str, Any], row: Row, method: str) -> dict[str, Any]:
    place = {"task": row.task, "method": method, "seed": row.seed, "poison_ratio": row.ratio}
    return place | summary(state)


def _repaired(method: str, state: dict[str, Any]) -> str:
    """The name of a repaired model, with the parameters that a sweep changes."""
    given = state["post_hoc_parameters"]
    told = [f"{key}={given[key]:g}" for key in ("num_layers", "threshold") if given.get(key) is not None]
    control = given.get("control")
    told += [f"control={control}"] if control else []
    return ", ".join([method.removesuffix(", sweep").removesuffix(", thresholds"), *told])


def without_paths(protocol: dict[str, Any]) -> dict[str, Any]:
    """The protocol without values that are paths of this machine."""
    return {key: value for key, value in protocol.items() if "/" not in str(value) or key == "judge"}


def shown(name: str, found: dict[str, Any], seconds: float) -> None:
    """Print a line of the table."""
    judges = " ".join(f"{judge} {judged['harmful_score']:.1f}" for judge, judged in found["judges"].items())
    values = [found[key] for key in ("finetune_accuracy", "benign_compliance", "gibberish_rate")]
    text = " ".join(
        f"{word} {value:.1f}" for word, value in zip(("accuracy", "benign", "gibberish"), values, strict=True)
    )
    print(f"{name}: {judges} | {text} | {seconds:.0f} s", flush=True)


def merge(into: Path, part: Path) -> None:
    """Add the results in `part` to `into`; equal keys are taken from `part`.

    Raises:
        SystemExit: the two were measured with different settings.
    """
    old, new = read_json(into) if into.is_file() else {}, read_json(part)
    for stage, settings in new["chosen"].items():
        if old.get("chosen", {}).get(stage, settings) != settings:
            raise SystemExit(f"{part} was measured with other settings of the {stage} stage than {into}.")
    merged = {**old, **new}
    for key in ("search", "rows", "curves", "done", "chosen", "failed"):
        merged[key] = {**old.get(key, {}), **new.get(key, {})}
    write_json(into, merged)
