"""Studies: a grid of recipes over one store of steps, and the workers that run it."""

from __future__ import annotations

__all__ = [
    "compared", "folder", "grid", "packaged", "planning", "published", "ray", "resources", "slurm",
    "sweeping", "table_sheets", "tables",
]  # fmt: skip
