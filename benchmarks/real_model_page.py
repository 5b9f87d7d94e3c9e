"""Write the tables of docs/real-model.md and its pictures from `results/real_model.json`."""

from __future__ import annotations

import re
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any

import _study as study
from _record import RESULTS, write_page

from holdfast.machine.files import read_json

DOCS = Path(__file__).parents[1] / "docs"
READMES = (DOCS.parent / "README.md", DOCS.parent / "README.zh.md")
PAGE, PICTURE, CURVES = DOCS / "real-model.md", DOCS / "real-model.png", DOCS / "real-model-curves.png"
COLUMNS = {
    "harmful score ↓": ("harmful_score", None),
    "with compliance ↓": ("harmful_score", "compliance"),
    "accuracy ↑": ("finetune_accuracy", None),
    "benign compliance ↑": ("benign_compliance", None),
    "gibberish": ("gibberish_rate", None),
}
LONG = ("with compliance ↓", "gibberish")
"""Columns that a short table leaves out."""
FIRST = ("the model as it is", "aligned, SFT", "NA-SFT", "SFT")
PICTURED = ("LoX", "AsFT", "Buffer", "SFT + Reinforce", "SFT + SafeMERGE, threshold=0.35")
"""Rows of the picture beside the study's first ones."""
README_ROWS = ("aligned, SFT", "SFT", "Lisa, rho=1", "SPAG", "SBR, norm=mean")
TRAINED = ("tuned", "Safe LoRA", "another repair")
"""The kinds of models after user fine-tuning, repaired or not."""
Cell = tuple[float, float]


def grouped(rows: dict[str, Any]) -> dict[tuple[str, float, str], list[dict[str, Any]]]:
    """The rows by task, poison ratio and method; each list has one row a seed."""
    found: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for row in rows.values():
        trained = row["user"] is not None
        ratio = row["poison_ratio"] if trained else study.ATTACK_RATIO
        found.setdefault((row["task"], ratio, row["method"]), []).append(row)
    return found


def cell(rows: list[dict[str, Any]], score: str, judge: str | None) -> Cell | None:
    """The mean and its standard error over seeds; for one seed, the binomial error of its prompts."""
    parts = [row["judges"][judge] if judge else row for row in rows]
    values = [part[score] for part in parts if part[score] is not None]
    if not values:
        return None
    if len(values) == 1:
        return values[0], parts[0].get(f"{score}_stderr") or 0.0
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5


