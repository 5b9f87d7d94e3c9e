"""Quantised base models: 4-bit NF4 (QLoRA, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

bitsandbytes quantises the weights of the linear layers when they are loaded; they are never trained. The
other weights (norms, embeddings, head) keep their dtype, as in a model that is not quantised. PEFT's
`prepare_model_for_kbit_training` would convert them, and with them all activations, to float32: for the
152,064 words of Qwen2-7B this alone takes 2.2 GB.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.machine.files import read_json


def is_quantized(folder: Path) -> bool:
    """Whether the weights in a model folder are already quantised."""
    return "quantization_config" in _config(folder)


def check_quantization(folder: Path, quantization: str | None) -> None:
    """Check, before the model is loaded, that it can be quantised here.

    Raises:
        ModelError: bitsandbytes is missing, or the folder is already quantised.
    """
    if quantization is None:
        return
    if is_quantized(folder):
        raise ModelError(f"{folder} already holds quantised weights; leave model.quantization out.")
    check_bitsandbytes(f"model.quantization: {quantization}")


def check_bitsandbytes(what: str) -> None:
    """Raise ModelError if bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{what} needs bitsandbytes, which is not installed. Install it: pip install bitsandbytes."
        )


def quantization_config(quantization: str, dtype: Any) -> Any:
    """Return the transformers configuration that quantises the model while it is loaded.

    Args:
        quantization: "nf4" (with double quantisation, like QLoRA) or "int8".
        dtype: the torch dtype to compute in.
    """
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # the loader reports a damaged file
        return {}
    return config if isinstance(config, dict) else {}
