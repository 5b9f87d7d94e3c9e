"""Less work in other packages that no test needs: a tenth to a third of a tiny training."""

from __future__ import annotations

import functools
import importlib
import sys
from typing import Any

DEVICES = ("torch.cuda", "torch.xpu", "torch.mtia")


def lighten(gpu: bool = False) -> None:
    """Replace functions of the packages that are imported so far. Calling it again does no harm.

    Args:
        gpu: the tests use a GPU, so that its random numbers matter.
    """
    if "torch" in sys.modules and not gpu:
        for device in DEVICES:  # without the device, each call only keeps the seed and the formatted stack
            _replace(device, "manual_seed_all", _nothing)
    # The model cards of other packages, which each checkpoint contains; tests read only ours.
    _replace("peft", "PeftModel.create_or_update_model_card", _nothing)
    _replace("trl.trainer.base_trainer", "_BaseTrainer.create_model_card", _nothing)
    # Fingerprints are names in a cache of files. Rows in memory have none, but pickling finds the fingerprints.
    random = getattr(sys.modules.get("datasets.fingerprint"), "generate_random_fingerprint", None)
    for place in ("datasets.fingerprint", "datasets.arrow_dataset"):
        _replace(place, "update_fingerprint", lambda *_: random and random())
    _cache("accelerate.utils.imports", "_is_package_available")


def _nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _replace(module: str, name: str, new: Any) -> None:
    """Set `module.name` if the module is imported; a missing name is an error."""
    if module in sys.modules:
        place: Any = importlib.import_module(module)
        *parents, last = name.split(".")
        for parent in parents:
            place = getattr(place, parent)
        getattr(place, last)
        setattr(place, last, new)


def _cache(module: str, name: str) -> None:
    found = getattr(sys.modules.get(module), name, None)
    if found is not None and not hasattr(found, "cache_info"):
        _replace(module, name, functools.cache(found))
