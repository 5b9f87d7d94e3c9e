"""`holdfast sweep`, and `holdfast plan` of a grid."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from holdfast.errors import RecipeError
from holdfast.machine.store import Store

if TYPE_CHECKING:
    from holdfast.study.folder import Status

SHOWN = ("complete", "running", "waiting", "failed", "stopped")
"""The states of steps, in the order of the table."""


def sweep(
    grid: Annotated[
        str | None,
        typer.Argument(metavar="GRID", help="YAML file of a grid (a recipe with lists), or a packaged one."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of every run, for example user.rho=3."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the study. Default: runs/NAME.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of steps that studies can share. Default: OUT/steps.")
    ] = None,
    device: Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")] = "auto",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Steps that run at the same time. Default: one for each GPU, else 1."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="For a table of a paper: world, smollm2, or a model instead of the paper's."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="For a table of a paper: the number of seeds.")] = 1,
    launcher: Annotated[
        str | None,
        typer.Option(help="Where the steps run: local, slurm or ray. Default: as the grid says, else local."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would run.")] = False,
    status: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Only show the state of the sweep in this folder.")
    ] = None,
) -> None:
    """Run a grid of recipes, each shared step once, or resume it where it stopped."""
    from holdfast.cli import console
    from holdfast.study import folder, sweeping

    if status is not None:
        console.out.print(status_table(folder.status(status)))
        return
    if grid is None:
        raise RecipeError("Expected a grid: holdfast sweep GRID. Or the folder of a sweep: --status DIR.")
    place = folder_of(grid if model is None else f"{grid}-{Path(model).name}", out)
    source = of_table(grid, model, seeds)
    if dry_run:
        show_plan(source, overrides or [], place, store, device, True, launcher)
        return
    try:
        with Shown() as shown:
            found = sweeping.sweep(
                source,
                overrides=overrides or [],
                out=place,
                store=store,
                device=device,
                workers=workers,
                launcher=launcher,
                show=shown.show,
            )
    except KeyboardInterrupt:
        text = left_text(grid, overrides or [], launcher, place)
        if text:
            console.err.print(text, highlight=False, soft_wrap=True, markup=False)
        raise
    rows = [row for results in found.values() for row in results["rows"]]
    console.out.print(console.rows_table(rows))
    text = f"{len(found):,} runs in {place}. A page about all: holdfast report {place}/*"
    console.out.print(text, highlight=False, soft_wrap=True, markup=False)
    if not isinstance(source, str):
        text = f"Beside the published numbers: holdfast table {grid} --runs {place}"
        console.out.print(text, highlight=False, soft_wrap=True, markup=False)


def left_text(grid: str, overrides: Sequence[str], launcher: str | None, out: Path) -> str:
    """Return what runs on after the command ended, and how to watch and stop it; "" if nothing does."""
    from holdfast.study.grid import launcher as launcher_of
    from holdfast.study.ray import NAMESPACE, actor_name
    from holdfast.study.slurm import job_name

    block, out = launcher_of(grid, launcher, overrides), out.absolute()
    watch = f"To watch it: holdfast sweep --status {out}"
    if block.name == "slurm":
        stop = f"scancel --name {shlex.quote(job_name(out))}"
        return f"The jobs of the sweep stay in the queue of Slurm.\n{watch}\nTo cancel them: {stop}"
    if block.name == "ray" and block.address is not None:
        connect = f"ray.init({block.address!r}, namespace={NAMESPACE!r})"
        kill = f"ray.kill(ray.get_actor({actor_name(out / 'sweep')!r}))"
        stop = f'python -c "import ray; {connect}; {kill}"'
        return f"The sweep runs on in the Ray cluster.\n{watch}\nTo stop it: {stop}"
    return ""


class Shown:
    """Shows the state of a sweep on standard error: a live table, or lines in a log file.

    A log file also gets a line of progress each minute, with an estimate of the end.
    """

    def __init__(self) -> None:
        from holdfast.cli import console

        self.screen = console.err
        self.live = Live(console=self.screen, transient=True, auto_refresh=False)
        self.states: dict[str, str] = {}
        self.began = self.told = time.monotonic()
        self.cached = 0
        self.ran = 0

    def __enter__(self) -> Shown:
        if self.screen.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def show(self, status: Status) -> None:
        """Show a state."""
        complete = status.counts().get("complete", 0)
        if not self.states:
            self.cached = complete
        self.ran = complete - self.cached
        if self.screen.is_terminal:
            self.states = dict(status.states)
            self.live.update(status_table(status), refresh=True)
            return
        if not self.states and self.cached:
            self._print(f"{self.cached:,} of {len(status.states):,} steps are complete at the start.")
        for step, state in status.states.items():
            if state in ("complete", "failed") and self.states and state != self.states.get(step):
                name = "done  " if state == "complete" else state
                self._print(f"{complete:,} of {len(status.states):,}  {name} {status.titles[step]} ({step})")
        self.states = dict(status.states)
        self._progress(status, complete)

    def _progress(self, status: Status, complete: int) -> None:
        """Print what the workers do and when the sweep may end, each minute."""
        from holdfast.cli import console

        now = time.monotonic()
        if now - self.told < console.EVERY:
            return
        self.told = now
        parts = []
        for one in status.workers.values():
            count = f" {one['done']:,} of {one['total']:,}" if "done" in one else ""
            parts.append(status.titles[one["step"]] + count)
        if self.ran:
            left = sum(state in ("waiting", "running") for state in status.states.values())
            parts.append(console.time_left(now - self.began, self.ran, left))
        if parts:
            self._print(f"{complete:,} of {len(status.states):,}  ...    {', '.join(parts)}")

    def _print(self, text: str) -> None:
        self.screen.print(escape(text), highlight=False, soft_wrap=True)


def status_table(status: Status) -> Table:
    """The state of a sweep: its steps by state, what runs, and what failed."""
    counts, (runs, complete) = status.counts(), status.runs
    text = ", ".join(f"{counts[state]:,} {state}" for state in SHOWN if state in counts)
    title = f"{complete:,} of {runs:,} runs complete; steps: {text}"
    if not status.alive and complete < runs:
        runs_on = "Its command" if status.workers else "The sweep"
        title += f". {runs_on} does not run; the same command resumes it."
    table = Table(title=title, title_justify="left")
    for column in ("state", "step", "what", "progress"):
        table.add_column(column, overflow="fold")
    for number, one in status.workers.items():
        minutes = (time.time() - one["began"]) / 60
        done = f"{one['done']:,} of {one['total']:,}, " if "done" in one else ""
        what = escape(status.titles[one["step"]])
        table.add_row(number.replace("-", " ", 1), one["step"], what, f"{done}{minutes:.0f} min")
    for step, message in status.failed.items():
        table.add_row("failed", step, escape(status.titles[step]), escape(message.split("\n")[0]))
    return table


def of_table(grid: str, model: str | None, seeds: int) -> str | Mapping[str, Any]:
    """Return the grid of a paper's table for a model and several seeds; any other grid unchanged."""
    from holdfast.study import published, tables

    if grid in published.names() and not Path(grid).is_file():
        return tables.grid(grid, model, seeds)
    if model is not None or seeds > 1:
        text = "--model and --seeds are for the tables of papers (holdfast table shows them)."
        raise RecipeError(f"{text} For {grid}, write model.path=PATH, or a list of seeds in the grid.")
    return grid


