"""A run before processes are forked, so that they find everything imported that a run imports."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import torch

import tiny
from light import lighten
from runs import run


@functools.cache
def warm() -> None:
    """Do a run with a report, once in each test process."""
    torch.set_num_threads(1)  # a fork of a process with several threads of torch may hang
    with tempfile.TemporaryDirectory() as folder:
        run(tiny.recipe(Path(folder) / "in"), Path(folder) / "out", page=True)
    lighten()
