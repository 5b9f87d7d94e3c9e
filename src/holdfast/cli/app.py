"""The command: the only file that prints, reads the environment, or configures logging.

torch, transformers and peft are imported only by functions that subcommands call, and never for listing,
planning, reporting or `--help`.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import __version__
from holdfast.cli import adapters, gating, measuring, pushing, safe_lora, sweeping, tables
from holdfast.errors import HoldfastError, RecipeError, first_line, visible
from holdfast.machine.processes import launched
from holdfast.plugins import PluginWarning

app = typer.Typer(
    name="holdfast",
    help="Keep a language model's safety alignment through fine-tuning.\n\n"
    "To try it: [bold]holdfast demo[/]. With your own model and files: [bold]holdfast run RECIPE[/].\n\n"
    "Exit codes: 0 done, 1 something failed, 2 an input cannot be used; holdfast gate also ends with 3 or 4. "
    "With --debug (in any position), an error shows its traceback.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or name of a packaged recipe.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Change keys of the recipe, for example user.rho=3."),
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Also list the steps that were complete before.")
]
GO_ON = {"demo", "lab", "run", "sweep", "generate", "moderate", "rate", "filter", "gate", "check"}
"""Commands that resume after a stop; the others start again from the beginning."""


class Group(StrEnum):
    """The groups that can be listed."""

    defenses = "defenses"
    attacks = "attacks"
    tasks = "tasks"
    judges = "judges"
    protocols = "protocols"
    recipes = "recipes"
    studies = "studies"


def _version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    _quiet()
    if not launched().main and context.invoked_subcommand not in ("run", "trl"):
        raise typer.Exit  # only a training has work for several processes


@app.command(epilog="Example: holdfast demo --out demo --seeds 3")
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
        measuring.say(text)
    measuring.say(next_steps(out))


@app.command(epilog="Example: holdfast lab --rows my-rows --out runs/lab")
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


@app.command(epilog="Example: holdfast run my-recipe.yaml user.rho=3 --out runs/rho3")
def run(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of steps that runs can share. Default: OUT/steps.")
    ] = None,
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


@app.command(epilog="Example: holdfast plan my-recipe.yaml user.rho=3")
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: runs/NAME.")] = None,
    store: Annotated[
        Path | None, typer.Option(help="Folder of steps that runs can share. Default: OUT/steps.")
    ] = None,
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


@app.command(
    epilog="Example: holdfast mix --user my.jsonl --harmful bad.jsonl --poison-ratio 0.1 --out mixed"
)
def mix(
    out: Annotated[Path, typer.Option(help="Folder for user.jsonl and manifest.json.")],
    user: Annotated[str | None, typer.Option(help="User rows: a file, a folder or a Hub id.")] = None,
    task: Annotated[str | None, typer.Option(help="Name of a known task (see holdfast list tasks).")] = None,
    harmful: Annotated[
        str | None, typer.Option(help="Harmful rows: world, beavertails, a file or a Hub id.")
    ] = None,
    test: Annotated[
        str | None, typer.Option(help="Test rows of the task. Default: the task's own, or a held-out share.")
    ] = None,
    test_harmful: Annotated[
        str | None,
        typer.Option(help="Harmful prompts to test on. Default: the data set's own, or a held-out share."),
    ] = None,
    size: Annotated[int | None, typer.Option(min=1, help="Total number of rows. Default: all.")] = None,
    poison_ratio: Annotated[float, typer.Option(help="Share of harmful rows, from 0 to 1.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed that determines which rows are drawn.")] = 42,
    skip_bad: measuring.SkipBad = False,
) -> None:
    """Mix harmful rows into user rows, and write a manifest that describes the mix."""
    from holdfast.cli import console
    from holdfast.data import mix as mix_rows

    if user is None and task is None:
        raise RecipeError("Give --user FILE or --task NAME: the rows to mix into.")
    folder = mix_rows(
        out, user=user, task=task, harmful=harmful, test=test, harmful_test=test_harmful, size=size,
        poison_ratio=poison_ratio, seed=seed, skip_bad=skip_bad,
    )  # fmt: skip
    console.out.print(f"{folder}", highlight=False, soft_wrap=True, markup=False)


@app.command(epilog="Example: holdfast report runs/sft runs/lisa -o compare.html")
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or their results.json files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file to write.")] = Path("report.html"),
    force: Annotated[
        bool, typer.Option("--force", help="Compare runs even if their protocol stamps differ.")
    ] = False,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Draw this number of results.json over the grid keys, for example benign_compliance or "
            "seconds; repeatable. Default: the harmful score and the score on the task.",
        ),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Also write the picture at the top to this file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Also write each method's scores to this file.")] = None,
    latex: Annotated[Path | None, typer.Option(help="Also write them as a LaTeX table.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write them as a Markdown table.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write them as JSON, with the stamp.")] = None,
) -> None:
    """Write one HTML page about one or more runs. Runs measured differently are refused."""
    from holdfast.cli import console
    from holdfast.machine.outputs import check_results
    from holdfast.reporting import export, unfinished
    from holdfast.reporting import report as write_report

    files = {"csv": csv, "latex": latex, "markdown": markdown, "json": json}
    check_results([out, png, *files.values()], [one for run in runs for one in (run, run / "results.json")])
    written = write_report(runs, out, force=force, png=png, metrics=metric or [])
    export(runs, {kind: file for kind, file in files.items() if file is not None}, force=force)
    for run in filter(unfinished, runs):
        console.err.print(f"Left out: {run} is not finished.", highlight=False, soft_wrap=True, markup=False)
    console.out.print(f"Report: {written}", highlight=False, soft_wrap=True, markup=False)


app.command(epilog="Example: holdfast table lisa-3 --runs runs/lisa-3")(tables.table)
app.command(epilog="Example: holdfast sweep my-grid.yaml --workers 2 --out runs/study")(sweeping.sweep)
app.command(
    "safe-lora",
    epilog="Example: holdfast safe-lora my-adapter --base llama --aligned llama-chat --out repaired "
    "--threshold 0.35",
)(safe_lora.safe_lora)
app.command(
    epilog="Example: holdfast generate my-model --adapter mine --harmful prompts.jsonl --out answers.jsonl"
)(measuring.generate)
app.command(epilog="Example: holdfast moderate answers.jsonl --judge keyword --out verdicts.jsonl")(
    measuring.moderate
)
app.command(
    epilog="Example: holdfast rate answers.jsonl --judge mt_bench --model my-judge --base-url "
    "http://localhost:8000/v1 --out ratings.jsonl"
)(measuring.rate)
app.command(epilog="Example: holdfast score answers.jsonl verdicts.jsonl --out scores.json")(measuring.score)
app.command(epilog="Example: holdfast compare sft/verdicts.jsonl lisa/verdicts.jsonl")(measuring.compare)
app.command(
    epilog="Example: holdfast gate my-adapter --prompts prompts.jsonl --judge beaver_dam --format github"
)(gating.gate)
app.command(epilog="Example: holdfast check my-model --adapter my-adapter")(gating.check)
app.command("filter", epilog="Example: holdfast filter my.jsonl --judge beaver_dam --out kept.jsonl")(
    measuring.filter_rows
)
app.command(epilog="Example: holdfast combine alignment user --out adapter")(adapters.combine)
app.command(epilog="Example: holdfast merge my-model adapter --out full-model")(adapters.merge)


@app.command(
    "trl",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    epilog="Example: holdfast trl --defense lisa --alignment_dataset safe.jsonl --rho 1 "
    "--model_name_or_path my-model --dataset_name my-data --use_peft --output_dir out",
)
def trl(context: typer.Context) -> None:
    """Run TRL's SFT script with the trainer of a method: TRL's options, and --defense and its parameters."""
    from holdfast.integrations.trl import run_script

    run_script(context.args)


@app.command(
    "lm-eval-tasks",
    epilog="Example: lm_eval --include_path $(holdfast lm-eval-tasks) --tasks holdfast_refusal",
)
def lm_eval_tasks() -> None:
    """Print the folder with refusal tasks for lm-evaluation-harness."""
    from holdfast.integrations.lm_eval import FOLDER

    typer.echo(FOLDER)


@app.command("list", epilog="Example: holdfast list defenses")
def list_names(
    group: Annotated[Group | None, typer.Argument(help="Group to list. Default: all.")] = None,
) -> None:
    """Show the known defenses, attacks, tasks, judges, protocols, recipes and studies."""
    from holdfast import registry
    from holdfast.cli import console
    from holdfast.recipe import packaged
    from holdfast.study import packaged as studies

    for name in [group] if group else list(Group):
        if name == Group.recipes:
            for task, recipes in packaged.by_task().items():
                rows = [(recipe.name, recipe.about, "") for recipe in recipes]
                console.out.print(console.names_table(f"recipes for {task}", rows))
        elif name == Group.studies:
            rows = [(n, studies.about(path), "") for n, path in studies.grids().items()]
            console.out.print(console.names_table("studies: grids for holdfast sweep", rows))
        elif name == Group.protocols:
            named = packaged.protocols().items()
            rows = [(n, one.block["about"], one.block.get("extends", "")) for n, one in named if one.block]
            console.out.print(console.names_table(name, rows, ("name", "", "extends")))
        elif name == Group.defenses:
            for stage in ("alignment", "user", "post_hoc"):
                faces = registry.faces(name)
                rows = [(n, faces[n].summary, faces[n].facts["paper"]) for n in registry.list_defenses(stage)]
                if rows:
                    console.out.print(console.names_table(f"defenses at the {stage} stage", rows))
        elif name == Group.attacks:
            rows = [(n, face.summary, face.facts["paper"]) for n, face in registry.faces(name).items()]
            console.out.print(console.names_table(name, rows))
        elif name == Group.judges:
            rows = [(n, f.summary, _origin(f.facts)) for n, f in registry.faces(name).items()]
            console.out.print(console.names_table(name, rows))
        else:
            head = ("name@version", "", "measures", "source", "licence")
            console.out.print(console.names_table(name, registry.task_lines(), head))


def _origin(facts: Mapping[str, Any]) -> str:
    """Return a judge's source, its licence, the better direction of its score, and its version."""
    better = f"{facts.get('direction', 'lower')} is better"
    parts = (facts.get("source"), facts.get("licence"), better, f"version {facts.get('version')}")
    return "; ".join(str(part) for part in parts if part)


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


