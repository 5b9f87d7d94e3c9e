"""From a recipe to results: the only folder that knows the order of the stages."""

from __future__ import annotations

from holdfast.pipeline.planning import plan
from holdfast.pipeline.running import run

__all__ = [
    "plan",
    "run",
]
