"""Studies: a grid of recipes over one store of steps, and the workers that run it."""

from __future__ import annotations

__all__ = ["folder", "grid", "packaged", "planning", "resources", "sweeping"]
