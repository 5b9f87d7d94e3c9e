"""Measuring on files and in recipes: generate, moderate, rate, score, compare, filter."""

__all__ = [
    "comparing",
    "filtering",
    "generating",
    "judging",
    "on_files",
    "protocol",
]
