"""Keep tokenizers and aligned models in memory between the runs of one process; the numbers do not change."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from holdfast.models import loading, trained

KEPT = 4
"""Models that are kept: the base, and the aligned models that were used last."""


def keep() -> None:
    """Let every later run of this process share its tokenizer, base model and aligned models."""
    load, models = loading.load_model, OrderedDict[tuple[Any, ...], Any]()

    def load_model(
        folder: Path, adapters: Sequence[Path] = (), *, compose: str = "stack", **options: Any
    ) -> Any:
        if compose != "merge" or options.get("quantization") or len(adapters) > 2:
            return load(folder, adapters, compose=compose, **options)
        key = (str(folder), *map(str, adapters), *sorted(options.items()))
        if key in models:
            models.move_to_end(key)
            return copy.deepcopy(models[key])
        if not adapters:
            model = load(folder, **options)
        else:  # as in `load`: each adapter is added to the weights, in order
            below = load_model(folder, adapters[:-1], compose=compose, **options)
            model = loading.put_on(below, adapters[-1]).merge_and_unload(safe_merge=True)
            model = model.requires_grad_(False).eval()
        if len(adapters) < 2:
            models[key] = copy.deepcopy(model)
            if len(models) > KEPT:
                models.popitem(last=False)
        return model

    loading.load_model = trained.load_model = load_model  # type: ignore[assignment]
    loading.load_tokenizer = functools.cache(loading.load_tokenizer)  # type: ignore[assignment]
