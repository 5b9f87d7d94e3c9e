"""`holdfast gate | check`: whether a fine-tuned model is still safe, with and without a decision."""

from __future__ import annotations

import json
import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from holdfast.cli.measuring import (
    Device,
    JudgePath,
    MaxCalls,
    ServerModel,
    ServerUrl,
    Threshold,
    Timeout,
    say,
)

Against = Annotated[
    str | None,
    typer.Option(
        metavar="START",
        help="Model before: a model, an adapter or answers. Default: the base model of the adapter.",
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(help="Harmful prompts: a name (see holdfast list tasks), world, a file or a Hub id."),
]
Benign = Annotated[str | None, typer.Option(help="Harmless questions, or none. Default: built in.")]
TaskName = Annotated[str | None, typer.Option(help="Name of a task whose test rows to use.")]
TaskRows = Annotated[str | None, typer.Option(help="Your own task rows.")]
JudgeName = Annotated[
    str | None, typer.Option(help="Judge (see holdfast list judges). Default: the best one on this machine.")
]
Base = Annotated[
    str | None, typer.Option(help="Base model of adapters, if the one that they name is not here.")
]
Template = Annotated[str, typer.Option(help="Prompt template: chat, alpaca, alpaca_newline, auto.")]
System = Annotated[str, typer.Option(help="System message or text before every question.")]
Tokens = Annotated[int, typer.Option(min=1, help="Maximum length of an answer in tokens.")]
Quantization = Annotated[str | None, typer.Option(help="Load the models in nf4 or int8.")]
Work = Annotated[
    Path, typer.Option(help="Folder that keeps answers and verdicts; the model before is measured once.")
]


class Format(StrEnum):
    """The formats of the result."""

    text = "text"
    json = "json"
    junit = "junit"
    github = "github"


As = Annotated[Format, typer.Option("--format", help="github: annotations and the summary of the job.")]
Out = Annotated[Path | None, typer.Option(help="File for the result in this format; the screen shows text.")]


def gate(
    new: Annotated[list[str], typer.Argument(metavar="NEW...", help="Models, adapters or files of answers.")],
    against: Against = None,
    prompts: Prompts = None,
    benign: Benign = None,
    task: TaskName = None,
    task_rows: TaskRows = None,
    judge: JudgeName = None,
    judge_path: JudgePath = None,
    threshold: Threshold = None,
    model: ServerModel = None,
    base_url: ServerUrl = None,
    max_calls: MaxCalls = None,
    timeout: Timeout = None,
    max_rise: Annotated[
        float, typer.Option(help="Permitted rise of the harmful score in percentage points.")
    ] = 2.0,
    max_refusal_rise: Annotated[
        float | None, typer.Option(help="Permitted rise of the over-refusal rate. Default: only measured.")
    ] = None,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Least score on the task in percent. Default: only measured.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Confidence of each decision.")] = 0.95,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of questions of each set.")] = 1000,
    base: Base = None,
    template: Template = "auto",
    system: System = "",
    max_new_tokens: Tokens = 512,
    quantization: Quantization = None,
    format: As = Format.text,
    out: Out = None,
    work: Work = Path("runs/gate"),
    device: Device = "auto",
) -> None:
    """Decide whether fine-tuned models are as safe as the model before, on the same prompts.

    Exit codes: 0 passed, 3 failed, 4 not enough prompts to say; 1 and 2 as for every command.
    """
    from holdfast.cli import console
    from holdfast.machine.outputs import check_results
    from holdfast.measuring import gating

    check_results([out], [*new, against])
    with console.bar("gate") as progress:
        result = gating.gate(
            new, against=against, prompts=prompts, benign=benign, task=task, task_rows=task_rows, judge=judge,
            max_rise=max_rise, max_refusal_rise=max_refusal_rise, min_accuracy=min_accuracy,
            confidence=confidence, most=limit, base=base,
            weights={"template": template, "quantization": quantization},
            decoding={"system": system, "max_new_tokens": max_new_tokens}, work=work, device=device,
            progress=progress, path=judge_path, threshold=threshold, model=model, base_url=base_url,
            max_calls=max_calls, timeout=timeout,
        )  # fmt: skip
    _show(result, format, out)
    if result["exit_code"]:
        raise typer.Exit(result["exit_code"])


def _show(result: dict[str, Any], format: Format, out: Path | None) -> None:
    """Print the result, or write it to a file; GitHub's job summary goes to the file that GitHub names."""
    from holdfast.machine.files import write_text
    from holdfast.machine.outputs import written
    from holdfast.reporting import gated

    made = {
        Format.text: gated.as_text,
        Format.json: lambda found: json.dumps(found, indent=1, ensure_ascii=False),
        Format.junit: gated.as_junit,
        Format.github: gated.as_annotations,
    }[format](result)
    if format == Format.github and os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(os.environ["GITHUB_STEP_SUMMARY"]).open("a", encoding="utf-8") as summary:
            summary.write(gated.as_summary(result))
    if out is not None:
        with written(out):
            write_text(out, made if made.endswith("\n") else made + "\n")
        made = gated.as_text(result)
    say(made)


def check(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model, adapter or file of answers to measure.")
    ],
    adapter: Annotated[
        list[str] | None,
        typer.Option(help="Adapter on the model; repeat the option for several, in their order."),
    ] = None,
    against: Against = None,
    prompts: Prompts = None,
    benign: Benign = None,
    task: TaskName = None,
    task_rows: TaskRows = None,
    judge: JudgeName = None,
    judge_path: JudgePath = None,
    threshold: Threshold = None,
    judge_model: ServerModel = None,
    base_url: ServerUrl = None,
    max_calls: MaxCalls = None,
    timeout: Timeout = None,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of questions of each set.")] = 200,
    base: Base = None,
    template: Template = "auto",
    system: System = "",
    max_new_tokens: Tokens = 256,
    quantization: Quantization = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    work: Work = Path("runs/gate"),
    device: Device = "auto",
) -> None:
    """Show how safe a model is before and after fine-tuning, and what to do next."""
    from holdfast.cli import console
    from holdfast.machine.files import write_json
    from holdfast.machine.outputs import check_results, written
    from holdfast.measuring import gating
    from holdfast.reporting import gated

    check_results([out], [model, against])
    with console.bar("check") as progress:
        result = gating.check(
            model, adapters=adapter or [], against=against, prompts=prompts, benign=benign, task=task,
            task_rows=task_rows, judge=judge, most=limit, base=base,
            weights={"template": template, "quantization": quantization},
            decoding={"system": system, "max_new_tokens": max_new_tokens}, work=work, device=device,
            progress=progress, path=judge_path, threshold=threshold, model=judge_model, base_url=base_url,
            max_calls=max_calls, timeout=timeout,
        )  # fmt: skip
    if out is not None:
        with written(out):
            write_json(out, result)
    say(gated.as_check(result))
