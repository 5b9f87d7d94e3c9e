"""The output of the command: a bar for the running step, a line for each finished step, tables at the end.

Everything that the command prints goes through `Screen` or `visible`: a control character from a file, a
model or a server never reaches a terminal, where it could hide text, move the cursor or set the title.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

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
    """Draws progress on standard error; in a log file, each step has one line and no bar.

    Args:
        finished: print a line for each finished step.
    """

    def __init__(self, prefix: str = "", finished: bool = True) -> None:
        self.prefix, self.finished = prefix, finished
        self.first: tuple[float, int] | None = None
        self.told = (0.0, 0)
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

    def begin(self, title: str, resumed: bool) -> None:
        """Show a bar for the step."""
        text = f"{self.prefix}{title}" + (" (resumed)" if resumed else "")
        self._remove()  # a step that failed
        self.first = None
        self.task = self.bars.add_task(escape(text), total=None, facts="")
        if not err.is_terminal and self.finished:
            err.print(f"[dim]...[/] {escape(text)}", highlight=False)

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
        left = (now - began) / (done - before) * (total - done)
        text = ", ".join([f"{done:,} of {total:,}", *shown, f"about {left / 60:.0f} min left"])
        err.print(f"[dim]...[/] {escape(text)}", highlight=False)

    def end(self, title: str, cached: bool, seconds: float | None) -> None:
        """Replace the bar by one line for the step."""
        self._remove()
        self.ran += not cached
        self.cached += cached
        if not self.finished:
            return
        mark, tail = (
            ("[dim]cached[/]", "") if cached else ("[green]done[/]  ", f" [dim]{seconds or 0:.1f} s[/]")
        )
        err.print(f"{mark} {escape(self.prefix + title)}{tail}", highlight=False)

    def checking(self, begins: bool) -> None:
        """Show a bar for the checks before a run."""
        self._remove()
        if begins:
            self.task = self.bars.add_task("checks before the run", total=None, facts="")

    def _remove(self) -> None:
        if self.task is not None:
            self.bars.remove_task(self.task)
            self.task = None

    def say(self, text: str) -> None:
        """Print a message."""
        err.print(escape(text), highlight=False)


@contextmanager
def bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar for work on one file; yields a function to call with the rows done and the rows in total."""
    with Bars() as bars:
        bars.begin(title, False)
        began = time.monotonic()
        yield bars.advance
        bars.end(title, False, time.monotonic() - began)


def scores_table(scores: Mapping[str, Any]) -> Table:
    """The results of `holdfast score`; arrows show which direction is better."""
    table = Table(caption="percent ± standard error, 95 % interval; ↓ lower is better, ↑ higher is better")
    for column in ("score", "", "95 %", "n"):
        table.add_column(column, justify="left" if column == "score" else "right")
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
    table = Table(caption=f"second minus first, on the same prompts; p{several}: McNemar or sign-flip test")
    for column in ("score", "first", "second", "difference", "95 %", "p", "n", ""):
        table.add_column(column, justify="left" if column in ("score", "") else "right")
    for name, one in found.items():
        low_high = f"{one['interval'][0]:+.1f} to {one['interval'][1]:+.1f}" if one["interval"] else ""
        told = "different" if one["p_holm"] <= 0.05 else "not distinguishable"
        left = f"\n{one['left_out']} left out" if one["left_out"] else ""
        table.add_row(
            escape(name.replace("_", " ")), f"{one['first']:.1f}", f"{one['second']:.1f}",
            f"{one['difference']:+.1f}", low_high, f"{one['p_holm']:.2g}", f"{one['n']}{left}", told,
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
    table = Table(caption="percent ± standard error; ↓ lower is better, ↑ higher is better")
    task = " / ".join(dict.fromkeys(row.get("task_title", "finetune accuracy") for row in rows))
    for column in ("model", "harmful rows", "harmful score ↓", f"{task} ↑", "benign compliance ↑"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for column in ("alignment", "training") if several else ("training",):
        table.add_column(column, justify="right")
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
            "" if ratio is None else f"{100 * ratio:g} %",
            measured(row, "harmful_score") + unparsed,
            measured(row, "task_score" if "task_score" in row else "finetune_accuracy"),
            measured(row, "benign_compliance"),
            *([_seconds(row["alignment_seconds"])] if several else []),
            _seconds(row["seconds"]),
        )
    return table


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
