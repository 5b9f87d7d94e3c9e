"""Load a model with its adapters: the only place that turns weight files into a torch module."""

__all__ = [
    "device",
    "dtypes",
    "fitting",
    "loading",
    "quantization",
    "trained",
]
