"""`holdfast generate | moderate | rate | score | compare`: the parts of an evaluation, on files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.errors import RecipeError, StepFailed

Device = Annotated[str, typer.Option(help="Device: auto, cpu, cuda or mps.")]
Judge = Annotated[str, typer.Option(help="Name of a judge (see holdfast list judges), or a Python file.")]
JudgePath = Annotated[str | None, typer.Option(help="Model of the judge: a folder, a Hub id or world.")]
Threshold = Annotated[float | None, typer.Option(help="Score above which an answer is harmful.")]
ServerModel = Annotated[
    str | None, typer.Option("--model", help="For a judge on a server: name of the model.")
]
ServerUrl = Annotated[
    str | None, typer.Option("--base-url", help="For a judge on a server: its address, ending in /v1.")
]
MaxCalls = Annotated[
    int | None, typer.Option(min=1, help="For a judge on a server: maximum number of calls.")
]
Timeout = Annotated[
    float | None, typer.Option(min=0.001, help="For a server: maximum number of seconds for one call.")
]
MaxUnparsed = Annotated[
    float, typer.Option(min=0, max=1, help="Share of unparsed answers above which the judge has failed.")
]


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model: a folder, a Hub id, or world.")],
    out: Annotated[Path, typer.Option(help="JSONL file for the answers.")],
    harmful: Annotated[
        str | None,
        typer.Option(help="Harmful prompts: a name (see holdfast list tasks), world, a file or a Hub id."),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Name of a task whose test rows to use (see holdfast list tasks).")
    ] = None,
    task_rows: Annotated[str | None, typer.Option(help="Your own task rows.")] = None,
    benign: Annotated[str | None, typer.Option(help="Harmless questions, to measure over-refusal.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Maximum number of prompts of each kind.")] = 1000,
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter on the model; repeat the option for several, in their order."),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="Address of an OpenAI-compatible server to ask instead; the key is OPENAI_API_KEY."
        ),
    ] = None,
    template: Annotated[
        str, typer.Option(help="Prompt template: chat, alpaca, alpaca_newline, auto.")
    ] = "auto",
    template_date: Annotated[
        str | None,
        typer.Option(help="Date for a chat template that writes one, as in 2026-03-01. Default: today."),
    ] = None,
    system: Annotated[str, typer.Option(help="System message or text before every question.")] = "",
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Maximum length of an answer in tokens; tasks have their own limit.")
    ] = 512,
    task_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum length of an answer to a task. Default: the task's.")
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="0 decodes greedily; above 0, answers are sampled.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the most likely tokens that have this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    timeout: Timeout = None,
    max_failed: Annotated[
        float, typer.Option(min=0, max=1, help="Share of failed answers above which the command fails.")
    ] = 0.05,
    quantization: Annotated[str | None, typer.Option(help="Load the model in nf4 or int8.")] = None,
    device: Device = "auto",
) -> None:
    """Generate a model's answers to prompts, or resume generating."""
    from holdfast.cli import console
    from holdfast.measuring import generating

    how = {
        "path": model, "template": template, "template_date": template_date, "quantization": quantization,
    }  # fmt: skip
    decoding = {
        "max_new_tokens": max_new_tokens, "task_new_tokens": task_new_tokens, "system": system,
        "temperature": temperature, "top_p": top_p,
    }  # fmt: skip
    limit = {} if timeout is None else {"timeout": timeout}
    server = None if endpoint is None else {"base_url": endpoint, **limit}
    if server is None:
        only_with("--endpoint", limit)
    with console.bar(f"answers of {model}") as progress:
        rows = generating.generate(
            how, out, harmful=harmful, task=task, task_rows=task_rows, benign=benign, prompts=prompts,
            adapters=adapter or [], endpoint=server, decoding=decoding, seed=seed, device=device,
            progress=progress,
        )  # fmt: skip
    failed = sum("error" in row for row in rows)
    say(f"{len(rows)} answers{f', {failed} failed' if failed else ''}: {out}")
    _say_left_out(rows)
    if failed > max_failed * len(rows):
        first = next(row["error"] for row in rows if "error" in row)
        again = " Run the same command again to ask the failed questions again." if endpoint else ""
        raise StepFailed(
            f"{failed} of {len(rows)} answers failed, more than the permitted share of {max_failed:g}. The "
            f"first reason: {first}.{again} To use the others, set --max-failed."
        )


