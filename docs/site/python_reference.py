"""The page of the Python API: the public names, each documented from its docstring by mkdocstrings."""

from __future__ import annotations

import holdfast

HEAD = """# Python API

These are the public names: `import holdfast` is fast, and each name is imported on first use. The trainers
of the defenses are in `holdfast.defenses.NAME` ([in your own script](../python.md)).
"""


def page() -> str:
    """Return the page in Markdown, with a directive of mkdocstrings for each public name."""
    names = sorted((name for name in holdfast.__all__ if not name.startswith("_")), key=str.lower)
    return "\n\n".join([HEAD, *(f"::: {holdfast._HOME[name]}.{name}" for name in names)]) + "\n"
