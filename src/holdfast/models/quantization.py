"""Quantised base models: 4-bit NF4 (QLoRA, arXiv 2305.14314) and LLM.int8 (arXiv 2208.07339).

The weights of the linear layers are quantised by bitsandbytes when they are loaded, and never trained. What
is not quantised (norms, embeddings, head) keeps its dtype, as in a model that is not quantised. PEFT's
`prepare_model_for_kbit_training` would turn it, and with it all activations, to float32: for the 152,064
words of Qwen2-7B that alone is 2.2 GB.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from holdfast.errors import ModelError
from holdfast.machine.files import read_json


def is_quantized(folder: Path) -> bool:
    """Whether the weights in a model folder are quantised already."""
    return "quantization_config" in _config(folder)


def stored_dtype(folder: Path) -> str:
    """The dtype that `dtype: auto` would load, "float32" where the folder does not say."""
    config = _config(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def check_quantization(folder: Path, quantization: str | None) -> None:
    """Make sure that the model can be quantised here, before it is loaded.

    Raises:
        ModelError: bitsandbytes is missing, or the folder is quantised already.
    """
    if quantization is None:
        return
    if is_quantized(folder):
        raise ModelError(f"{folder} holds quantised weights already; leave model.quantization out.")
    check_bitsandbytes(f"model.quantization: {quantization}")


def check_bitsandbytes(what: str) -> None:
    """Raise ModelError if bitsandbytes, which `what` needs, is not installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{what} needs bitsandbytes, which is not installed. Install it: pip install bitsandbytes."
        )


def quantization_config(quantization: str, dtype: Any) -> Any:
    """What transformers needs to quantise while loading.

    Args:
        quantization: "nf4" (with double quantisation, as QLoRA) or "int8".
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


def keep_differentiable(model: Any) -> None:
    """Keep bitsandbytes from turning 4-bit weights into a form without gradients (0.50).

    On a CPU with AVX512-BF16 it repacks each layer at the first forward in evaluation mode, for an operation
    that has no gradient: what trains after that lacks what flows through these layers, and torch only warns.
    Seen by forcing that path on another CPU.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):  # a damaged one is named where the model is built
        return {}
    return config if isinstance(config, dict) else {}
