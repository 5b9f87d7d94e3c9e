"""Models, adapters and their weights on disk."""
