"""The command: one file for each group of subcommands."""

__all__ = [
    "app",
]
