"""`holdfast mix | filter`: the rows to fine-tune on."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.measuring import (
    Device,
    JudgePath,
    MaxCalls,
    ServerUrl,
    Timeout,
    only_with,
    say,
)
from holdfast.errors import RecipeError

SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Drop and count the rows that cannot be used.")]


class Score(StrEnum):
    """A score of rows that look harmless."""

    datashield = "datashield"
    anchoring = "anchoring"


class Unparsed(StrEnum):
    """What to do with a row for which the judge gave no verdict."""

    drop = "drop"
    keep = "keep"


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
    skip_bad: SkipBad = False,
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


def filter_rows(
    rows: Annotated[
        str, typer.Argument(metavar="FILE", help="Rows to fine-tune on: a file, a folder or a Hub id.")
    ],
    out: Annotated[Path, typer.Option(help="JSONL file for the rows that are kept.")],
    judge: Annotated[
        str | None,
        typer.Option(
            help="Name of a judge (see holdfast list judges), or a Python file. Default: beaver_dam."
        ),
    ] = None,
    judge_path: JudgePath = None,
    threshold: Annotated[
        float | None, typer.Option(help="Score above which an answer is harmful, or a row is dropped.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", help="With --score: the model that reads the rows. For a judge on a server: its name."
        ),
    ] = None,
    base_url: ServerUrl = None,
    max_calls: MaxCalls = None,
    timeout: Timeout = None,
    unparsed: Annotated[
        Unparsed, typer.Option(help="What to do with rows for which the judge gave no verdict.")
    ] = Unparsed.drop,
    score: Annotated[
        Score | None, typer.Option(help="Drop rows that look harmless and undo safety, by a score.")
    ] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="With --score: adapter on the model; repeat for several.")
    ] = None,
    harmful: Annotated[
        str | None, typer.Option(help="With --score: harmful rows with harmful answers, the anchors.")
    ] = None,
    safe: Annotated[
        str | None, typer.Option(help="With --score: rows with safe answers, the anchors.")
    ] = None,
    anchors: Annotated[int | None, typer.Option(min=1, help="With --score: anchors of each kind.")] = None,
    drop: Annotated[
        float | None, typer.Option(help="With --score: the share of rows to drop. Default: 0.1.")
    ] = None,
    by: Annotated[
        str | None, typer.Option(help="With --score anchoring: representation (default) or gradient.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option(help="With --score datashield: layer of the states. Default: the last.")
    ] = None,
    template: Annotated[
        str, typer.Option(help="With --score: prompt template: chat, alpaca, alpaca_newline, auto.")
    ] = "auto",
    skip_bad: SkipBad = False,
    max_unparsed: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of rows without a verdict that is permitted. Default: 0.05."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Remove the rows that a judge flags as harmful, or that a score finds suspicious."""
    from holdfast.cli import console
    from holdfast.measuring.filtering import filter_rows as leave_out
    from holdfast.measuring.score_filtering import filter_by_score

    server: dict[str, Any] = {"base_url": base_url, "max_calls": max_calls, "timeout": timeout}
    limit: dict[str, Any] = {} if max_unparsed is None else {"max_unparsed": max_unparsed}
    options: dict[str, Any] = {"anchors": anchors, "drop": drop, "by": by, "layer": layer}
    if score is None:
        given = {"harmful": harmful, "safe": safe, "adapter": adapter, **options}
        only_with("--score", {**given, "template": None if template == "auto" else template})
        with console.bar(f"verdicts of {judge or 'beaver_dam'}") as progress:
            facts = leave_out(
                rows, out, judge=judge or "beaver_dam", path=judge_path, threshold=threshold, model=model,
                unparsed=unparsed.value, skip_bad=skip_bad, device=device,
                progress=progress, **limit, **server,
            )  # fmt: skip
    else:
        kept = unparsed.value if unparsed != Unparsed.drop else None
        only_with("a judge", {"judge": judge, "judge_path": judge_path, "unparsed": kept, **limit, **server})
        if model is None or harmful is None or safe is None:
            raise RecipeError(f"--score {score.value} needs --model, --harmful and --safe.")
        with console.bar(f"scores of {score.value}") as progress:
            facts = filter_by_score(
                rows, out, score=score.value, model=model, adapters=adapter or [], harmful=harmful, safe=safe,
                threshold=threshold, template=template, skip_bad=skip_bad, device=device, progress=progress,
                **options,
            )  # fmt: skip
    left = f"{facts['flagged']} flagged, {facts['unparsed']} unparsed"
    say(f"{facts['kept']} of {facts['rows']} rows kept ({left}): {out}")
    if facts.get("bad_rows_dropped"):
        say(f"{facts['bad_rows_dropped']:,} rows cannot be used and are dropped.")
    if facts.get("confusion"):
        say(_confusion(facts["confusion"]))
    if facts.get("attack_rows"):
        say(_attack_rows(facts["attack_rows"]))


def _attack_rows(found: Mapping[str, Any]) -> str:
    recall = f"{found['found']} of {found['rows']} harmful rows are dropped ({found['recall']:.1f} %)"
    if found["precision"] is None:
        return f"By the rows' own labels: {recall}."
    return (
        f"By the rows' own labels: {recall}, and {found['precision']:.1f} % of the dropped rows are harmful."
    )


def _confusion(found: dict[str, Any]) -> str:
    def percent(name: str) -> str:
        return "not measured" if found[name] is None else f"{found[name]:.2f} %"

    return (
        f"By the rows' own labels: false negatives {percent('false_negative_rate')}, false positives "
        f"{percent('false_positive_rate')}."
    )
