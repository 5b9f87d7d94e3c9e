"""Make a model folder from a GGUF file: weights widened to bfloat16, config, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from holdfast.errors import ModelError, first_line


def convert(source: Path, folder: Path) -> None:
    """Write the model in the GGUF file `source` to `folder`.

    transformers refuses to save a model that it read from GGUF, so the weights go into a new model.

    Raises:
        ModelError: the file cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        read = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    except Exception as error:  # a damaged file can raise any exception in the reader
        raise ModelError(f"Cannot read {source}: {first_line(error)}") from None
    finally:
        if bars:
            logging.enable_progress_bar()
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = type(read)(config)
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
