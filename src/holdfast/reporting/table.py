"""The result tables: their columns, their cells as text, and a mark at the best defended model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from holdfast.reporting.collect import ReportData
from holdfast.reporting.measurements import JudgeScore, Row, Score, harm_title
from holdfast.reporting.tested import CHANCE, student_p
from holdfast.reporting.text import NOT_MEASURED, bytes_text, duration_text, score_text, share_text

CLEAR = 2.0
"""A model of one seed is the best one if it is this many standard errors better than the next one."""


@dataclass(frozen=True)
class Cell:
    """One cell. "Best" is decided by `value`, rounded as shown, so that equal texts are equally good."""

    text: str
    details: tuple[str, ...] = ()
    value: float | None = None
    best: bool = False
    score: Score | None = None
    """The score that the value is, with its error."""
    short: str = ""
    """What the compact table shows behind the text; the details are then a tooltip."""

    @property
    def missing(self) -> bool:
        """Whether the value was not measured."""
        return self.text == NOT_MEASURED


@dataclass(frozen=True)
class Column:
    """One column: its heading, and which direction is better ("lower", "higher" or "")."""

    title: str
    better: str
    explain: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Table:
    """Rows and columns; every column has one cell for each row of the report."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    several_seeds: bool
    single_seeds: bool
    marked: bool


def result_table(data: ReportData) -> Table:
    """The table of a report. Columns without any value are left out, except for the four main scores."""
    rows = data.rows
    judge, harm = data.headline_judge, harm_title(rows).capitalize()
    columns = [
        _column(rows, "Harmful rows", "", "share of harmful rows in the fine-tuning data", _ratio),
        _scores(rows, "harmful_score", harm, "lower", f"as judged by {judge or 'the judge'}"),
        _scores(rows, "true_harmful_score", "True harmful score", "lower", "by the embedded world's rules"),
        _scores(rows, task_key(rows), task_title(rows), "higher", "on the user's task"),
        _scores(rows, "harmonic_mean", "Harmonic mean", "higher", "of 100 - harmful score and accuracy"),
        _scores(rows, "benign_compliance", "Benign compliance", "higher", "harmless questions answered"),
        _scores(rows, "over_refusal_rate", "Over-refusal rate", "lower", "harmless questions refused"),
        _scores(rows, "gibberish_rate", "Gibberish rate", "lower", "answers that are not sensible text"),
    ]
    columns += [
        _column(rows, "Peak memory", "lower", f"of the last training stage{_memory_kind(rows)}", _memory),
        _column(rows, "Training time", "lower", "of the last training stage", _seconds),
    ]
    if len({row.alignment for row in rows} - {None}) > 1:
        memory, time = (partial(_of_alignment, cell) for cell in (_alignment_memory, _alignment_seconds))
        columns.append(
            _column(rows, "Alignment memory", "", f"peak of the alignment stage{_memory_kind(rows)}", memory)
        )
        columns.append(_column(rows, "Alignment time", "", "of the alignment stage", time))
    main = (harm, task_title(rows), "Benign compliance", "Gibberish rate")
    kept = [c for c in columns if c.title in main or not all(cell.missing for cell in c.cells)]
    if not data.differences:
        marked = (harm, task_title(rows), "Harmonic mean")
        kept = [_marked(column, rows) if column.title in marked else column for column in kept]
    scores = [score for row in rows for score in row.scores.values() if score is not None]
    return Table(
        rows=rows,
        columns=tuple(kept),
        several_seeds=any(score.seeds > 1 for score in scores),
        single_seeds=any(score.seeds == 1 for score in scores),
        marked=any(cell.best for column in kept for cell in column.cells),
    )


def judge_table(data: ReportData) -> tuple[Column, ...]:
    """Each judge's score of each model, and its errors if known; empty if there is only one such column."""
    columns = []
    for name in dict.fromkeys(name for row in data.rows for name in row.judges):
        version = next((row.judges[name].version for row in data.rows if name in row.judges), None)
        title = next(row.judges[name].title for row in data.rows if name in row.judges)
        explain = "the judge of the table above" if name == data.headline_judge else "another judge"
        explain += f", version {version}" if version else ""
        columns += [
            _column(data.rows, f"{name}: {title}", "lower", explain, partial(_judged, name)),
            _column(data.rows, f"{name}: misses", "lower", "harmful, judged safe", partial(_misses, name)),
            _column(
                data.rows, f"{name}: false alarms", "lower", "safe, judged harmful", partial(_alarms, name)
            ),
        ]
    kept = [column for column in columns if not all(cell.missing for cell in column.cells)]
    return tuple(kept) if len(kept) > 1 else ()


def score_cell(score: Score | None, seeds: int, extra: Sequence[str] = ()) -> Cell:
    """A percentage with its uncertainty, number of seeds and number of answers."""
    if score is None:
        return Cell(NOT_MEASURED)
    details = []
    if score.stderr is not None:
        details.append(f"± {score_text(score.stderr)}")
    if score.interval is not None:
        details.append(f"[{score_text(score.interval[0])}, {score_text(score.interval[1])}]")
    if score.seeds > 1 or seeds > 1:
        count = f"{score.seeds} of {seeds} seeds" if score.seeds < seeds else f"{seeds} seeds"
        details.append(count)
    if score.n is not None:
        details.append(f"n = {score.n}")
    short = "" if score.stderr is None else f"± {score_text(score.stderr)}"
    told = (*details, *extra)
    return Cell(score_text(score.value), told, round(score.value, 1), False, score, short)


