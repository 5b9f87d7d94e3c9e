"""`holdfast sweep`, and `holdfast plan` of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from holdfast.machine.store import Store


def show_plan(
    grid: str, overrides: Sequence[str], out: Path | None, store: Path | None, device: str, check: bool
) -> None:
    """Show how many steps a grid has, how many are shared and cached, and what it takes; writes nothing."""
    from holdfast.cli import console
    from holdfast.pipeline import rehearse
    from holdfast.study import planning
    from holdfast.study.grid import expand

    runs = expand(grid, overrides)
    steps = Store(store or folder_of(grid, out) / "steps")
    study = planning.plan(runs, steps, device=device, partial=True)
    done = study.complete(steps)
    cost = planning.cost(study, steps, done)
    table = Table()
    for column in ("kind of step", "steps", "shared", "cached", "time left"):
        table.add_column(column, justify="left" if column == "kind of step" else "right")
    for kind, (number, shared, cached, seconds) in cost.by_kind.items():
        left = "not known" if seconds is None else duration(seconds) if cached < number else ""
        table.add_row(kind, f"{number:,}", f"{shared:,}", f"{cached:,}", left)
    console.out.print(table)
    single = sum(len(plan.steps) for plan in study.plans.values())
    count = len(study.steps)
    text = f"{len(runs):,} runs have {count:,} steps; without shared steps they would have {single:,}."
    console.out.print(text, highlight=False, soft_wrap=True)
    console.out.print(f"{count - len(done):,} of {count:,} steps would run.", highlight=False)
    if cost.seconds:
        text = f"By what earlier steps took, one worker needs {duration(cost.seconds)}"
        others = f", and the time of these steps: {', '.join(cost.unknown)}" if cost.unknown else ""
        console.out.print(f"{text}{others}.", highlight=False, soft_wrap=True)
    for text in study.elsewhere():
        console.out.print(f"Not on this machine: {escape(text)}", highlight=False, soft_wrap=True)
    if check and not study.elsewhere() and len(done) < len(study.steps):
        with console.Bars(finished=False) as bars:
            for plan in study.plans.values():
                rehearse(plan, steps, device=device, progress=bars)
        console.out.print("The checks before the run found no problem.", highlight=False)


def folder_of(grid: str, out: Path | None) -> Path:
    """Return the folder of a sweep: by default it has the name of the grid's file."""
    return out or Path("runs") / Path(grid).stem


def duration(seconds: float) -> str:
    """Return a time in hours, minutes or seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
