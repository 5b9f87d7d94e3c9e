"""The output of the command: a bar for the running step, a line for each finished step, tables at the end.

Everything that the command prints goes through `Screen` or `visible`: a control character from a file, a
model or a server never reaches a terminal, where it could hide text, move the cursor or set the title.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from holdfast.errors import visible
from holdfast.machine import progress


class Screen(Console):
    """A console that writes control characters only for its own styles and its own cursor."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Make a text of a string, before its width is measured."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        """Render, with every text made `visible`."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


out = Screen()
err = Screen(stderr=True)


EVERY = 60.0
"""Seconds between two lines of progress in a log file."""


class Bars(progress.Progress):
    """Draws progress on standard error; in a log file, a line for each step and one each minute.

    Args:
        finished: print a line for each finished step.
        verbose: also print a line for each step that was complete before; they are counted otherwise.
    """

    def __init__(self, prefix: str = "", finished: bool = True, verbose: bool = False) -> None:
        self.prefix, self.finished, self.verbose = prefix, finished, verbose
        self.first: tuple[float, int] | None = None
        self.told = (0.0, 0)
        self.title = ""
        self.said: set[str] = set()
        self.ran = 0
        self.cached = 0
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(compact=True),
            console=err,
            transient=True,
            disable=not err.is_terminal,
        )
        self.task: Any = None

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()
        if self.finished and self.ran and self.cached and not self.verbose:
            steps = "1 step was" if self.cached == 1 else f"{self.cached:,} steps were"
            err.print(f"[dim]cached[/] {steps} complete before (-v lists them)", highlight=False)

    def begin(self, title: str, resumed: bool) -> None:
        """Show a bar for the step."""
        self.title = f"{self.prefix}{title}" + (" (resumed)" if resumed else "")
        self._remove()  # a step that failed
        self.first = None
        self.task = self.bars.add_task(escape(self.title), total=None, facts="")

    def advance(self, done: int, total: int, **facts: Any) -> None:
        """Move the bar, and show loss, state and speed beside it."""
        shown = []
        if facts.get("loss") is not None:
            shown.append(f"loss {facts['loss']:.3f}")
        if facts.get("state"):
            shown.append(str(facts["state"]))
        if facts.get("tokens_per_second"):
            shown.append(f"{facts['tokens_per_second']:,.0f} tokens/s")
        self.bars.update(self.task, completed=done, total=total, facts=", ".join(shown))
        if not err.is_terminal:
            self._line(done, total, shown)

    def _line(self, done: int, total: int, shown: Sequence[str]) -> None:
        """In a log file, print a line from time to time, with an estimate of the time that is left."""
        now = time.monotonic()
        if self.first is None:
            self.first = self.told = now, done
            return
        began, before = self.first
        if now - self.told[0] < EVERY or done <= before:
            return
        self.told = now, done
        left = time_left(now - began, done - before, total - done)
        text = ", ".join([f"{self.title}: {done:,} of {total:,}", *shown, left])
        err.print(f"[dim]...[/]    {escape(text)}", highlight=False, soft_wrap=True)

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """Replace the bar by one line for the step."""
        self._remove()
        self.ran += not cached
        self.cached += cached
        text = escape(self.prefix + title if cached or not self.title else self.title)
        self.title = ""
        if self.finished and cached and self.verbose:
            err.print(f"[dim]cached[/] {text}", highlight=False, soft_wrap=True)
        elif self.finished and not cached:
            tail = f" [dim]{seconds or 0:.1f} s[/]"
            err.print(f"[green]done[/]   {text}{tail}", highlight=False, soft_wrap=True)

    def checking(self, begins: bool) -> None:
        """Show a bar for the checks before a run."""
        self._remove()
        if begins:
            self.title = "checks before the run"
            self.task = self.bars.add_task(self.title, total=None, facts="")

    def _remove(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def say(self, text: str) -> None:
        """Print a message, the first time only."""
        if text not in self.said:
            self.said.add(text)
            err.print(escape(text), highlight=False, soft_wrap=True)


def time_left(seconds: float, done: float, left: float) -> str:
    """An estimate of the time that `left` units take, if `done` units took `seconds`."""
    return f"about {max(1, seconds / done * left / 60):.0f} min left"


class OnceHandler(logging.Handler):
    """Prints each warning of Holdfast once on standard error."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning."""
        text = record.getMessage()
        if text not in self.said:
            self.said.add(text)
            err.print(escape(text), highlight=False, soft_wrap=True)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work on one file; yields a function to call with the rows done and the rows in total."""
    with Bars() as bars:
        bars.begin(title, False)
        began = time.monotonic()
        yield bars.advance
        bars.end(title, False, time.monotonic() - began)


def _results(head: Sequence[str], caption: str) -> Table:
    """A table of results that fits 80 columns: the first column folds, so that no name is cut."""
    table = Table(caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    for index, column in enumerate(head):
        words = column.replace(" ", "\n").replace("\n↓", " ↓").replace("\n↑", " ↑")
        if index == 0:
            table.add_column(column, overflow="fold")
        else:  # a number is never broken
            table.add_column(words, justify="right", no_wrap=True)
    return table


def scores_table(scores: Mapping[str, Any]) -> Table:
    """The results of `holdfast score`; arrows show which direction is better."""
    caption = "percent ± standard error, 95 % interval; ↓ lower is better, ↑ higher is better"
    table = _results(("score", "", "95\N{NO-BREAK SPACE}%", "n"), caption)
    names = [
        (f"{found['title']} ↓ ({judge})", "harmful_score", "n", found)
        for judge, found in scores["judges"].items()
    ]
    names += [
        (f"{scores['task_title']} ↑ ({scores['task']})", "task_score", "n_task", scores),
        ("harmonic mean ↑ (100 - harmful score, accuracy)", "harmonic_mean", "n_harmonic", scores),
        ("benign compliance ↑", "benign_compliance", "n_benign", scores),
        ("over-refusal rate ↓", "over_refusal_rate", "n_benign", scores),
        ("gibberish rate ↓", "gibberish_rate", "n_gibberish", scores),
    ]
    for title, key, n, found in names:
        if found.get(n):
            interval = found[f"{key}_interval"]  # None for a single number
            shown = f"{interval[0]:.1f} to {interval[1]:.1f}" if interval else ""
            table.add_row(escape(title), measured(found, key), shown, str(found[n]))
    return table


def differences_table(found: Mapping[str, Any]) -> Table:
    """The results of `holdfast compare`."""
    several = " (Holm-corrected for all scores)" if len(found) > 1 else ""
    caption = f"second minus first, on the same prompts; p{several}: McNemar or sign-flip test\n"
    caption += "not clear: not distinguishable at 5 %"
    table = _results(("score", "first", "second", "diff.", "95\N{NO-BREAK SPACE}%", "p", "n", ""), caption)
    for name, one in found.items():
        low_high = f"{one['interval'][0]:+.1f} to {one['interval'][1]:+.1f}" if one["interval"] else ""
        told = "different" if one["p_holm"] <= 0.05 else "not clear"
        left = f" ({one['left_out']} left out)" if one["left_out"] else ""
        table.add_row(
            escape((one.get("title") or name.replace("_", " ")) + left), f"{one['first']:.1f}",
            f"{one['second']:.1f}", f"{one['difference']:+.1f}", low_high, f"{one['p_holm']:.2g}",
            str(one["n"]), told,
        )  # fmt: skip
    return table


def measured(row: Mapping[str, Any], name: str) -> str:
    """A share with its standard error, or "not measured"."""
    if row.get(name) is None:
        return "not measured"
    error = row.get(f"{name}_stderr")
    return f"{row[name]:.1f}" + ("" if error is None else f" ± {error:.1f}")


def rows_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """The results of one or more runs; arrows show which direction is better."""
    rows = list(rows)
    several = len({row["alignment"] for row in rows} - {None}) > 1
    seeds = len({row.get("seed") for row in rows}) > 1
    task = " / ".join(dict.fromkeys(row.get("task_title", "finetune accuracy") for row in rows))
    harm = " / ".join(dict.fromkeys(map(harm_title, rows)))
    times = ("alignment", "training") if several else ("training",)
    names = ("model", "seed") if seeds else ("model",)
    table = _results(
        (*names, "harmful rows", f"{harm} ↓", f"{task} ↑", "benign compliance ↑", *times),
        "percent ± standard error; ↓ lower is better, ↑ higher is better",
    )
    seen = set()
    for row in rows:
        if row["steps"]["score"] in seen:
            continue
        seen.add(row["steps"]["score"])
        ratio, aligned = row["poison_ratio"], row["alignment"]
        by = f", {row['labels'][aligned]}" if several and aligned and row["user"] is None else ""
        unparsed = f"\n{row['unparsed']} unparsed" if row.get("unparsed") else ""
        table.add_row(
            escape(row["name"] + by),
            *([str(row.get("seed"))] if seeds else []),
            "" if ratio is None else f"{100 * ratio:g} %",
            measured(row, "harmful_score") + unparsed,
            measured(row, "task_score" if "task_score" in row else "finetune_accuracy"),
            measured(row, "benign_compliance"),
            *([_seconds(row["alignment_seconds"])] if several else []),
            _seconds(row["seconds"]),
        )
    return table


def harm_title(row: Mapping[str, Any]) -> str:
    """The name of a row's harmful score: "attack success rate" if its judge only looks for refusals."""
    judge = (row.get("judges") or {}).get(row.get("judge")) or {}
    return str(judge.get("title") or "harmful score")


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} s"


