"""Limit numpy's BLAS to one thread while modules are spread over threads.

Products with few columns are too short for several BLAS threads: on a busy machine they take eight times the
processor time. Environment variables would come too late, after numpy is imported.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

NAMES = ("scipy_openblas_{}_num_threads64_", "scipy_openblas_{}_num_threads", "openblas_{}_num_threads")
"""The names of `set` and `get` in the OpenBLAS that numpy includes, newest first."""


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Limit BLAS in the whole process until the block ends. It has no effect if numpy uses another BLAS."""
    found = _functions()
    before = found[0]() if found else 0
    if found:
        found[1](1)
    try:
        yield
    finally:
        if found:
            found[1](before)


def _functions() -> tuple[Any, Any] | None:
    """Return the functions that get and set the number of threads."""
    package = Path(np.__file__).parent
    for folder in (package.parent / "numpy.libs", package / ".dylibs"):
        for path in sorted(folder.glob("*openblas*")):
            try:
                library = ctypes.CDLL(str(path))  # already loaded, so this only finds it
            except OSError:
                continue
            for name in NAMES:
                get, put = (getattr(library, name.format(verb), None) for verb in ("get", "set"))
                if get is not None and put is not None:
                    return get, put
    return None
