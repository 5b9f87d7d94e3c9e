"""The papers' tables: published numbers with their source, one file of `tables/` each.

A file has `paper`, `arxiv`, `table`, `source` (who measured it, or who reports it), `title`, `setting`, the
names of its `columns`, and `published`: by row and metric, one number for each column, or null if the number
is not known. `mean` names a column that averages the others. `grid` says which runs measure the cells; see
`holdfast.study.tables`. A table whose protocol is not known has none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError, nearest
from holdfast.recipe.reading import read

FOLDER = Path(__file__).parent.parent / "tables"
TEXTS = ("paper", "arxiv", "table", "source", "title", "setting")
FIELDS = {*TEXTS, "columns", "mean", "published", "notes", "grid"}


@dataclass(frozen=True)
class Metric:
    """A metric of the tables: title, unit, largest value, which direction is better, and decimals."""

    title: str
    unit: str
    most: float
    better: str
    decimals: int = 2


METRICS = {
    "harmful_score": Metric("Harmful score", "%", 100, "lower"),
    "finetune_accuracy": Metric("Finetune accuracy", "%", 100, "higher"),
    "harmonic_mean": Metric("Harmonic mean of 100 - harmful score and accuracy", "%", 100, "higher"),
    "attack_success_rate": Metric("Attack success rate", "%", 100, "lower"),
    "harmfulness": Metric("Harmfulness by GPT-4", "1 to 5", 5, "lower"),
    "mt_bench": Metric("MT-Bench", "1 to 10", 10, "higher"),
    "rouge1": Metric("ROUGE-1", "%", 100, "higher"),
    "direct_harm": Metric("Harmful score on DirectHarm4", "%", 100, "lower"),
    "hex_phi": Metric("Harmful score on HEx-PHI", "%", 100, "lower"),
    "strong_reject": Metric("StrongREJECT", "0 to 1", 1, "lower", 3),
    "mmlu_pro": Metric("MMLU-Pro", "0 to 1", 1, "higher", 3),
    "seconds_per_1000_steps": Metric("Time of 1000 steps of the user stage", "s", math.inf, "lower"),
    "peak_memory_gb": Metric("Peak memory of the user stage", "GB", math.inf, "lower"),
    "alignment_seconds_per_step": Metric("Time of a step of the alignment stage", "s", math.inf, "lower"),
    "alignment_memory_gb": Metric("Peak memory of the alignment stage", "GB", math.inf, "lower"),
}
"""Every metric of the tables. The smallest value of each is 0, and 1 of those with a unit "1 to ..."."""


@dataclass(frozen=True)
class Published:
    """One published table.

    Attributes:
        numbers: by row, metric and column, the published number, or None if it is not known.
        grid: the runs that measure it, as in the file; {} if its protocol is not known.
    """

    name: str
    about: str
    paper: str
    arxiv: str
    table: str
    source: str
    title: str
    setting: str
    columns: tuple[str, ...]
    numbers: Mapping[str, Mapping[str, Mapping[str, float | None]]]
    mean: str | None = None
    notes: tuple[str, ...] = ()
    grid: Mapping[str, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of its rows, each once."""
        return tuple(dict.fromkeys(metric for row in self.numbers.values() for metric in row))

    def value(self, row: str, column: str, metric: str) -> float | None:
        """The published number of a cell, or None if it is not known."""
        return self.numbers.get(row, {}).get(metric, {}).get(column)

    @property
    def cited(self) -> str:
        """Its source in one line: "Lisa (arXiv 2405.18641), Table 3: the authors' own"."""
        paper = f"{self.paper} (arXiv {self.arxiv})" if self.arxiv else self.paper
        number = "" if self.table == "not known" else f", {self.table}"
        return f"{paper}{number}: {self.source}"


def names() -> list[str]:
    """The names of all tables, numbers in their order: lisa-2 before lisa-10."""

    def parts(name: str) -> list[tuple[bool, int | str]]:
        return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in name.split("-")]

    return sorted((path.stem for path in FOLDER.glob("*.yaml")), key=parts)


@cache
def table(name: str) -> Published:
    """Return a published table.

    Raises:
        RecipeError: there is no such table.
    """
    if name not in names():
        raise RecipeError(f"No such table: {name[:200]}.{nearest(name, names())}")
    path = FOLDER / f"{name}.yaml"
    raw, _ = read(path)
    unknown = set(raw) - FIELDS
    if unknown:
        raise RecipeError(f"{path.name}: unknown keys: {', '.join(sorted(unknown))}.")
    columns = tuple(str(column) for column in raw["columns"])
    return Published(
        name=name,
        about=path.read_text(encoding="utf-8").split("\n", 1)[0].lstrip("# "),
        numbers={
            str(row): {metric: dict(zip(columns, values, strict=True)) for metric, values in metrics.items()}
            for row, metrics in raw["published"].items()
        },
        columns=columns,
        mean=raw.get("mean"),
        notes=tuple(raw.get("notes", ())),
        grid=raw.get("grid", {}),
        **{key: str(raw[key]) for key in TEXTS},
    )
