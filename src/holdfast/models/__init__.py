"""Loading a model with its adapters: the one place that turns weight files into a torch module."""

__all__ = [
    "device",
    "loading",
    "quantization",
    "trained",
]
