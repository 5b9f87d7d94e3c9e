"""Generation, moderation and scoring: three parts that read and write files and do not depend on training."""

__all__ = [
    "answering",
    "deciding",
    "endpoint",
    "frames",
    "judges",
    "moderation",
    "paired",
    "rating",
    "scoring",
    "turns",
]
