"""The demo: runs every stage in the embedded world and shows the effect of harmful rows and of each defense.

Every row is an ordinary run of the packaged recipe `world` with a few changed keys. The runs share their
steps, so each alignment method trains once for each seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.machine.files import write_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import claim_folder
from holdfast.pipeline import run
from holdfast.recipe import Recipe
from holdfast.reporting import report

STAGES = ("user", "alignment", "post_hoc")
"""The order in which the stage of a method that acts at several stages is chosen."""

SHOWN = {
    "NA-SFT": ("sft",),
    "SFT": ("sft",),
    "Lisa": ("lisa",),
    "SFT + Safe LoRA": ("sft", "safe_lora"),
    "Vaccine": ("vaccine",),
    "T-Vaccine": ("tvaccine",),
    "T-Vaccine + Lisa + Safe LoRA": ("tvaccine", "lisa", "safe_lora"),
}
"""The rows of the short demo, with the methods of their stages; each is the last row of a run."""


def user_runs(full: bool = False) -> dict[str, list[str]]:
    """Return the rows for defenses on the model that SFT aligned, with their changes to the recipe `world`.

    Args:
        full: add the control without harmful rows, and every other defense of the user and post-hoc stages.
    """
    shown = {name: stack for name, stack in SHOWN.items() if not _acts(stack[0], "alignment", only=True)}
    if full:
        shown |= _others("user", shown) | _others("post_hoc", shown)
    found = {name: changes(name, stack) for name, stack in shown.items()}
    if full:
        found["SFT without harmful rows"] = [*found["SFT"], "data.poison_ratio=0"]
    return found


def alignment_runs(full: bool = False) -> dict[str, list[str]]:
    """Return the rows for the same attack on models that other methods aligned, and a defense at every stage.

    Args:
        full: add every other method of the alignment stage.
    """
    shown = {name: stack for name, stack in SHOWN.items() if _acts(stack[0], "alignment", only=True)}
    if full:
        shown |= _others("alignment", shown)
    return {name: changes(name, stack) for name, stack in shown.items()}


def demo_runs(full: bool = False) -> dict[str, list[str]]:
    """Return all rows of the demo."""
    return user_runs(full) | alignment_runs(full)


def changes(row: str, stack: tuple[str, ...]) -> list[str]:
    """Return the changes of a row to the recipe `world`: its methods, with their settings for that recipe."""
    found = []
    for name in stack:
        face = registry.faces("defenses")[name]
        stage = next(stage for stage in STAGES if stage in face.facts["stages"])
        given = face.facts.get("protocols", {}).get("world", {}).get(stage, {})
        found.append(f"{stage}.defense={name}")
        found += [f"{stage}.{key}={json.dumps(value)}" for key, value in given.items()]
    if _acts(stack[-1], "post_hoc"):  # the run adds the repair's label to its own name
        found.append(f"name={row.rpartition(' + ')[0]}")
    if row == "NA-SFT":
        found.append("alignment=none")
    return found


def _acts(name: str, stage: str, only: bool = False) -> bool:
    """Whether a method acts at a stage, or at that stage only."""
    stages = registry.faces("defenses")[name].facts["stages"]
    return stages == (stage,) if only else stage in stages


def _others(stage: str, shown: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Return a row for each defense of a stage that has no row yet."""
    named = {name for stack in shown.values() for name in stack}
    found: dict[str, tuple[str, ...]] = {}
    for name, face in registry.faces("defenses").items():
        if _acts(name, stage) and not face.facts.get("baseline") and name not in named:
            label = face.facts.get("label", name)
            found |= {f"SFT + {label}": ("sft", name)} if stage == "post_hoc" else {label: (name,)}
    return found


def demo(
    out: Path,
    *,
    seeds: int = 1,
    full: bool = False,
    device: str = "auto",
    progress: Callable[[str], Progress] = lambda name: Progress(),
) -> dict[str, Any]:
    """Run every row for every seed, write results and report to `out`, and return the results.

    Args:
        progress: makes the `Progress` of a run from the run's title.
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
