"""axolotl: a plug-in, found by its entry point, that adds the block `holdfast:` to the configuration.

Without the block it does nothing. `HoldfastPlugin` is made when axolotl asks for it, because its base class
is axolotl's.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.defenses.safe_lora import safe_lora
from holdfast.integrations.axolotl_keys import HoldfastKeys
from holdfast.integrations.hosted import check_parameters, hosted, own_rows, rendered
from holdfast.integrations.prompt_sets import read_questions
from holdfast.probe import SafetyProbe
from holdfast.weights.merge import merge

REPAIRED = "safe_lora"
"""The end of the names of the repaired adapter and of the merged model with it."""


def __getattr__(name: str) -> Any:
    if name == "HoldfastPlugin":
        globals()[name] = _plugin()
        return globals()[name]
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def keys(cfg: Mapping[str, Any]) -> HoldfastKeys | None:
    """Return the block `holdfast:` of a configuration, or None."""
    block = cfg.get("holdfast")
    return None if block is None else HoldfastKeys.model_validate(plain(block))


def plain(value: Any) -> Any:
    """Return axolotl's DictDefault, and everything in it, as plain dicts and lists."""
    if isinstance(value, Mapping):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


def check(cfg: Mapping[str, Any]) -> None:
    """Check the values of the defense's parameters before the model is loaded.

    Raises:
        RecipeError: a value is not valid.
    """
    block = keys(cfg)
    found = block.method() if block is not None else None
    if block is not None and found is not None:
        check_parameters(found, block.parameters, output_dir=str(cfg.get("output_dir") or "out"))


def trainer_class(cfg: Mapping[str, Any]) -> type | None:
    """Return the trainer class of the defense on axolotl's, or None without a defense."""
    block = keys(cfg)
    found = block.method() if block is not None else None
    if block is None or found is None:
        return None
    from axolotl.core.trainers.base import AxolotlTrainer

    given = {kind: getattr(block, kind) for kind in found.needs}

    def load_rows(made: Mapping[str, Any]) -> dict[str, Any]:
        args, tokenizer = made["args"], made["processing_class"]
        args.max_length = cfg.get("sequence_len") or args.max_length
        return {kind: rows(kind, source, cfg, tokenizer, args.seed) for kind, source in given.items()}

    return hosted(found, block.parameters, load_rows, (AxolotlTrainer,), "Axolotl")


def rows(kind: str, source: Any, cfg: Any, tokenizer: Any, seed: int) -> Any:
    """Return alignment or harmful rows: from a source of ours, or tokenised by axolotl like `datasets:`."""
    if isinstance(source, str):
        return rendered(own_rows(kind, source, seed), tokenizer)
    from copy import deepcopy

    from axolotl.utils.data import prepare_datasets
    from axolotl.utils.dict import DictDefault

    other = DictDefault(deepcopy(plain(cfg)))
    other.datasets = [DictDefault(one) for one in (source if isinstance(source, list) else [source])]
    other.test_datasets, other.val_set_size, other.max_steps = None, 0, None
    found = prepare_datasets(other, tokenizer)[0]
    kept = ("input_ids", "attention_mask", "labels")
    return found.select_columns([name for name in kept if name in found.column_names])


def probe(cfg: Mapping[str, Any], trainer: Any) -> list[Any]:
    """Return the safety probe as a list of callbacks; empty if none is asked for."""
    block = keys(cfg)
    if block is None or block.probe is None:
        return []
    options = block.probe.model_dump()
    questions = read_questions(options.pop("prompts"), "harmful")
    return [SafetyProbe([row["question"] for row in questions.rows], trainer=trainer, **options)]


def repair(cfg: Mapping[str, Any], adapter: str | Path, merged: str | Path) -> None:
    """Apply Safe LoRA to the adapter, and merge the result beside axolotl's merged model."""
    block = keys(cfg)
    if block is None or block.safe_lora is None:
        return
    options = block.safe_lora.model_dump()
    model = str(cfg["base_model"])
    aligned = options.pop("aligned") or model
    repaired, out = (Path(f"{str(place).rstrip('/')}-{REPAIRED}") for place in (adapter, merged))
    result = safe_lora(adapter, aligned=aligned, out=repaired, **options)
    merge(model, [repaired], out)
    logging.getLogger(__name__).warning(
        "Safe LoRA projected %d of %d modules. The repaired adapter is %s, the merged model with it %s",
        len(result.projected), len(result.modules), repaired, out,
    )  # fmt: skip


def _plugin() -> type:
    from axolotl.integrations.base import BasePlugin

    class HoldfastPlugin(BasePlugin):
        """Keeps the safety alignment of a chat model while axolotl fine-tunes it."""

        def get_input_args(self) -> str:
            """The model of the block `holdfast:`."""
            return "holdfast.integrations.axolotl_keys.HoldfastArgs"

        def pre_model_load(self, cfg: Any) -> None:
            """Check the parameters."""
            check(cfg)

        def get_trainer_cls(self, cfg: Any) -> type | None:
            """The defense's trainer."""
            return trainer_class(cfg)

        def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[Any]:
            """The safety probe."""
            return probe(cfg, trainer)

        def post_lora_merge(self, cfg: Any, adapter_path: str, output_path: str) -> None:
            """Safe LoRA."""
            repair(cfg, adapter_path, output_path)

    return HoldfastPlugin
