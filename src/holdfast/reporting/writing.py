"""Write the page; a file that Holdfast did not write is never overwritten."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from holdfast.errors import OutputError


def report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    notes: Sequence[str] = (),
    png: str | Path | None = None,
    metrics: Sequence[str] = (),
) -> Path:
    """Write a page that compares `runs`, and return its path.

    Args:
        runs: folders of runs, or their `results.json`.
        out: the HTML file to write; an earlier report is replaced, any other file is not.
        force: compare although the protocol stamps differ; the page then lists the differences.
        notes: sentences to print below the summary of the page.
        png: a PNG file to write as well: the picture at the top, with its numbers.
        metrics: the numbers to draw over the grid keys, by their keys in `results.json`; by default the
            harmful score and the score on the task.

    Raises:
        InputError: no run was given, or a metric cannot be drawn.
        DataError: a file of a run is missing, incomplete or not a Holdfast result.
        ComparisonError: the protocol stamps differ and `force` is off.
        OutputError: `out` is a folder, a file that is not a report, or cannot be written.
    """
    from holdfast.machine.files import write_text
    from holdfast.reporting.charts import save_png
    from holdfast.reporting.collect import collect
    from holdfast.reporting.cosines import check_place
    from holdfast.reporting.page import render

    out = Path(out)
    _check_writable(out)
    if png is not None:
        check_place(Path(png))
    data = collect(runs, force=force)
    page = render(data, notes=notes, metrics=metrics)
    try:
        write_text(out, page)
    except OSError as error:
        raise OutputError(f"Cannot write {out}: {error.strerror or error}.") from None
    if png is not None:
        save_png(data, Path(png))
    return out


def _check_writable(out: Path) -> None:
    """Refuse a folder and a file that is not a Holdfast report, before anything is read."""
    try:
        if out.is_dir():
            raise OutputError(f"Expected a file to write, found a folder: {out}. Give -o FILE.html.")
        if not out.exists() or out.stat().st_size == 0:
            return
        with out.open("rb") as file:
            ours = b'<meta name="generator" content="Holdfast' in file.read(2000)
    except (OSError, ValueError) as error:
        raise OutputError(f"Cannot write {out}: {getattr(error, 'strerror', None) or error}.") from None
    if not ours:
        raise OutputError(
            f"{out} exists and is not a Holdfast report; it was not changed. Give another file with -o."
        )