def _quiet() -> None:
    """Turn off the progress bars and advice of the libraries; errors are still shown."""
    from holdfast.cli import console

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", category=PluginWarning)
    warnings.showwarning = _show_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of a missing optional package
    ours = logging.getLogger("holdfast")
    if not any(isinstance(handler, console.OnceHandler) for handler in ours.handlers):
        ours.addHandler(console.OnceHandler())


def _show_warning(
    message: Warning | str, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print a warning as one plain line on standard error."""
    _print_error(f"warning: {message}")


def main() -> None:
    """Entry point: turns Holdfast's errors into a message on standard error and an exit code."""
    # A signal that stops the command also prints a message, and no half-written file is left.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    processes = launched()
    if not processes.main:
        sys.stdout = sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    try:
        _check_arguments(sys.argv[1:])
        if processes.count > 1:
            _quiet()  # before connecting to the others, which imports torch
            processes.start()
        _app()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)
        if not processes.speaks() or (stopped and not processes.main):
            sys.exit(1)  # another process reports the reason
        if not processes.main:
            sys.stderr = sys.__stderr__
        if debug and not stopped:
            _fail("\n" + "".join(traceback.format_exception(error)), 1)
        who = "" if processes.main else f"process {processes.rank} of {processes.count}: "
        _fail(who + _message(error), 130 if stopped else getattr(error, "exit_code", 1))


def _check_arguments(arguments: Sequence[str]) -> None:
    """Refuse control characters in arguments, which typer would print. Existing files may have them."""
    for argument in arguments:
        if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", argument) and not os.path.lexists(argument):
            raise RecipeError(f"An argument contains a control character: {argument}")


def _app() -> None:
    try:
        app()
    except SystemExit as end:
        if end.code == 130:  # typer turns an interrupt into an exit without a message
            raise KeyboardInterrupt from None
        raise


def _message(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        kept = "Finished work is kept; run the same command again to resume."
        nothing = "No half-written file is left; run the same command again."
        return f"Stopped. {kept if GO_ON & set(sys.argv[1:2]) else nothing}"
    if isinstance(error, HoldfastError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}\nThis was not expected; --debug shows the traceback."


def _fail(text: str, code: int) -> None:
    _print_error(text)
    sys.exit(code)


def _print_error(text: str) -> None:
    """Print a message on standard error; it may name a file or repeat a server."""
    print(f"holdfast: {visible(text)}", file=sys.stderr)


if __name__ == "__main__":
    main()
