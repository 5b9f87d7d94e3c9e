"""Weights and adapters as files: found, named, read and written a tensor at a time, without torch."""

__all__ = [
    "adapter",
    "card",
    "combine",
    "files",
    "floats",
    "folders",
    "matching",
    "merge",
    "reader",
    "writer",
]