def moderate(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="File from holdfast generate.")],
    out: Annotated[Path, typer.Option(help="JSONL file for the verdicts.")],
    judge: Judge = "keyword",
    judge_path: JudgePath = None,
    threshold: Threshold = None,
    model: ServerModel = None,
    base_url: ServerUrl = None,
    max_calls: MaxCalls = None,
    timeout: Timeout = None,
    max_unparsed: MaxUnparsed = 0.05,
    device: Device = "auto",
) -> None:
    """Judge the answers to harmful prompts, or resume judging."""
    from holdfast.cli import console
    from holdfast.measuring import on_files

    with console.bar(f"verdicts of {judge}") as progress:
        rows = on_files.moderate(
            answers, out, judge=judge, path=judge_path, threshold=threshold, model=model, base_url=base_url,
            max_calls=max_calls, timeout=timeout, max_unparsed=max_unparsed, device=device, progress=progress,
        )  # fmt: skip
    found = [row["verdict"] for row in rows]
    _say_left_out(rows)
    say(", ".join(f"{found.count(v)} {v}" for v in ("harmful", "safe", "unparsed")) + f": {out}")


def rate(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="File from holdfast generate.")],
    out: Annotated[Path, typer.Option(help="JSONL file for the ratings.")],
    judge: Annotated[str, typer.Option(help="alpaca_eval, mt_bench, or a Python file with your own judge.")],
    task: Annotated[
        str | None, typer.Option(help="Task of the answers. Default: the task for which they were generated.")
    ] = None,
    model: ServerModel = None,
    base_url: ServerUrl = None,
    max_calls: MaxCalls = None,
    timeout: Timeout = None,
    max_unparsed: MaxUnparsed = 0.05,
) -> None:
    """Let a judge rate the answers to a task, or resume rating."""
    from holdfast.cli import console
    from holdfast.measuring import on_files

    with console.bar(f"ratings by {judge}") as progress:
        rows = on_files.rate(
            answers, out, judge=judge, task=task, model=model, base_url=base_url, max_calls=max_calls,
            timeout=timeout,
            max_unparsed=max_unparsed, progress=progress,
        )  # fmt: skip
    _say_left_out(rows)
    without = sum(row["rating"] is None for row in rows)
    say(f"{len(rows) - without} ratings, {without} unparsed: {out}")


def score(
    answers: Annotated[Path, typer.Argument(metavar="ANSWERS", help="File from holdfast generate.")],
    verdicts: Annotated[
        list[Path] | None,
        typer.Argument(help="Files from holdfast moderate; the first gives the headline score."),
    ] = None,
    ratings: Annotated[
        Path | None, typer.Option(help="File from holdfast rate, which gives the score of the task.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Task whose grader to use. Default: the task for which the answers were generated."
        ),
    ] = None,
    grader: Annotated[
        str | None, typer.Option(help="Another grader: exact, contains, number, rouge1.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    items: Annotated[
        Path | None, typer.Option(help="JSONL file for the score of each answer, for holdfast compare.")
    ] = None,
) -> None:
    """Compute the scores of one model, with n, standard error and interval."""
    from holdfast.cli import console
    from holdfast.measuring import on_files

    scores = on_files.score(
        answers, verdicts or [], ratings=ratings, task=task, grader=grader, out=out, items=items
    )
    console.out.print(console.scores_table(scores))
    for name, judge in scores["judges"].items():
        if judge["unparsed"]:
            total = judge["unparsed"] + judge["n"]
            say(f"{name}: {judge['unparsed']} of {total} answers are unparsed and left out of the score.")
    if scores["failed"]:
        say(f"{scores['failed']} answers failed and have no verdict.")
    if scores["not_measured"]:
        say(f"Not measured: {', '.join(scores['not_measured'])}.")
    if out is not None:
        say(f"Scores: {out}")


def compare(
    first: Annotated[Path, typer.Argument(metavar="FIRST", help="Verdicts, ratings or items of one model.")],
    second: Annotated[Path, typer.Argument(metavar="SECOND", help="The same for the other model.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the differences.")] = None,
) -> None:
    """Compare two models on the same prompts: difference, 95 % interval, p."""
    from holdfast.cli import console
    from holdfast.measuring.comparing import compare as differences

    found = differences(first, second, out=out)
    console.out.print(console.differences_table(found))
    if out is not None:
        say(f"Differences: {out}")


def only_with(what: str, given: Mapping[str, Any]) -> None:
    """Raise RecipeError if an option is given that belongs to something else."""
    named = [name.replace("_", "-") for name, value in given.items() if value is not None]
    if named:
        raise RecipeError(f"--{named[0]} is only for {what}. Leave it out.")


def _say_left_out(rows: list[dict[str, Any]]) -> None:
    """Say which parameters the server did not accept."""
    names = sorted({name for row in rows for name in row.get("without", ())})
    if names:
        say(f"The server does not accept {', '.join(names)}, so its own default applies to some answers.")


def say(text: str) -> None:
    """Print one line of results."""
    from holdfast.cli import console

    console.out.print(text, highlight=False, soft_wrap=True, markup=False)
