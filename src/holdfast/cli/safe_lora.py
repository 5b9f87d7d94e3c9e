"""`holdfast safe-lora`: its options and its output. `holdfast.safe_lora` does the work."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import StrEnum
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from holdfast.errors import RecipeError

if TYPE_CHECKING:
    from holdfast.defenses.safe_lora_parts.result import ModuleResult, SafeLoraResult

ROWS = 40
"""Maximum number of modules in the table; the JSON file contains all of them."""


class Projection(StrEnum):
    """The matrix by which the chosen updates are multiplied."""

    approx = "approx"
    exact = "exact"
    normalised = "normalised"


class Control(StrEnum):
    """What to do instead of the repair, to measure the effect of the direction."""

    drop = "drop"
    random = "random"


def safe_lora(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="LoRA folder or Hub id, or a folder of full weights.")
    ],
    base: Annotated[str, typer.Option(help="Model before its alignment, unquantised: a folder or Hub id.")],
    aligned: Annotated[
        str, typer.Option(help="Aligned model that was fine-tuned, or the folder of an alignment adapter.")
    ],
    out: Annotated[Path | None, typer.Option(help="Folder for the repaired copy.")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Project modules whose cosine is below this value, from -1 to 1.")
    ] = None,
    num_layers: Annotated[
        int | None, typer.Option(help="Instead: project this number of least similar modules.")
    ] = None,
    suggest: Annotated[
        bool,
        typer.Option("--suggest", help="Use the middle of the largest gap between cosines as threshold."),
    ] = False,
    projection: Annotated[
        Projection, typer.Option(help="Multiply by C itself, the exact projector, or C without its scale.")
    ] = Projection.approx,
    control: Annotated[
        Control | None,
        typer.Option(help="Instead: drop the chosen updates, or project the same number of random modules."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the control 'random'.")] = 42,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Show cosines and the number of modules per threshold; write nothing."
        ),
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(help="File for a plot of the cosines by depth: .png, .svg or .pdf.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu (without torch), or cuda for the products.")] = "cpu",
) -> None:
    """Repair a fine-tuned adapter: project the updates that left the direction of the alignment.

    It needs no training, no data and no GPU, and takes seconds for a 7B model. Look with --dry-run first.
    """
    if suggest and (threshold is not None or num_layers is not None):
        raise RecipeError("Give --suggest, --threshold or --num-layers: one of them.")
    if plot is not None:
        _check_plot(plot)
    only_look = dry_run or (suggest and out is None)
    from holdfast.cli import console
    from holdfast.defenses.safe_lora import safe_lora as repair

    began = time.monotonic()
    with console.Bars() as bars:
        bars.begin("measure" if only_look else "measure and project", False)
        result = repair(
            adapter,
            base=base,
            aligned=aligned,
            out=None if only_look else out,
            threshold="suggest" if suggest else threshold,
            num_layers=num_layers,
            projection=projection.value,
            control=control.value if control else None,
            seed=seed,
            device=device,
            dry_run=only_look,
            progress=bars.advance,
        )
        bars.end("Safe LoRA", False, time.monotonic() - began)
    _show(result, only_look)
    if plot is not None:
        from holdfast.reporting.cosines import save_cosines

        console.out.print(f"Plot: {save_cosines(result.to_json(), plot)}", highlight=False, soft_wrap=True)


def _check_plot(plot: Path) -> None:
    """Raise RecipeError or OutputError if the plot cannot be written."""
    if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise RecipeError(f"--plot writes .png, .svg or .pdf, found '{plot.name}'.")
    from holdfast.reporting.cosines import check_place

    check_place(plot)


def _show(result: SafeLoraResult, only_look: bool) -> None:
    from rich.markup import escape

    from holdfast.cli import console

    found = sorted(m.cosine for m in result.modules if m.cosine is not None)
    console.out.print(_modules_table(result.modules, only_look))
    if only_look:
        console.out.print(_sweep_table(result))
    for note in result.notes:
        console.out.print(escape(note), highlight=False)
    span = f"; cosines from {found[0]:.4f} to {found[-1]:.4f}" if found else ""
    if only_look:
        would = f", of which {len(result.projected)} would be projected" if result.projected else ""
        console.out.print(
            f"{len(result.modules)} modules{would}{span}. Nothing was written.", highlight=False
        )
        return
    share = f"{len(result.projected)} of {len(result.modules)} modules ({100 * result.share:.1f} %)"
    console.out.print(f"Projected {share}{span}.", highlight=False)
    said = "Control" if result.options["control"] else "Repaired"
    said = said if result.changed else "Nothing was changed. Copy"
    console.out.print(f"{said}: {escape(str(result.out))}", highlight=False, soft_wrap=True)


def _modules_table(modules: Sequence[ModuleResult], only_look: bool) -> Any:
    from rich.markup import escape
    from rich.table import Table

    order = sorted(modules, key=lambda m: (m.cosine is None, m.cosine or 0.0))
    parents = zip(*(module.name.split(".")[:-1] for module in order), strict=False)
    shared = ".".join(part[0] for part in takewhile(lambda part: len(set(part)) == 1, parents))
    more = f"; {len(order) - ROWS} more" + ("" if only_look else " are in safe_lora.json")
    table = Table(caption="least similar first" + (more if len(order) > ROWS else ""))
    table.add_column(f"module ({escape(shared)}.*)" if shared else "module", overflow="fold")
    for column in ("cosine", "norm of dW") if only_look else ("cosine", "norm of dW", "after"):
        table.add_column(column, justify="right")
    table.add_column("")
    done = "would be projected" if only_look else "projected"
    for module in order[:ROWS]:
        norms = [f"{module.norm_before:.4g}"] + ([] if only_look else [f"{module.norm_after:.4g}"])
        table.add_row(
            escape(module.name.removeprefix(f"{shared}.")),
            "" if module.cosine is None else f"{module.cosine:.4f}",
            *norms,
            done if module.projected else (module.note or ""),
        )
    return table


def _sweep_table(result: SafeLoraResult) -> Any:
    from rich.table import Table

    table = Table(title="what a threshold would project", title_justify="left")
    for column in ("threshold", "modules", "share"):
        table.add_column(column, justify="right")
    for threshold, count in result.sweep():
        table.add_row(f"{threshold:g}", str(count), f"{100 * count / len(result.modules):.0f} %")
    return table
