"""Claim: in the embedded world, harmful fine-tuning breaks alignment, and Lisa undoes at least half of that.

Runs the demo's rows over three seeds, plus other poison ratios than 0.1 for SFT and Lisa and other values of
rho; reports means and standard errors over seeds. Also writes docs/world-results.md and its plot.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from _record import RESULTS, add, save, write_page
from _world_attacks import attack_runs

from holdfast import Recipe, run
from holdfast.cli.demo import alignment_runs, user_runs
from holdfast.machine.files import read_json
from holdfast.reporting.charts import save_png
from holdfast.reporting.collect import collect

DOCS = Path(__file__).parents[1] / "docs"
SEEDS = (42, 43, 44)
PICTURED = ("NA-SFT", "SFT", "EWC", "VLGuard", "BSO", "Lisa", "SFT + Safe LoRA")
SCORES = ("harmful_score", "true_harmful_score", "finetune_accuracy", "benign_compliance", "gibberish_rate")


def runs() -> dict[str, list[str]]:
    """The name of each row, and its changes to the packaged recipe."""
    shown = user_runs()
    ratios = {
        f"{name}, p={p:g}": [*shown[name], f"data.poison_ratio={p:g}"]
        for name in ("SFT", "Lisa")
        for p in (0, 0.05, 0.2)
    }
    others = dict(user_runs(full=True))
    others.pop("SFT without harmful rows")  # the same as SFT, p=0
    swept = {f"Lisa, rho={rho:g}": [*shown["Lisa"], f"user.rho={rho:g}"] for rho in (0.1, 0.3, 3)}
    terms = {f"Lisa, {term}": [*shown["Lisa"], f"user.proximal={term}"] for term in ("fisher", "delta_w")}
    weights = {f"EWC, lambda={x}": ["user.defense=ewc", f"user.lambda_={x}"] for x in ("5e3", "5e4")}
    plain = {"EWC, l2": ["user.defense=ewc", "user.penalty=l2", "user.lambda_=0.5"]}
    controls = {
        f"SFT + Safe LoRA, {control}": [*shown["SFT + Safe LoRA"], f"post_hoc.control={control}"]
        for control in ("drop", "random")
    }
    attacks, newer = attack_runs(user_runs(full=True)), weight_runs()
    return {**others, **controls, **ratios, **swept, **terms, **weights, **plain, **attacks, **newer}


def weight_runs() -> dict[str, list[str]]:
    """Methods of 2026 on weights: an alignment stage, a stack of two, and other settings than the demo's."""
    merged, patched = ["post_hoc.defense=safemerge"], ["post_hoc.defense=one_shot"]
    both = ["name=Buffer", "user.defense=buffer", "post_hoc.defense=reinforce"]
    half = "{r: 16, alpha: 32, dropout: 0.0, target_modules: [q_proj, v_proj]}"  # 8 directions are trained
    started = ["user.defense=guardspace", "user.initialisation=subspace"]
    return {
        "GuardSpace, initialisation": [*started, f"user.lora={half}"],
        "LoX": alignment_runs(full=True)["LoX"],
        "LoX, alpha=0.5": ["alignment.defense=lox", "alignment.alpha=0.5"],
        "AsFT, lambda=0.1": ["user.defense=asft", "user.lambda_=0.1"],
        "AsFT, code": ["user.defense=asft", "user.scaling=code"],
        "SFT + SafeMERGE, weight=0.5": [*merged, "post_hoc.threshold=1.0", "post_hoc.weight=0.5"],
        "SFT + SafeMERGE, threshold=0.35": [*merged, "post_hoc.threshold=0.35"],
        "SFT + One-shot patch, shots=8": [
            *patched,
            "post_hoc.shots=8",
            "post_hoc.training.learning_rate=1e-3",
        ],
        "SFT + One-shot patch, lr=2e-5": patched,
        "Buffer + Reinforce": both,
        "Buffer + Reinforce, alpha=1": [*both, "post_hoc.alpha=1.0"],
    }


def over_seeds(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard error of each score over the seeds; a single row keeps its binomial error."""
    found: dict[str, Any] = {"seeds": len(rows), **{key: rows[0][key] for key in ("n_harmful", "n_task")}}
    for score in SCORES:
        values = [row[score] for row in rows]
        found[score] = statistics.mean(values)
        if len(rows) > 1:
            found[f"{score}_stderr"] = statistics.stdev(values) / len(values) ** 0.5
        else:
            found[f"{score}_stderr"] = rows[0].get(f"{score}_stderr")
        found[f"{score}_by_seed"] = values
    judges = rows[0]["judges"]
    found["false_negatives"] = {j: sum(row["judges"][j]["false_negatives"] for row in rows) for j in judges}
    found["false_positives"] = {j: sum(row["judges"][j]["false_positives"] for row in rows) for j in judges}
    return found


def markdown(rows: dict[str, dict[str, Any]]) -> list[str]:
    """The table of these results in docs/world-results.md."""
    scores = ("harmful_score", "finetune_accuracy", "benign_compliance")
    head = "| model | harmful score ↓ | finetune accuracy ↑ | benign compliance ↑ |"
    return [head, "|---|---|---|---|"] + [
        "| " + " | ".join([name, *(f"{row[s]:.1f} ± {row[f'{s}_stderr']:.1f}" for s in scores)]) + " |"
        for name, row in rows.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="keep the runs here (resumes); default: a temporary folder")
    parser.add_argument("--rows", metavar="A;B", help="run only these rows, and add them to the results file")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help="run only the first of the seeds")
    arguments = parser.parse_args()
    chosen = arguments.rows.split(";") if arguments.rows else list(runs())
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        rows: dict[str, list[dict[str, Any]]] = {}
        protocol = {}
        for seed in SEEDS[: arguments.seeds]:
            for name in chosen:
                changes = runs()[name]
                named = [f"name={name}"] if name in PICTURED else []
                recipe = Recipe.load("world", [f"seed={seed}", *named, *changes])
                results = run(recipe, out=out / f"{name}-{seed}", store=out / "steps")
                before, *_, after = results["rows"]
                rows.setdefault(name, []).append(after)
                plain = before["alignment"] in (None, "sft")
                known = rows.setdefault(before["name"] if plain else f"aligned, {name}", [])
                # some attacks ask other prompts, also of the aligned model
                own = name in attack_runs(user_runs(full=True))
                if not own and all(row["steps"]["score"] != before["steps"]["score"] for row in known):
                    known.append(before)
                protocol = results["protocol"]
        found = {name: over_seeds(part) for name, part in rows.items() if part}
        if arguments.rows:
            add("world", {name: found[name] for name in chosen})
            _write_page()
            return
        pages = [out / f"{name}-{seed}" for name in PICTURED for seed in SEEDS]
        save_png(collect(pages), DOCS / "report.png")
        save("world", {"rows": found, "protocol": protocol})
        _write_page()


def _write_page() -> None:
    rows = read_json(RESULTS / "world.json")["rows"]
    write_page(DOCS / "world-results.md", {"world": "\n".join(markdown(rows))})


if __name__ == "__main__":
    main()
