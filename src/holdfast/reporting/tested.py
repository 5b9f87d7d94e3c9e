"""Each model tested against the undefended model, for the table and for the sentence at the top of the page.

Models of one seed are compared prompt by prompt (`holdfast.evaluation.paired`). Means over seeds are compared
by Student's t with Welch's degrees of freedom: the test of the prompts would say nothing about another seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from holdfast.evaluation import paired
from holdfast.evaluation.paired import Z95, student, student_quantile
from holdfast.reporting.measurements import Measurement, Row, Score
from holdfast.reporting.read import number, read_lines
from holdfast.reporting.training import step_folder

CHANCE = 0.05
"""Two models are reported as "not distinguishable" if the corrected p is above this."""

SCORES = {"harmful_score": "lower", "task_score": "higher", "benign_compliance": "higher"}

Values = dict[str, dict[str, bool | float]]


@dataclass(frozen=True)
class Difference:
    """One score of a row compared with its baseline.

    Attributes:
        value: the row's score minus that of the baseline, in points.
        interval: the 95 % interval of the value, if it is known.
        p: two-sided; `differences` corrects it for the rows of the report (Holm).
        n: the number of prompts, or of the row's answers over all seeds.
        seeds: the number of seeds of the row.
        over_seeds: whether means over seeds were compared, and not answers to the same prompts.
    """

    value: float
    interval: tuple[float, float] | None
    p: float
    n: int | None
    seeds: int
    over_seeds: bool = False

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
    results: dict[int, Difference] = {}
    for row in rows:
        baseline = against.get(row.number)
        found = None if baseline is None else _difference(baseline, row, score)
        if found is not None:
            results[row.number] = found
    corrected = paired.holm([found.p for found in results.values()])
    return {
        number: replace(found, p=p) for (number, found), p in zip(results.items(), corrected, strict=True)
    }


def _difference(baseline: Row, row: Row, score: str) -> Difference | None:
    """Compare means over seeds if both rows have several, else the answers to the same prompts."""
    before, after = _score(baseline, score), _score(row, score)
    if before is not None and after is not None and before.seeds > 1 and after.seeds > 1:
        return by_student(before, after)
    first, second = _by_seed(baseline, score), _by_seed(row, score)
    seeds = [seed for seed in first if seed in second]
    if not seeds:
        return None
    result = paired.compare(_over(first, seeds), _over(second, seeds))
    if result is None:
        return None
    return Difference(result.difference, result.interval, result.p, result.n, len(seeds))


def by_student(before: Score, after: Score) -> Difference:
    """Compare two scores, at least one of them a mean over seeds, by Welch's test."""
    value, error, freedom = after.value - before.value, *_welch(before, after)
    reach = error * (Z95 if math.isinf(freedom) else student_quantile(freedom)) if error else 0.0
    interval = (value - reach, value + reach)
    return Difference(value, interval, student_p(before, after), after.n, after.seeds, True)


def student_p(before: Score, after: Score) -> float:
    """The two-sided p-value of Welch's test for two scores, at least one of them a mean over seeds."""
    value, error, freedom = after.value - before.value, *_welch(before, after)
    if not error:
        return float(not value)
    t = abs(value) / error
    return math.erfc(t / math.sqrt(2)) if math.isinf(freedom) else student(t, freedom)


def _welch(before: Score, after: Score) -> tuple[float, float]:
    """The standard error of the difference, and its degrees of freedom.

    The error of a score of one seed is that of its answers; it has no degrees of freedom to lose.
    """
    variances = [(score.stderr or 0.0) ** 2 for score in (before, after)]
    parts = [v * v / (s.seeds - 1) for v, s in zip(variances, (before, after), strict=True) if s.seeds > 1]
    return math.sqrt(sum(variances)), sum(variances) ** 2 / sum(parts) if any(parts) else math.inf


def _score(row: Row, name: str) -> Score | None:
    found = row.scores.get(name)
    return row.scores.get("finetune_accuracy") if found is None and name == "task_score" else found


def _by_seed(row: Row, score: str) -> Values:
    """The value of each prompt, by seed and id; empty if the step folder is missing or has no items.jsonl."""
    found: Values = {}
    for member in row.members:
        values = items(member, score)
        if values:
            found[str(member.seed)] = values
    return found


def items(member: Measurement, score: str) -> dict[str, bool | float]:
    """The value of each prompt in one score, by id; empty if the step folder or its items are missing."""
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
