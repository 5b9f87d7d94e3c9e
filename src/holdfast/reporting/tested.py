"""Each model tested against the undefended model on the same prompts, for the table and the finding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from holdfast.evaluation import paired
from holdfast.evaluation.paired import Paired
from holdfast.reporting.measurements import Measurement, Row
from holdfast.reporting.read import number, read_lines
from holdfast.reporting.training import step_folder

CHANCE = 0.05
"""Two models are reported as "not distinguishable" if the corrected p is above this."""

SCORES = {"harmful_score": "lower", "task_score": "higher", "benign_compliance": "higher"}

Values = dict[str, dict[str, bool | float]]


@dataclass(frozen=True)
class Difference:
    """One score of a row compared with its baseline; `p` is Holm-corrected over the rows of the report."""

    result: Paired
    p: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether the difference is significant."""
        return self.p <= CHANCE


def baselines(rows: Sequence[Row]) -> dict[int, Row]:
    """For each row, by its number, the undefended row to compare it with; a row is not compared with itself.

    The baseline has the same share of harmful rows (if the row was fine-tuned), and preferably the same
    alignment, else any alignment. If there is no undefended row, it is the model before fine-tuning.
    """
    undefended = [row for row in rows if row.role == "undefended"]
    references = [row for row in rows if row.role == "reference"]
    found = {}
    for row in rows:
        pool = [one for one in undefended if row.role == "reference" or one.poison_ratio == row.poison_ratio]
        pool = pool or (references if row.role != "reference" and not undefended else [])
        best = max(
            pool,
            key=lambda one: (
                one.alignment == row.alignment,
                one.alignment is not None,
                one.poison_ratio or 0,
            ),
            default=None,
        )
        if best is not None and best.number != row.number:
            found[row.number] = best
    return found


def differences(rows: Sequence[Row], against: Mapping[int, Row], score: str) -> dict[int, Difference]:
    """For each row, by its number, its difference in one score, with p corrected for all rows (Holm)."""
    results: dict[int, tuple[Paired, int]] = {}
    for row in rows:
        baseline = against.get(row.number)
        if baseline is None:
            continue
        first, second = _by_seed(baseline, score), _by_seed(row, score)
        seeds = [seed for seed in first if seed in second]
        if not seeds:
            continue
        result = paired.compare(_over(first, seeds), _over(second, seeds))
        if result is not None:
            results[row.number] = (result, len(seeds))
    corrected = paired.holm([result.p for result, _ in results.values()])
    return {
        number: Difference(result, p, seeds)
        for (number, (result, seeds)), p in zip(results.items(), corrected, strict=True)
    }


def _by_seed(row: Row, score: str) -> Values:
    """The value of each prompt, by seed and id; empty if the step folder is missing or has no items.jsonl."""
    found: Values = {}
    for member in row.members:
        values = _items(member, score)
        if values:
            found[str(member.seed)] = values
    return found


def _items(member: Measurement, score: str) -> dict[str, bool | float]:
    step = member.steps.get("score")
    folder = step_folder(member.store, step) if isinstance(step, str) else None
    if folder is None or not (folder / "items.jsonl").is_file():
        return {}
    kept: dict[str, bool | float] = {}
    for item in read_lines(folder / "items.jsonl"):
        value = item.get("value")
        value = value if isinstance(value, bool) else number(value)
        if item.get("score") == score and value is not None:
            kept[str(item.get("id"))] = value
    return kept


def _over(by_seed: Values, seeds: Sequence[str]) -> dict[str, bool | float]:
    """The values of one seed, or each prompt's mean over several seeds: the test pairs prompts, not seeds."""
    if len(seeds) == 1:
        return by_seed[seeds[0]]
    shared = set(by_seed[seeds[0]]).intersection(*(by_seed[seed] for seed in seeds))
    scale = 100.0 if all(isinstance(v, bool) for seed in seeds for v in by_seed[seed].values()) else 1.0
    return {id: scale * sum(by_seed[seed][id] for seed in seeds) / len(seeds) for id in sorted(shared)}
