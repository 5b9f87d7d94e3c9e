"""Claim: an attacker who sweeps learning rate and steps reaches more harm than one usual training.

Runs the attacker's sweep over plain SFT and Lisa in the embedded world, with one seed, and draws the picture
of docs/attacks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _record import save

from holdfast import Recipe, run
from holdfast.cli.demo import user_runs
from holdfast.reporting.attack_sweeps import save_sweeps_png
from holdfast.reporting.collect import collect

PICTURE = Path(__file__).parents[1] / "docs" / "attack-sweep.png"
METHODS = ("SFT", "Lisa")
SWEEP = "attack_sweep={steps: [100, 300], learning_rate: [1.0e-4, 1.0e-3, 3.0e-3]}"
SMALL = ("evaluation.prompts=150", "evaluation.task_rows=150")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the runs here (resumes); default: a temporary folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        found, protocol = {}, {}
        for name in METHODS:
            recipe = Recipe.load("world", [f"name={name}", *user_runs()[name], SWEEP, *SMALL])
            results = run(recipe, out=out / name, store=out / "steps")
            [found[name]] = results["attack_sweep"]["models"]
            protocol = results["protocol"]
        for model in found.values():
            for point in model["points"]:
                point.pop("steps")
        save_sweeps_png(collect([out / name for name in METHODS]).runs, PICTURE)
        save("attack_sweep", {"models": found, "protocol": protocol})


if __name__ == "__main__":
    main()
