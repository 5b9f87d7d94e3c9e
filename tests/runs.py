"""Runs of tiny recipes: what ran, and what must be equal between two runs."""

from __future__ import annotations

from holdfast import pipeline
from holdfast.machine.progress import Progress
from holdfast.recipe import Recipe


class Seen(Progress):
    """Titles of what ran, and of what was cached."""

    def __init__(self):
        self.ran, self.cached, self.resumed = [], [], []

    def begin(self, title, resumed):
        if resumed:
            self.resumed.append(title)

    def end(self, title, cached, seconds):
        (self.cached if cached else self.ran).append(title)


def run(recipe, out, **options):
    seen = Seen()
    results = pipeline.run(Recipe.load(recipe), out=out, device="cpu", progress=seen, **options)
    return results, seen


MEASURED = {
    "seconds", "peak_memory_bytes", "alignment_seconds", "alignment_peak_memory_bytes", "tokens_per_second",
    "cost",
}  # fmt: skip


def numbers(results):
    """Rows without what a clock or the machine decides."""
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in results["rows"]]
