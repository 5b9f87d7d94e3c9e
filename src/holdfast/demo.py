"""The embedded world from one end to the other: what harmful rows do, and what each defense keeps.

Every row is an ordinary run of the packaged recipe `world` with a few keys changed; they share their
steps, so the model is aligned once for each seed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.pipeline import run
from holdfast.progress import Progress
from holdfast.recipe import Recipe
from holdfast.report import report
from holdfast.store import claim_folder, write_json

RUNS = {
    "NA-SFT": ["alignment=none", "user.defense=sft"],
    "SFT": ["user.defense=sft"],
    "EWC": ["user.defense=ewc", "user.lambda_=1e6"],
    # A fifth of the rows, as the 1000 of 5000 in the Lisa paper.
    "VLGuard": ["user.defense=vlguard", "user.alignment_size=200"],
    "BSO": ["user.defense=bso", "user.alignment_steps=10", "user.finetune_steps=90"],
    "Lisa": ["user.defense=lisa", "user.alignment_steps=10", "user.finetune_steps=90"],
    # A repair of the row SFT: a quarter of its 8 modules. More is safer, but costs accuracy at some seeds.
    "SFT + Safe LoRA": ["name=SFT", "user.defense=sft", "post_hoc={defense: safe_lora, num_layers: 2}"],
}
"""Name of the last row of a run, and what it changes in the recipe."""


def demo_runs(full: bool = False) -> dict[str, list[str]]:
    """The rows of the demo; `full` adds the control without harmful rows, and every other defense."""
    if not full:
        return RUNS
    others = {
        face.facts.get("label", name): [f"user.defense={name}"]
        for name, face in registry.faces("defenses").items()
        if "user" in face.facts["stages"] and face.facts.get("label", name) not in RUNS
    }
    return {**RUNS, "SFT without harmful rows": ["user.defense=sft", "data.poison_ratio=0"], **others}


def demo(
    out: Path,
    *,
    seeds: int = 1,
    full: bool = False,
    device: str = "auto",
    progress: Callable[[str], Progress] = lambda name: Progress(),
) -> dict[str, Any]:
    """Run every row for every seed into `out`; returns what `out/results.json` holds.

    Args:
        progress: makes the watcher of one run from its name.
    """
    claim_folder(out, "demo")
    folders: list[Path] = []
    rows: list[dict[str, Any]] = []
    results: dict[str, Any] = {}
    first = Recipe.load("world").seed
    for seed in range(first, first + seeds):
        for name, changes in demo_runs(full).items():
            recipe = Recipe.load("world", [f"name={name}", f"seed={seed}", *changes])
            folder = out / f"{name.lower().replace(' ', '-')}-{seed}"
            title = f"{name}, seed {seed}: " if seeds > 1 else f"{name}: "
            results = run(recipe, out=folder, store=out / "steps", device=device, progress=progress(title))
            folders.append(folder)
            rows += [
                row
                for row in results["rows"]
                if row["steps"]["score"] not in {r["steps"]["score"] for r in rows}
            ]
    kept = {key: results[key] for key in ("holdfast", "protocol", "versions", "hardware", "git_commit")}
    summary = {**kept, "name": "demo", "rows": rows, "runs": [folder.name for folder in folders]}
    write_json(out / "results.json", summary)
    report(folders, out / "report.html")
    return summary
