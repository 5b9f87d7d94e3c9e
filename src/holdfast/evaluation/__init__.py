"""Generation, moderation and scoring: three parts that read and write files and do not depend on training."""

__all__ = ["answering", "endpoint", "judges", "moderation", "paired", "rating", "scoring", "turns"]
