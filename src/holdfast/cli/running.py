"""`holdfast demo | lab | run | plan`: recipes, from their steps to the table of their results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli import pushing, sweeping
from holdfast.cli.measuring import Device, say
from holdfast.errors import RecipeError
from holdfast.machine.processes import launched

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or name of a packaged recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of the recipe, for example user.rho=3."),
]
Out = Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")]
Store = Annotated[Path | None, typer.Option(help="Folder of steps that runs can share. Default: OUT/steps.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also list the steps that were complete before.")
]


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/demo"),
    full: Annotated[
        bool, typer.Option("--full", help="Run every defense, and a control without harmful rows.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds; the table shows means over them.")] = 1,
    device: Device = "auto",
) -> None:
    """Run the embedded world through every stage and write a report: minutes on two CPU cores."""
    if launched().count > 1:
        raise RecipeError("holdfast demo runs in one process. Under a launcher: holdfast run world.")
    from holdfast.cli.demo import demo as run_demo
    from holdfast.cli.demo import next_steps, unusual

    with sweeping.Shown() as shown:
        results = run_demo(out, seeds=seeds, full=full, device=device, show=shown.show)
    _done(shown.ran, results["rows"], out)
    for text in unusual(results["rows"]):
        say(text)
    say(next_steps(out))


def lab(
    rows: Annotated[
        Path, typer.Option(help="Folder with align, attack, test_harmful and sst2_train files; see docs.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("runs/lab"),
    device: Device = "auto",
    verbose: Verbose = False,
) -> None:
    """Show what defenses do to a real model of 135 million parameters: minutes on a GPU, hours on a CPU."""
    if launched().count > 1:
        raise RecipeError("holdfast lab runs in one process. Under a launcher: holdfast run smollm2.")
    from holdfast.cli import console
    from holdfast.cli.lab import run_lab
    from holdfast.lab import ABOUT

    console.out.print(ABOUT, highlight=False)
    with console.Bars(verbose=verbose) as bars:

        def named(prefix: str) -> console.Bars:
            bars.prefix = prefix
            return bars

        results = run_lab(rows, out, device=device, progress=named)
    _done(bars.ran, results["rows"], out)


def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    store: Store = None,
    device: Device = "auto",
    push: pushing.Push = None,
    public: pushing.Public = False,
    verbose: Verbose = False,
) -> None:
    """Run a recipe, or resume it where it stopped; ends with a table and a report."""
    from holdfast.cli import console
    from holdfast.pipeline import run as run_recipe
    from holdfast.recipe import Recipe
    from holdfast.study.grid import is_grid

    if is_grid(recipe):
        raise RecipeError(f"{recipe} is a grid of several runs. Run it with: holdfast sweep {recipe}")
    loaded = Recipe.load(recipe, overrides or [])
    pushing.check_run(loaded, push, public)
    folder = out or Path("runs") / loaded.name.replace(" ", "-")
    with console.Bars(verbose=verbose) as bars:
        results = run_recipe(loaded, out=folder, store=store, device=device, progress=bars)
    if launched().main:
        _done(bars.ran, results["rows"], folder)
        pushing.push_run(folder, push, public)


def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Out = None,
    store: Store = None,
    device: Device = "auto",
    check: Annotated[
        bool, typer.Option(help="Check what a run checks before it trains; the steps alone show faster.")
    ] = True,
) -> None:
    """Show the steps of a run or a grid, which are cached, and check what could stop it; writes nothing."""
    from holdfast.cli import console
    from holdfast.machine.store import Store
    from holdfast.pipeline import plan as plan_recipe
    from holdfast.pipeline import rehearse
    from holdfast.recipe import Recipe
    from holdfast.study.grid import is_grid

    if is_grid(recipe):
        sweeping.show_plan(recipe, overrides or [], sweeping.folder_of(recipe, out), store, device, check)
        return
    loaded = Recipe.load(recipe, overrides or [])
    steps = Store(store or (out or Path("runs") / loaded.name.replace(" ", "-")) / "steps")
    whole = plan_recipe(loaded, today=steps.started(), partial=True, device=device)
    planned = whole.steps
    cached = {step.id for step in planned if steps.record(step.id) is not None}
    begun = {step.id for step in planned if steps.begun(step.id)}
    console.out.print(console.steps_table(planned, cached, begun))
    if loaded.protocol:
        told = console.protocol_text(loaded.protocol, loaded.changes())
        console.out.print(told, highlight=False, markup=False)
    for text in whole.elsewhere:
        console.out.print(f"Not on this machine: {text}", highlight=False, soft_wrap=True, markup=False)
    if whole.elsewhere:
        console.out.print(
            "The names of the steps are not known, and the checks before the run were left out.",
            highlight=False,
        )
    elif check and launched().count > 1:
        console.out.print("The checks before the run need one process: plan without the launcher.")
    elif check and len(cached) < len(planned):
        with console.Bars(finished=False) as bars:
            rehearse(whole, steps, device=device, progress=bars)
        console.out.print("The checks before the run found no problem.", highlight=False)
    console.out.print(f"{len(planned) - len(cached)} of {len(planned)} steps would run.", highlight=False)


def _done(ran: int, rows: list[dict], out: Path) -> None:
    from holdfast.cli import console
    from holdfast.reporting.points import line_of

    if not ran:
        console.out.print("Nothing to do: every step of this recipe is complete.", highlight=False)
    console.out.print(console.rows_table(rows))
    for row in rows:
        swept = line_of([row])
        if swept:
            console.out.print(f"{row['name']}: {swept}", highlight=False, markup=False)
    console.out.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True, markup=False)
