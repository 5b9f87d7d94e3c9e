"""What Safe LoRA is made of: its parameters, directions, projections, the work, the result."""

__all__ = [
    "result",
]
