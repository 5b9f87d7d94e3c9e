"""Speed of a judge in batches compared with one answer at a time, with the same verdicts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

from holdfast.evaluation.judges import LoadedJudge, Verdict


def judge_speed(
    judge: LoadedJudge, prompts: Sequence[str], answers: Sequence[str], rounds: int = 5
) -> dict[str, Any]:
    """Time both ways in turns; return medians, their ratio, and the number of equal verdicts.

    The reference implementations call their judge once for each answer.
    """

    def alone() -> list[Verdict]:
        return [judge([p], [a])[0] for p, a in zip(prompts, answers, strict=True)]

    def batched() -> list[Verdict]:
        size = judge.batch_size
        return [
            verdict
            for at in range(0, len(prompts), size)
            for verdict in judge(prompts[at : at + size], answers[at : at + size])
        ]

    def timed(way: Any) -> tuple[float, list[Verdict]]:
        began = time.perf_counter()
        verdicts = way()
        return time.perf_counter() - began, verdicts

    judge(prompts[:2], answers[:2])
    pairs = []
    for _ in range(rounds):
        (one, separate), (many, together) = timed(alone), timed(batched)
        pairs.append((one, many))
        same = sum(a.verdict == b.verdict for a, b in zip(separate, together, strict=True))
    return {
        "judge": judge.stamp,
        "answers": len(answers),
        "same_verdicts": same,
        "ratio_median": statistics.median(one / many for one, many in pairs),
        "ratios": [one / many for one, many in pairs],
        "answers_per_second_alone": len(answers) / statistics.median(one for one, _ in pairs),
        "answers_per_second_batched": len(answers) / statistics.median(many for _, many in pairs),
    }
