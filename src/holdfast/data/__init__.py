"""Data: read sources of any kind as canonical rows, and make the training and test sets of a run."""

from __future__ import annotations

from holdfast.data.evaluation_rows import test_rows
from holdfast.data.held_out import grading_task, holds_out
from holdfast.data.jsonl import read_placed, read_rows, write_rows
from holdfast.data.mixing import dropped_bad_rows, mix
from holdfast.data.places import places_of
from holdfast.data.pool import numbered
from holdfast.data.prepare import Prepared, alignment_rows, harmful_rows, user_rows
from holdfast.data.rows import to_rows
from holdfast.data.shared_prompts import overlaps
from holdfast.data.sources import Loaded, fingerprint, has_split, place_of, read_records

__all__ = [
    "Loaded",
    "Prepared",
    "alignment_rows",
    "bad_rows",
    "dropped_bad_rows",
    "fingerprint",
    "grading_task",
    "harmful_rows",
    "has_split",
    "holds_out",
    "mix",
    "numbered",
    "overlaps",
    "place_of",
    "places_of",
    "prompts",
    "read_placed",
    "read_records",
    "read_rows",
    "rows",
    "sources",
    "test_rows",
    "to_rows",
    "user_rows",
    "write_rows",
]
