"""`holdfast table`: a paper's table, published beside measured."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from holdfast.errors import OutputError, RecipeError, visible


class Format(StrEnum):
    """The formats of a table."""

    text = "text"
    markdown = "markdown"
    csv = "csv"
    latex = "latex"
    json = "json"


def table(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A table. Default: list all.")] = None,
    runs: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of a sweep or of a run; repeat the option for several."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Only runs of this model: world, smollm2 or its path in the recipe.")
    ] = None,
    form: Annotated[Format, typer.Option("--format", help="Format of the table.")] = Format.text,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File to write. Default: the screen.")
    ] = None,
) -> None:
    """Show a table of a paper: the published numbers beside those that runs measured."""
    from holdfast.study import compared, published

    if name is None:
        if runs or out or form != Format.text:
            raise RecipeError("Expected the name of a table: holdfast table NAME. All names: holdfast table")
        _list()
        return
    of = published.table(name)
    found = compared.compare(of, compared.runs_in(runs) if runs else [], model)
    if runs and not any(cell.measured for cell in found.cells):
        _complain(name)
    _write(found, form, out)


def _list() -> None:
    from holdfast.cli import console
    from holdfast.study import published

    rows = [
        (name, of.about, "grid" if of.grid else "published only")
        for name in published.names()
        for of in [published.table(name)]
    ]
    console.out.print(console.names_table("tables", rows, ("name", "", "")))


def _complain(name: str) -> None:
    from holdfast.cli import console

    text = f"None of these runs measures a cell of {name}. Its runs: holdfast sweep {name}"
    console.err.print(text, highlight=False, soft_wrap=True, markup=False)


def _write(found: object, form: Format, out: Path | None) -> None:
    from holdfast.cli import console
    from holdfast.machine.files import write_text
    from holdfast.reporting import sheets as formats
    from holdfast.study import table_sheets
    from holdfast.study.compared import Compared

    assert isinstance(found, Compared)
    text = {
        Format.text: lambda: formats.text(table_sheets.sheets(found), console.out.width),
        Format.markdown: lambda: formats.markdown(table_sheets.sheets(found)),
        Format.latex: lambda: formats.latex(table_sheets.sheets(found)),
        Format.csv: lambda: formats.csv_text(table_sheets.records(found)),
        Format.json: lambda: formats.json_text(table_sheets.whole(found)),
    }[form]()
    if out is None:
        typer.echo(visible(text), nl=False)
        return
    if out.is_dir():
        raise OutputError(f"Expected a file to write, found a folder: {out}.")
    try:
        write_text(out, text)
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}.") from None
    console.out.print(f"Table: {out}", highlight=False, soft_wrap=True, markup=False)
