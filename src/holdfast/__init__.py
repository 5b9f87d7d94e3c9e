"""Keep a language model's safety alignment through fine-tuning."""

__version__ = "0.1.0"