def show_plan(
    grid: str | Mapping[str, Any],
    overrides: Sequence[str],
    out: Path,
    store: Path | None,
    device: str,
    check: bool,
    launcher: str | None = None,
) -> None:
    """Show how many steps a grid has, how many are shared and cached, and what it takes; writes nothing."""
    from holdfast.cli import console
    from holdfast.study import planning, resources
    from holdfast.study.grid import expand
    from holdfast.study.grid import launcher as launcher_of

    block = launcher_of(grid, launcher, overrides)
    here, device = device, resources.placed(block, device)
    runs = expand(grid, overrides)
    steps = Store(store or out / "steps")
    study = planning.plan(runs, steps, device=device, partial=True, processes=block.together(device))
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
    if cost.seconds:
        text = f"By what earlier steps took, one worker needs {duration(cost.seconds)}"
        others = f", and the time of these steps: {', '.join(cost.unknown)}" if cost.unknown else ""
        console.out.print(f"{text}{others}.", highlight=False, soft_wrap=True)
    for text in study.elsewhere():
        console.out.print(f"Not on this machine: {escape(text)}", highlight=False, soft_wrap=True)
    if check and not study.elsewhere() and len(done) < len(study.steps):
        with console.Bars(finished=False) as bars:
            planning.rehearse(study, steps, here, bars)
        console.out.print("The checks before the run found no problem.", highlight=False)
    console.out.print(f"{count - len(done):,} of {count:,} steps would run.", highlight=False)


def folder_of(grid: str, out: Path | None) -> Path:
    """Return the folder of a sweep: by default it has the name of the grid's file."""
    return out or Path("runs") / Path(grid).stem


def duration(seconds: float) -> str:
    """Return a time in hours, minutes or seconds."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