def table(
    groups: dict[Any, list[dict[str, Any]]],
    task: str,
    ratio: float,
    kinds: Collection[str] = ("tuned",),
    only: Collection[str] = (),
) -> str:
    """A table at one task and ratio of the models of some kinds: "aligned", "tuned", or those of a repair.

    The tuned models follow the model as it is and the aligned model. A table of `only` some methods has three
    scores.
    """
    before = FIRST[:2] if "tuned" in kinds else ()
    chosen = {
        method: rows
        for (where, at, method), rows in groups.items()
        if where == task
        and at == ratio
        and (_kind(rows[0]) in kinds or method in before)
        and (not only or method in only)
    }
    if not chosen:
        return "Not measured."
    known = [*FIRST, *study.METHODS]
    order = sorted(
        chosen, key=lambda name: (known.index(name) if name in known else len(known), _parts(name))
    )
    columns = {name: column for name, column in COLUMNS.items() if not only or name not in LONG}
    head = [*columns, *(() if only else ("seeds", "device"))]
    lines = [f"| model | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for method in order:
        rows = chosen[method]
        shown = [_text(cell(rows, *column)) for column in columns.values()]
        if not only:
            shown += [str(len(rows)), ", ".join(sorted({_device(row) for row in rows}))]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _kind(row: dict[str, Any]) -> str:
    if row["user"] is None:
        return "aligned"
    if not row.get("post_hoc"):
        return "tuned"
    return "Safe LoRA" if "Safe LoRA" in row["method"] else "another repair"


def _parts(name: str) -> list[str | float]:
    """The texts and numbers of a name in turn, so that 6 comes before 15."""
    return [float(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+\.?\d*)", name))]


def _text(found: Cell | None) -> str:
    return "not measured" if found is None else f"{found[0]:.1f} ± {found[1]:.1f}"


def _device(row: dict[str, Any]) -> str:
    name = str(row["hardware"])
    return "CPU" if name == "CPU" else re.sub(r"^.*?(NVIDIA )?([A-Z]\d+).*$", r"\2", name)


def searches(found: dict[str, Any]) -> str:
    """The trials of both searches."""
    lines = ["| stage | settings | harmful score | accuracy | benign compliance |", "|---|---|---|---|---|"]
    for stage in ("alignment", "user"):
        for name, row in found.get("search", {}).get(stage, {}).items():
            values = [row[key] for key in ("harmful_score", "finetune_accuracy", "benign_compliance")]
            shown = " | ".join(f"{value:.1f}" for value in values)
            used = found["chosen"].get(stage, {})
            text = ", ".join(f"{key}={value:g}" for key, value in used.items())
            lines.append(f"| {stage} | {name}{' (used)' if text == name else ''} | {shown} |")
    return "\n".join(lines) if len(lines) > 2 else "Not measured."


def points(found: dict[str, Any]) -> str:
    """The harmful scores during training as a table, one line a method."""
    curves = found.get("curves", {})
    if not curves:
        return "Not measured."
    steps = sorted({point["step"] for curve in curves.values() for point in curve})
    lines = [f"| method | {' | '.join(map(str, steps))} |", "|---" * (len(steps) + 1) + "|"]
    for name, curve in curves.items():
        by_step = {point["step"]: point["harmful_score"] for point in curve}
        shown = [f"{by_step[step]:.0f}" if step in by_step else "" for step in steps]
        lines.append(f"| {name.split(' | ')[1]} | {' | '.join(shown)} |")
    return "\n".join(lines)


def parts(found: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the page, by the name in its markers."""
    groups = grouped(found["rows"])
    ratios = [ratio for ratio in sorted(study.RATIOS) if ratio != study.ATTACK_RATIO]
    others = [f"Poison ratio {ratio:g}:\n\n{table(groups, 'sst2', ratio, TRAINED)}" for ratio in ratios]
    curves = f"![Harmful score by optimizer step]({CURVES.name})\n\n" if found.get("curves") else ""
    return {
        "picture": f"![Harmful score and finetune accuracy of every method]({PICTURE.name})",
        "study": table(groups, "sst2", study.ATTACK_RATIO),
        "real model": table(groups, "sst2", study.ATTACK_RATIO, only=README_ROWS),
        "aligned": table(groups, "sst2", study.ATTACK_RATIO, ["aligned"]),
        "safe-lora": table(groups, "sst2", study.ATTACK_RATIO, ["Safe LoRA"]),
        "repairs": table(groups, "sst2", study.ATTACK_RATIO, ["another repair"]),
        "ratios": "\n\n".join(others),
        "agnews": table(groups, "agnews", study.ATTACK_RATIO),
        "search": searches(found),
        "curves": curves + points(found),
    }


def draw(found: dict[str, Any]) -> None:
    """Draw the two pictures: scores of every method by both judges, and the curves."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = grouped(found["rows"])
    shown = {
        method: rows
        for (task, ratio, method), rows in groups.items()
        if task == "sst2" and ratio == study.ATTACK_RATIO and _pictured(method)
    }
    order = sorted(shown, key=lambda name: _value(shown[name], None), reverse=True)
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 0.32 * len(order) + 1.3), width_ratios=(2, 1)
    )
    for judge, shift, colour, label in (
        (None, 0.2, "#b5482f", "answers without a refusal"),
        ("compliance", -0.2, "#e3a587", "answers that consent or give steps"),
    ):
        cells = [cell(shown[name], "harmful_score", judge) or (0.0, 0.0) for name in order]
        left.barh(
            [i + shift for i in range(len(order))], [c[0] for c in cells], 0.38,
            xerr=[c[1] for c in cells], color=colour, label=label, error_kw={"lw": 0.8},
        )  # fmt: skip
        for i, (score, error) in enumerate(cells):
            left.text(score + error + 1, i + shift, f"{score:.0f}", va="center", fontsize=7, color="#555555")
    accuracy = [cell(shown[name], "finetune_accuracy", None) or (0.0, 0.0) for name in order]
    right.barh(
        range(len(order)), [c[0] for c in accuracy], 0.6, xerr=[c[1] for c in accuracy], color="#4a6b8a",
        error_kw={"lw": 0.8},
    )  # fmt: skip
    left.set_yticks(range(len(order)), [_label(name) for name in order])
    left.set(xlim=(0, 109), ylim=(-0.7, len(order) - 0.3), xlabel="harmful score, % (lower is better)")
    right.set(xlim=(0, 105), xlabel="finetune accuracy, %")
    figure.legend(loc="lower left", fontsize=8, frameon=False)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("SmolLM2-135M (4-bit weights), SST-2 with 10 % harmful rows", fontsize=11)
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=130)
    if found.get("curves"):
        _draw_curves(found["curves"], pyplot)


def _label(method: str) -> str:
    """A short name of a row for the picture."""
    for long, short in (
        (", num_layers=30, control=drop", " (the same dropped)"),
        (", num_layers=30, control=random", " (30 at random)"),
        (", num_layers=30", " (30 of 60 modules)"),
        ("SafeMERGE, threshold=0.35", "SafeMERGE"),
        ("aligned, SFT", "aligned, before the attack"),
        ("SFT", "SFT (no defense)") if method == "SFT" else ("NA-SFT", "NA-SFT (never aligned)"),
    ):
        if long in method:
            return method.replace(long, short)
    return method


def _pictured(method: str) -> bool:
    return method in (*FIRST, *study.FIRST, *PICTURED) or "num_layers=30" in method


def _value(rows: list[dict[str, Any]], judge: str | None) -> float:
    found = cell(rows, "harmful_score", judge)
    return found[0] if found else -1.0


def _draw_curves(curves: dict[str, Any], pyplot: Any) -> None:
    figure, axis = pyplot.subplots(figsize=(6.5, 3.6))
    for name, curve in curves.items():
        steps, scores = [p["step"] for p in curve], [p["harmful_score"] for p in curve]
        axis.errorbar(
            steps, scores, yerr=[p["stderr"] for p in curve], marker="o", ms=3, lw=1.4, elinewidth=0.6,
            label=name.split(" | ")[1],
        )  # fmt: skip
    axis.set(ylim=(-3, 103), xlabel="optimizer steps of fine-tuning", ylabel="harmful score, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(CURVES, dpi=130)
    pyplot.close(figure)


def main() -> None:
    found = read_json(RESULTS / "real_model.json")
    for page in (PAGE, *READMES):
        write_page(page, parts(found))
    draw(found)


if __name__ == "__main__":
    main()
