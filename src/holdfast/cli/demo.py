"""The demo: every stage in the embedded world, showing the effect of harmful rows and of each defense.

Every row is an ordinary run of the packaged recipe `world` with a few keys changed. The runs share their
steps, so each alignment method trains once for each seed.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.machine.files import write_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import claim_folder
from holdfast.pipeline import run
from holdfast.recipe import Recipe
from holdfast.reporting import report

LISA = ["user.defense=lisa", "user.alignment_steps=10", "user.finetune_steps=90"]
# A repair of a quarter of the 8 modules. Repairing more is safer, but costs accuracy for some seeds.
SAFE_LORA = "post_hoc={defense: safe_lora, num_layers: 2}"
# Half of the world model's layers at a time. With the paper's K of 200, the 200 steps of this alignment would
# compute the probabilities only once.
T_VACCINE = [
    "alignment=tvaccine",
    "alignment.rho=8",
    "alignment.num_layers=2",
    "alignment.probability_steps=50",
    "alignment.resample_steps=10",
]

RUNS = {
    "NA-SFT": ["alignment=none", "user.defense=sft"],
    "SFT": ["user.defense=sft"],
    "Lisa": LISA,
    "SFT + Safe LoRA": ["name=SFT", "user.defense=sft", SAFE_LORA],
}
"""Defenses of the model that SFT aligned: the name of a run's last row, and its changes to the recipe."""

ALIGNMENTS = {
    "Vaccine": ["alignment=vaccine", "alignment.rho=8"],
    "T-Vaccine": T_VACCINE,
    "T-Vaccine + Lisa + Safe LoRA": ["name=T-Vaccine + Lisa", *T_VACCINE, *LISA, SAFE_LORA],
}
"""The same attack on models aligned by other methods, and a stack with a defense at every stage."""

MORE_RUNS = {
    "SFT without harmful rows": ["user.defense=sft", "data.poison_ratio=0"],
    "EWC": ["user.defense=ewc", "user.lambda_=1e6"],
    # A fifth of the rows, as in the Lisa paper (1000 of 5000).
    "VLGuard": ["user.defense=vlguard", "user.alignment_size=200"],
    "BSO": ["user.defense=bso", "user.alignment_steps=10", "user.finetune_steps=90"],
}
MORE_ALIGNMENTS = {
    "RepNoise": ["alignment=repnoise"],
    # Attacks at learning rates that have an effect here: the paper's 2e-6 to 4e-5 change nothing in such a
    # small model. Nothing of the base model is retained, because it complies with everything; the authors'
    # base model refuses.
    "TAR": [
        "alignment=tar",
        "alignment.inner_steps=8",
        "alignment.inner_subsample=2",
        "alignment.adversary_learning_rates=1e-4, 3e-4, 1e-3",
        "alignment.lambda_tr=8",
        "alignment.lambda_retain=0",
    ],
    # With the paper's lambda of 5, the tiny model learns to refuse everything.
    "Booster": ["alignment=booster", "alignment.lambda_=1.5"],
}
"""The rows that `full` adds and that need settings for the world."""


def user_runs(full: bool = False) -> dict[str, list[str]]:
    """The rows of `RUNS`; `full` adds the control without harmful rows and every other defense."""
    if not full:
        return RUNS
    known = {**RUNS, **MORE_RUNS}
    return known | {label: [f"user.defense={name}"] for label, name in _others("user", known)}


def alignment_runs(full: bool = False) -> dict[str, list[str]]:
    """The rows of `ALIGNMENTS`; `full` adds every other method of the alignment stage."""
    if not full:
        return ALIGNMENTS
    known = {**ALIGNMENTS, **MORE_ALIGNMENTS}
    others = _others("alignment", {**known, **RUNS})
    return known | {label: [f"alignment.defense={name}"] for label, name in others}


def demo_runs(full: bool = False) -> dict[str, list[str]]:
    """All rows of the demo."""
    return user_runs(full) | alignment_runs(full)


def _others(stage: str, known: Container[str]) -> list[tuple[str, str]]:
    """The label and name of each defense of a stage that has no row yet."""
    faces = registry.faces("defenses").items()
    found = [(face.facts.get("label", name), name) for name, face in faces if stage in face.facts["stages"]]
    return [(label, name) for label, name in found if label not in known]


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
