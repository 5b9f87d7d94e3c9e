"""Generation, moderation and scoring: three parts that read and write files and know nothing of training."""