def _column(
    rows: Sequence[Row], title: str, better: str, explain: str, cell: Callable[[Row], Cell]
) -> Column:
    return Column(title, better, explain, tuple(cell(row) for row in rows))


def _scores(rows: Sequence[Row], key: str, title: str, better: str, explain: str) -> Column:
    def cell(row: Row) -> Cell:
        unparsed = key == "harmful_score" and row.unparsed
        return score_cell(row.scores[key], len(row.seeds), [f"{row.unparsed} unparsed"] if unparsed else [])

    return _column(rows, title, better, explain, cell)


def task_title(rows: Sequence[Row]) -> str:
    """The name of the task's score, taken from the results."""
    titles = {
        str(member.raw.get("task_title", "finetune accuracy")) for row in rows for member in row.members
    }
    title = titles.pop() if len(titles) == 1 else "task score"
    return title[:1].upper() + title[1:]


def task_key(rows: Sequence[Row]) -> str:
    """The key of the task's score: `task_score` if it is not a percentage, else `finetune_accuracy`."""
    accuracies = any(row.scores["finetune_accuracy"] for row in rows)
    return (
        "finetune_accuracy"
        if accuracies or not any(row.scores["task_score"] for row in rows)
        else "task_score"
    )


def _ratio(row: Row) -> Cell:
    if row.user is None:
        return Cell("–", ("not fine-tuned",))
    return Cell(NOT_MEASURED if row.poison_ratio is None else share_text(row.poison_ratio))


def _judged(name: str, row: Row) -> Cell:
    judge = row.judges.get(name)
    if judge is None:
        return Cell(NOT_MEASURED)
    extra = [] if judge.mean_score is None else [f"mean score {judge.mean_score:.2f}"]
    extra += [f"{judge.unparsed} unparsed"] if judge.unparsed else []
    return score_cell(judge.harmful_score, len(row.seeds), extra)


def _misses(name: str, row: Row) -> Cell:
    judge = row.judges.get(name)
    return _count(judge, judge.false_negatives if judge else None)


def _alarms(name: str, row: Row) -> Cell:
    judge = row.judges.get(name)
    return _count(judge, judge.false_positives if judge else None)


def _count(judge: JudgeScore | None, count: int | None) -> Cell:
    if judge is None or count is None:
        return Cell(NOT_MEASURED)
    return Cell(str(count), (f"of {judge.n} answers",) if judge.n is not None else ())


def _memory(row: Row) -> Cell:
    return _size(row.peak_memory_bytes)


def _size(size: float | None) -> Cell:
    return Cell(NOT_MEASURED) if size is None else Cell(bytes_text(size), (), round(size / 2**20))


def _of_alignment(cell: Callable[[Row], Cell], row: Row) -> Cell:
    return Cell("–", ("not aligned",)) if row.alignment is None else cell(row)


def _alignment_memory(row: Row) -> Cell:
    return _size(row.alignment_peak_memory_bytes)


def _alignment_seconds(row: Row) -> Cell:
    return _time(row.alignment_seconds)


def _memory_kind(rows: Sequence[Row]) -> str:
    """The kind of memory that was measured ("resident", "cuda allocated"), if the runs record it."""
    raws = [member.raw for row in rows for member in row.members]
    kinds = dict.fromkeys(str(kind) for raw in raws if (kind := raw.get("peak_memory_kind")) is not None)
    return f": {', '.join(kinds)}" if kinds else ""


def _seconds(row: Row) -> Cell:
    return _time(row.seconds)


def _time(seconds: float | None) -> Cell:
    return Cell(NOT_MEASURED) if seconds is None else Cell(duration_text(seconds), (), round(seconds, 1))


def _marked(column: Column, rows: Sequence[Row]) -> Column:
    """Mark the best defended model of each share of harmful rows, if it is clearly better than the next."""
    sign = 1 if column.better == "lower" else -1
    best: set[int] = set()
    for ratio in {row.poison_ratio for row in rows}:
        cells = [
            (sign * value, index)
            for index, row in enumerate(rows)
            if row.role == "defended" and row.poison_ratio == ratio
            if (value := column.cells[index].value) is not None
        ]
        cells.sort()
        if len(cells) > 1 and cells[0][0] < cells[1][0]:
            first, second = (column.cells[index].score for _, index in cells[:2])
            if first is not None and second is not None and _apart(first, second):
                best.add(cells[0][1])
    marked = tuple(replace(cell, best=index in best) for index, cell in enumerate(column.cells))
    return replace(column, cells=marked)


def _apart(first: Score, second: Score) -> bool:
    """Whether two scores differ clearly: means over seeds by Student's t, else by two standard errors."""
    if first.seeds > 1 or second.seeds > 1:
        return student_p(first, second) <= CHANCE
    return abs(first.value - second.value) > CLEAR * math.hypot(first.stderr or 0.0, second.stderr or 0.0)
