"""Claim: the effect of each alignment method against 10 % harmful rows in the embedded world, and its cost.

SFT, Vaccine, T-Vaccine, RepNoise, TAR and Booster align the same model. Each aligned model is measured before
and after fine-tuning on the same user rows. Further rows: T-Vaccine with Lisa at the user stage, and with
Safe LoRA after it. Means and standard errors over three seeds; alignment seconds are means, peak resident
memory is the maximum.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _record import save
from world import SEEDS, over_seeds

from holdfast import Recipe, run
from holdfast.cli.demo import alignment_runs, user_runs

COSTS = {"alignment_seconds": statistics.mean, "alignment_peak_memory_bytes": max}


def runs() -> dict[str, list[str]]:
    """The name of each run, and its changes to the packaged recipe."""
    return {"SFT": user_runs()["SFT"], **alignment_runs(full=True)}


def labelled(row: dict[str, Any]) -> str:
    """The row's name; for a model before the attack, the name of its alignment method."""
    if row["user"] is not None:
        return row["name"]
    return f"aligned, {row['labels'][row['alignment']]}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores over seeds, the method of each stage, and the cost of the alignment."""
    found = over_seeds(rows) | {stage: rows[0][stage] for stage in ("alignment", "user", "post_hoc")}
    return found | {name: over([row[name] for row in rows]) for name, over in COSTS.items()}


def measure(
    out: Path,
    seeds: tuple[int, ...] = SEEDS,
    changes: tuple[str, ...] = (),
    settings: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """The rows of `settings` (by default `runs()`) over `seeds`; a model of several runs is counted once."""
    settings = runs() if settings is None else settings
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    protocol: dict[str, Any] = {}
    for seed in seeds:
        for name, own in settings.items():
            recipe = Recipe.load("world", [f"name={name}", f"seed={seed}", *own, *changes])
            results = run(recipe, out=out / f"{name}-{seed}", store=out / "steps")
            for row in results["rows"]:
                rows.setdefault(labelled(row), {})[row["steps"]["score"]] = row
            protocol = results["protocol"]
    return {
        "rows": {name: summary(list(part.values())) for name, part in rows.items()},
        "settings": settings,
        "protocol": protocol,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the runs here (resumes); default: a temporary folder")
    parser.add_argument(
        "--seed", type=int, help="only this seed, into --out: run one seed per core, then once without --seed"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        if arguments.seed is None:
            save("world_alignment", measure(out))
        else:
            measure(out, seeds=(arguments.seed,))


if __name__ == "__main__":
    main()
