"""Load a base model once for several chains of adapters, one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.models.loading import load_model, with_adapters
from holdfast.weights.chains import check_chain


class Shared:
    """Called like `load_model`. A model from an earlier call is not valid after the next call.

    The adapters of the call before are taken off, and those of this call are put on. The base model is loaded
    again if it is another one, if adapters are merged into it, or if adapters changed its embeddings.
    """

    def __init__(self) -> None:
        self.loads = 0
        self._key: Any = None
        self._base: Any = None
        self._rows = 0
        self._above: Any = None

    def __call__(
        self, folder: Path, adapters: Sequence[Path] = (), *, compose: str = "stack", **options: Any
    ) -> Any:
        """Return the model with these adapters, all frozen."""
        check_chain(adapters)
        key = (folder.resolve(), sorted(options.items(), key=lambda item: item[0]))
        if self._above is not None:
            self._base, self._above = self._above.unload(), None
        if self._base is None or key != self._key or _rows(self._base) != self._rows:
            self._base = None  # before the next one is loaded
            self._base, self._key = load_model(folder, (), **options), key
            self._rows = _rows(self._base)
            self.loads += 1
        if not adapters:
            return self._base
        base, self._base = self._base, None
        model = with_adapters(base, adapters, compose)
        if hasattr(model, "peft_config"):  # not after a merge
            self._above = model
        return model


def _rows(model: Any) -> int:
    """The number of embeddings, which adapters with tokens of their own change."""
    return int(model.get_input_embeddings().weight.shape[0])
