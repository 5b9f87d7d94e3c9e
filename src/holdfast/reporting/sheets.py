"""A table of texts in the formats of papers and spreadsheets: Markdown, CSV, LaTeX, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "→": r"$\rightarrow$", "–": "--",
    "<": r"$<$", ">": r"$>$",
}  # fmt: skip


@dataclass(frozen=True)
class Sheet:
    """A table: a title, the columns, rows of texts, and notes below it.

    Attributes:
        left: the number of columns that hold names; the others hold numbers.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    left: int = 1


def text(sheets: Sequence[Sheet], width: int = 110) -> str:
    """The tables in plain text, at most `width` wide: columns that do not fit follow in another block."""
    parts = []
    for sheet in sheets:
        rows = [sheet.columns, *sheet.rows]
        widths = [max(len(row[n]) for row in rows) for n in range(len(sheet.columns))]
        lines = [sheet.title]
        for columns in _blocks(widths, sheet.left, width):
            lines += ["", *_block(rows, widths, sheet.left, columns)]
        parts.append("\n".join(lines))
        parts += ["\n".join(sheet.notes)] if sheet.notes else []
    return "\n\n".join(parts) + "\n"


def _blocks(widths: Sequence[int], left: int, width: int) -> list[list[int]]:
    """The columns of each block; the first `left` columns are part of every block."""
    blocks = [list(range(left))]
    for column in range(left, len(widths)):
        used = sum(widths[n] + 2 for n in [*blocks[-1], column]) - 2
        if used > width and len(blocks[-1]) > left:
            blocks.append(list(range(left)))
        blocks[-1].append(column)
    return blocks


def _block(
    rows: Sequence[Sequence[str]], widths: Sequence[int], left: int, columns: Sequence[int]
) -> list[str]:
    lines = []
    for number, row in enumerate(rows):
        cells = [row[n].ljust(widths[n]) if n < left else row[n].rjust(widths[n]) for n in columns]
        lines.append("  ".join(cells).rstrip())
        if number == 0:
            lines.append("-" * (sum(widths[n] + 2 for n in columns) - 2))
    return lines


def markdown(sheets: Sequence[Sheet]) -> str:
    """The tables in Markdown."""
    parts = []
    for sheet in sheets:
        marks = ["---" if n < sheet.left else "---:" for n in range(len(sheet.columns))]
        lines = [_line(sheet.columns), f"|{'|'.join(marks)}|", *(_line(row) for row in sheet.rows)]
        parts += [f"**{_cell(sheet.title)}**", "\n".join(lines)]
        parts += ["\n".join(f"- {_cell(note)}" for note in sheet.notes)] if sheet.notes else []
    return "\n\n".join(parts) + "\n"


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(_cell(text) for text in texts)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def latex(sheets: Sequence[Sheet]) -> str:
    """The tables in LaTeX, with the rules of the package booktabs."""
    parts = []
    for sheet in sheets:
        columns = "".join("l" if n < sheet.left else "r" for n in range(len(sheet.columns)))
        lines = [
            r"\begin{table}", r"\centering", rf"\caption{{{escape(sheet.title)}}}",
            rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(sheet.columns), r"\midrule",
            *(_row(row) for row in sheet.rows), r"\bottomrule", r"\end{tabular}",
        ]  # fmt: skip
        lines += [rf"\par\footnotesize {escape(note)}" for note in sheet.notes]
        parts.append("\n".join([*lines, r"\end{table}"]))
    return "% Needs \\usepackage{booktabs}.\n" + "\n\n".join(parts) + "\n"


def _row(texts: Sequence[str]) -> str:
    return f"{' & '.join(escape(text) for text in texts)} \\\\"


def escape(text: str) -> str:
    """A text for LaTeX, on one line."""
    return "".join(LATEX.get(letter, letter) for letter in " ".join(text.split()))


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV, one line each; a value that is not known is empty."""
    columns = dict.fromkeys(key for record in records for key in record)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for record in records:
        writer.writerow({key: _plain(value) for key, value in record.items()})
    return out.getvalue()


def _plain(value: Any) -> Any:
    """A value for a spreadsheet: a text that would be read as a formula begins with an apostrophe."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"'{text}" if isinstance(value, str) and text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def json_text(value: Any) -> str:
    """A value as JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
