"""Runs of tiny recipes: what ran, and what must be equal between two runs."""

from __future__ import annotations

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file

from holdfast import pipeline
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.pipeline.data import make_rows, role_inputs, rows_of
from holdfast.pipeline.step import Inputs, Machine
from holdfast.recipe import Recipe
from holdfast.study.worker import work


class Inside:
    """A worker of a sweep in this process, to replace `local.start_worker`."""

    def __init__(self, folder, number, environment):
        work(folder, number)

    def poll(self):
        return 0


class Seen(Progress):
    """Titles of what ran, and of what was cached."""

    def __init__(self):
        self.ran, self.cached, self.resumed = [], [], []

    def begin(self, title, resumed):
        if resumed:
            self.resumed.append(title)

    def end(self, title, cached, seconds):
        (self.cached if cached else self.ran).append(title)


class Stopped(Seen):
    """Stops a run as Ctrl-C does, when the step of that title reports at least `done` units."""

    def __init__(self, title, done=1):
        super().__init__()
        self.title, self.done, self.now = title, done, None

    def begin(self, title, resumed):
        super().begin(title, resumed)
        self.now = title

    def advance(self, done, total, **facts):
        if self.now == self.title and done >= self.done:
            raise KeyboardInterrupt


def run(recipe, out, page=False, seen=None, **options):
    """A run on the CPU; its report is an empty file unless `page` asks for it (half a second)."""
    seen = seen or Seen()
    with nullcontext() if page else no_pages():
        asked = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        results = pipeline.run(asked, out=out, device="cpu", progress=seen, **options)
    return results, seen


def no_pages():
    """Runs write an empty report."""
    return mock.patch("holdfast.reporting.report", _no_page)


def _no_page(runs, out, **options):
    """A page that the next run may replace."""
    Path(out).write_text('<meta name="generator" content="Holdfast">')
    return Path(out)


@contextmanager
def prompts_seen():
    """Yield a list that receives every prompt, as the models read it, while the context is open."""
    from holdfast.evaluation import answering

    seen, generate = [], answering.answer_prompts

    def watched(model, tokenizer, rows, *args, **options):
        seen.extend(row["prompt"] for row in rows)
        return generate(model, tokenizer, rows, *args, **options)

    with mock.patch.object(answering, "answer_prompts", watched):
        yield seen


MEASURED = {
    "seconds", "peak_memory_bytes", "alignment_seconds", "alignment_peak_memory_bytes", "tokens_per_second",
    "cost",
}  # fmt: skip


def numbers(results):
    """Rows without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in results["rows"]]


def step_of(out, row, kind):
    """The folder of a row's step."""
    return Path(out) / "steps" / row["steps"][kind]


def weights(out, row, stage, made="adapter"):
    """What a training or a repair of a row's chain wrote, by name."""
    file = "adapter_model.safetensors" if made == "adapter" else "model.safetensors"
    return load_file(step_of(out, row, stage) / made / file)


def answers(out, row):
    """What the model of a row answered, by prompt."""
    text = (step_of(out, row, "generate") / "generations.jsonl").read_text()
    return {line["id"]: line["answer"] for line in map(json.loads, text.splitlines())}


def left(out, results):
    """All that a run leaves of which no byte may depend on how often it was stopped.

    By state and file: weights, answers, verdicts and scores.
    """
    found = {}
    for row in results["rows"]:
        for kind, steps in row["steps"].items():
            for step in steps if isinstance(steps, list) else [steps]:
                for path in sorted((Path(out) / "steps" / step).rglob("*")) if step else []:
                    if path.suffix in (".safetensors", ".jsonl") or path.name == "scores.json":
                        found[row["name"], kind, path.name] = path.read_bytes()
    return found


def prepared(asked, role, folder):
    """The rows of the data step of a role."""
    (folder / role).mkdir(parents=True, exist_ok=True)
    make_rows(Inputs(role_inputs(asked, role), Store(folder)), folder / role, Machine("cpu", folder))
    return rows_of(folder / role)
