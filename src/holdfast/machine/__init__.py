"""What all other folders need from the machine: the store, processes, costs, progress, seeds."""

__all__ = [
    "code",
    "cost",
    "digests",
    "files",
    "processes",
    "progress",
    "seeds",
    "store",
]
