"""Run a recipe: from its steps to its results. No other folder knows the order of the stages."""

from __future__ import annotations

from holdfast.pipeline.planning import plan
from holdfast.pipeline.preflight import rehearse
from holdfast.pipeline.running import run

__all__ = [
    "delivering",
    "plan",
    "planning",
    "plans",
    "preflight",
    "rehearse",
    "results",
    "run",
    "step",
]
