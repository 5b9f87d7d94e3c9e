"""Claim: what each alignment is worth in the embedded world when 10 % harmful rows follow, and what it costs.

SFT, Vaccine, T-Vaccine, RepNoise, TAR and Booster align the same model; each is attacked by the same user
rows, and measured before too. Then T-Vaccine with Lisa at the user stage, and with Safe LoRA after it. Means
and standard errors over three seeds; alignment seconds are means, peak resident memory the largest.
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
    """Name of the run, and what it changes in the packaged recipe."""
    return {"SFT": user_runs()["SFT"], **alignment_runs(full=True)}


def labelled(row: dict[str, Any]) -> str:
    """The row's name; models before the attack are told apart by what aligned them."""
    if row["user"] is not None:
        return row["name"]
    return f"aligned, {row['labels'][row['alignment']]}"


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Scores over seeds, the methods of each stage, and what the alignment cost."""
    found = over_seeds(rows) | {stage: rows[0][stage] for stage in ("alignment", "user", "post_hoc")}
    return found | {name: over([row[name] for row in rows]) for name, over in COSTS.items()}


def measure(out: Path, seeds: tuple[int, ...] = SEEDS, changes: tuple[str, ...] = ()) -> dict[str, Any]:
    """The rows over `seeds`; each model once, whichever runs it stands in."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    protocol: dict[str, Any] = {}
    for seed in seeds:
        for name, own in runs().items():
            recipe = Recipe.load("world", [f"name={name}", f"seed={seed}", *own, *changes])
            results = run(recipe, out=out / f"{name}-{seed}", store=out / "steps")
            for row in results["rows"]:
                rows.setdefault(labelled(row), {})[row["steps"]["score"]] = row
            protocol = results["protocol"]
    return {
        "rows": {name: summary(list(part.values())) for name, part in rows.items()},
        "settings": runs(),
        "protocol": protocol,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the runs here (resumes); default: a temporary folder")
    parser.add_argument(
        "--seed", type=int, help="only this one, into --out: a core for each, then all in one go"
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
