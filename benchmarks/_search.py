"""The searches of the study on a real model: settings of the alignment and of the attack."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import _study as study
from _summary import shown, summary


def search(work: Any) -> None:
    """Find the settings of the alignment, then those of the attack; each trial is kept in the results."""
    for stage, asked, trials, margin in (
        ("alignment", ["user=none"], study.ALIGNMENT_SEARCH, _margin_aligned),
        ("user", [f"data.poison_ratio={study.ATTACK_RATIO}"], study.ATTACK_SEARCH, _margin_broken),
    ):
        if stage not in work.chosen and not _first(work, stage, asked, trials, margin):
            print("The time limit ends the search here; the same command resumes it.", flush=True)
            return


def _margin_aligned(row: dict[str, Any]) -> float:
    goal = study.ALIGNED
    return min(
        goal["harmful_score"] - row["harmful_score"], row["benign_compliance"] - goal["benign_compliance"]
    )


def _margin_broken(row: dict[str, Any]) -> float:
    return min(row[score] - goal for score, goal in study.BROKEN.items())


def _first(
    work: Any,
    stage: str,
    asked: list[str],
    trials: list[dict[str, Any]],
    margin: Callable[[dict[str, Any]], float],
) -> bool:
    """Try settings until one meets the goal; otherwise use the one that comes nearest. False: out of time."""
    tried: dict[str, Any] = work.found["search"].setdefault(stage, {})
    best: tuple[float, dict[str, Any]] | None = None
    for settings in trials:
        if not work.time_for():
            return False
        began = time.monotonic()
        results = work.run([f"seed={study.SEARCH_SEED}", *study.training(stage, settings), *asked])
        row = summary(results["rows"][-1])
        name = ", ".join(f"{key}={value:g}" for key, value in settings.items())
        tried[name] = row | {"margin": margin(row)}
        shown(f"search of the {stage} settings, {name}", row, time.monotonic() - began)
        if best is None or margin(row) > best[0]:
            best = margin(row), settings
        work.save()
        if margin(row) >= 0 or work.short:
            break
    assert best is not None
    work.chosen[stage] = best[1]
    work.found["search"][f"{stage} meets its goal"] = best[0] >= 0
    work.save()
    return True
