"""Load a base model once for several chains of adapters, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.models.loading import load_model, with_adapters, without_settings
from holdfast.weights.chains import check_chain
from holdfast.weights.files import safe_path
from holdfast.weights.folders import ADAPTER_WEIGHTS
from holdfast.weights.reader import WeightFile


class Shared:
    """Called like `load_model`. A model from an earlier call is not valid after the next call.

    The adapters of the call before are taken off, and those of this call are put on. The base model is loaded
    again if it is another one, or if the adapters before were merged or held more than LoRA: whole modules,
    embeddings or biases, which replace weights of the base model.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._key: Any = None
        self._base: Any = None
        self._above: Any = None

    def __call__(
        self, folder: Path, adapters: Sequence[Path] = (), *, compose: str = "stack", **options: Any
    ) -> Any:
        """Return the model with these adapters, all frozen."""
        check_chain(adapters)
        key = (folder.resolve(), sorted(options.items(), key=lambda item: item[0]))
        if self._above is not None:
            self._base, self._above = without_settings(self._above.unload()), None
        if self._base is None or key != self._key:
            self._base = None  # before the next one is loaded
            self._base, self._key = load_model(folder, (), **options), key
            self.loads += 1
        if not adapters:
            return self._base
        base, self._base = self._base, None
        model = with_adapters(base, adapters, compose)
        if compose != "merge" and all(_only_lora(one) for one in adapters):
            self._above = model
        return model


def _only_lora(adapter: Path) -> bool:
    """Whether an adapter holds nothing but LoRA, which can be taken off without a trace."""
    file = WeightFile(safe_path(adapter, ADAPTER_WEIGHTS))
    try:
        return all(".lora_" in name for name in file.tensors)
    finally:
        file.close()
