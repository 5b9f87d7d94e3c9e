"""Load a model with its adapters: the only place that turns weight files into a torch module."""

__all__ = [
    "dates",
    "device",
    "dtypes",
    "fitting",
    "foreseen",
    "loading",
    "lora",
    "quantization",
    "sharing",
    "trained",
]
