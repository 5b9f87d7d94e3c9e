"""The lab: what a few defenses do to a real model of 135 million parameters, on the user's rows.

Every row is an ordinary run of the packaged recipe `smollm2` with a few changed keys.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from holdfast import lab
from holdfast.errors import DataError
from holdfast.machine.files import write_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import claim_folder
from holdfast.pipeline import run
from holdfast.recipe import Recipe
from holdfast.reporting import report

ROWS = {
    "data.alignment.source": ("align",),
    "data.harmful": ("attack",),
    "data.test_harmful": ("test_harmful",),
    "data.benign": ("benign",),
    "data.user": ("{task}_train", "user"),
    "data.test": ("{task}_validation", "{task}_test", "test"),
}
"""By key of the recipe, the names of its file in the folder of rows; the first that exists is used."""
OPTIONAL = ("data.benign", "data.test")
SUFFIXES = (".jsonl", ".tsv", ".csv", ".parquet", ".json")
PHASES = ["user.alignment_steps=4", "user.finetune_steps=36"]
SHOWN: dict[str, list[str]] = {
    "NA-SFT": ["alignment=none"],
    "SFT": ["post_hoc={defense: safe_lora, num_layers: 30}"],
    "Lisa": ["user.defense=lisa", *PHASES, "user.rho=1"],
    "VLGuard": ["user.defense=vlguard", "user.alignment_size=200"],
    "SBR": ["user.defense=sbr", "user.lambda_=50", "user.norm=mean"],
    "GuardSpace": ["user.defense=guardspace"],
}
"""The rows of `holdfast lab`, with their changes to the recipe."""


def sources(rows: Path, task: str = "sst2") -> list[str]:
    """Return the changes to the recipe `smollm2` that use the files in the folder `rows`.

    Files of a task (`sst2_train.tsv`) may also be beside the folder.

    Raises:
        DataError: the folder or one of its files is missing; the message names the expected files.
    """
    if not rows.is_dir():
        raise DataError(f"No such folder of rows: {rows}. {_expected(task)}")
    found, missing = [f"data.task={task}"], []
    for key, names in ROWS.items():
        files = [
            folder / (name.format(task=task) + suffix)
            for folder in (rows, rows.resolve().parent)
            for name in (names if folder == rows else [name for name in names if "{" in name])
            for suffix in SUFFIXES
        ]
        file = next((file for file in files if file.is_file()), None)
        if file is not None:
            found.append(f"{key}={file}")
        elif key not in OPTIONAL:
            missing.append(f"{names[0].format(task=task)}.jsonl")
    if missing:
        raise DataError(f"{rows} lacks {', '.join(missing)}. {_expected(task)}")
    return [*found, "data.alignment.harmful=null"]


def _expected(task: str) -> str:
    return (
        "Expected a folder with align.jsonl (refusals and harmless answers), attack.jsonl (harmful rows), "
        f"test_harmful.jsonl (other harmful requests), {task}_train.jsonl or .tsv (user rows), "
        f"optionally {task}_test.jsonl and benign.jsonl. Columns: instruction, input, output, or those of "
        "the task."
    )


def run_lab(
    rows: Path,
    out: Path,
    *,
    device: str = "auto",
    progress: Callable[[str], Progress] = lambda name: Progress(),
) -> dict[str, Any]:
    """Run every row, write results and report to `out`, and return the results.

    Args:
        progress: makes the `Progress` of a run from the run's title.

    Raises:
        DataError: rows are missing.
        ModelError: the package with the model is not installed.
    """
    given = sources(rows)
    lab.model_folder()
    claim_folder(out, "demo")
    folders: list[Path] = []
    found: dict[str, Any] = {}
    results: dict[str, Any] = {}
    for name, changes in SHOWN.items():
        recipe = Recipe.load("smollm2", [*given, f"name={name}", *changes])
        folder = out / name.lower()
        results = run(recipe, out=folder, store=out / "steps", device=device, progress=progress(f"{name}: "))
        folders.append(folder)
        found |= {row["steps"]["score"]: row for row in results["rows"]}
    kept = {key: results[key] for key in ("holdfast", "protocol", "versions", "hardware", "git_commit")}
    summary = {
        **kept,
        "name": "lab",
        "rows": list(found.values()),
        "runs": [folder.name for folder in folders],
    }
    write_json(out / "results.json", summary)
    report(folders, out / "report.html")
    return summary
