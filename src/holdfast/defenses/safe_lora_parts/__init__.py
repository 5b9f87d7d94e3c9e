"""The parts of Safe LoRA: its parameters, directions, projections, the work, the result."""

__all__ = [
    "result",
]
