"""Access to the machine for all other folders: files, the store, processes, costs, progress, seeds."""

__all__ = [
    "code",
    "cost",
    "digests",
    "files",
    "outputs",
    "processes",
    "progress",
    "scratch",
    "secrets",
    "seeds",
    "store",
]
