"""Generation, moderation and scoring: three parts that read and write files and know nothing of training."""

__all__ = ["answering", "endpoint", "judges", "moderation", "paired", "rating", "scoring", "turns"]
