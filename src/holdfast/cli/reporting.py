"""`holdfast report`: one page about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


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
