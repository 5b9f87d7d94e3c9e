"""The Config of a stage's method, from the values of the recipe."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from holdfast.defenses import Defense
from holdfast.errors import RecipeError, first_line
from holdfast.recipe.stages import trackers


def make_config(
    defense: Defense,
    parameters: Mapping[str, Any],
    training: Mapping[str, Any],
    seed: int,
    output: Path,
    device: str,
) -> Any:
    """Return the method's Config with the recipe's values and the pipeline's own.

    Raises:
        RecipeError: the Config refuses a value, or a tracker is not installed.
    """
    assert defense.config is not None
    _check_trackers(trackers(training.get("report_to")))
    common = {"logging_steps": 10, "logging_nan_inf_filter": False, "report_to": "none"}
    settings = {**common, **training, **parameters}
    try:
        config: Any = defense.config(
            output_dir=str(output),
            seed=seed,
            use_cpu=device == "cpu",
            disable_tqdm=True,
            save_strategy="steps",
            save_total_limit=2,
            include_num_input_tokens_seen="non_padding",
            **settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{defense.name}: a training value cannot be used: {first_line(error)}") from None
    asked = "fp16" if config.fp16 else "bf16" if config.bf16 else "no"
    if getattr(config, "mixed_precision", asked) != asked:
        raise RecipeError(
            f"The launcher asks for mixed precision {config.mixed_precision}, the recipe for {asked}; only "
            "the recipe counts. Write training: {bf16: true} in it, or start with --mixed_precision no."
        )
    return config


def _check_trackers(named: Sequence[str]) -> None:
    """Raise RecipeError if a tracker is not installed; transformers checks it after loading the model."""
    for tracker in named:
        packages = ("tensorboard", "tensorboardX") if tracker == "tensorboard" else (tracker,)
        if all(importlib.util.find_spec(package) is None for package in packages):
            raise RecipeError(
                f"training.report_to: {tracker} is not installed. Install it (pip install {tracker}), or "
                "leave report_to out."
            )