def protocol_text(name: str, changes: Mapping[str, Any]) -> str:
    """A line with the protocol of a recipe and the keys that the recipe changes."""
    changed = ", ".join(f"{key}={value}" for key, value in changes.items())
    return f"Protocol {name}, changed: {changed}" if changed else f"Protocol {name}, unchanged."


def steps_table(steps: Sequence[Any], cached: set[str], begun: set[str]) -> Table:
    """The steps of a plan and the state of each: cached, to resume, or to run."""
    table = Table()
    for column in ("step", "what", "", "state"):
        table.add_column(column, overflow="fold")
    for step in steps:
        state = "[dim]cached[/]" if step.id in cached else "resume" if step.id in begun else "[bold]run[/]"
        table.add_row(step.id, escape(step.title), escape(step.detail), state)
    return table


def names_table(title: str, rows: Iterable[Sequence[str]], head: Sequence[str] = ("", "", "")) -> Table:
    """Names, descriptions and origins; `head` holds the titles of the columns, if they need any."""
    table = Table(title=title, title_justify="left", show_header=any(head), box=None, padding=(0, 2, 0, 0))
    for column in head:
        table.add_column(column, overflow="fold")
    for name, what, *rest in rows:
        table.add_row(f"[bold]{escape(name)}[/]", escape(what), *(f"[dim]{escape(text)}[/]" for text in rest))
    return table
