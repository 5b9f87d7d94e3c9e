"""The command: its subcommands, and its entry point, which turns errors into messages and exit codes.

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
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast import __version__
from holdfast.cli import (
    adapters,
    gating,
    listing,
    measuring,
    reporting,
    rows,
    running,
    safe_lora,
    sweeping,
    tables,
)
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

GO_ON = {"demo", "lab", "run", "sweep", "generate", "moderate", "rate", "filter", "gate", "check"}
"""Commands that resume after a stop; the others start again from the beginning."""


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


app.command(epilog="Example: holdfast demo --out demo --seeds 3")(running.demo)
app.command(epilog="Example: holdfast lab --rows my-rows --out runs/lab")(running.lab)
app.command(epilog="Example: holdfast run my-recipe.yaml user.rho=3 --out runs/rho3")(running.run)
app.command(epilog="Example: holdfast plan my-recipe.yaml user.rho=3")(running.plan)
app.command(
    epilog="Example: holdfast mix --user my.jsonl --harmful bad.jsonl --poison-ratio 0.1 --out mixed"
)(rows.mix)
app.command(epilog="Example: holdfast report runs/sft runs/lisa -o compare.html")(reporting.report)
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
    rows.filter_rows
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


app.command("list", epilog="Example: holdfast list defenses")(listing.list_names)


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
