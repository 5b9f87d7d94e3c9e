"""Measuring on files and in recipes: generate, moderate, rate, score, compare, filter, gate."""

__all__ = [
    "ability",
    "comparing",
    "filtering",
    "gate_answers",
    "gating",
    "generating",
    "judging",
    "on_files",
    "protocol",
    "row_scores",
    "score_filtering",
]
