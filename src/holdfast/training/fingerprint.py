"""What must not change for a resumed training to equal an uninterrupted one, as flat dictionaries.

Every option of `TrainingArguments` counts that `FREE` does not name, so that new options of transformers
count too. The optimizer and the scheduler are described as they are when a checkpoint is written or about to
be read, because a user's script can give its own.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from functools import cache
from typing import Any

from torch import nn
from transformers import TrainingArguments

FREE = re.compile(
    r"(logging|log|eval|save|hub|trackio|dataloader|ddp|fsdp|do|activation_checkpointing|gradient_checkpointing)_.*"
    r"|(activation|gradient)_checkpointing|per_device_eval_batch_size|(bf16|fp16)_full_eval|output_dir|fsdp"
    r"|use_cache|use_cpu|torch_empty_cache_steps|auto_find_batch_size|include_.*|disable_tqdm|report_to|run_name"
    r"|project|prediction_loss_only|batch_eval_metrics|enable_jit_checkpoint|push_to_hub|load_best_model_at_end"
    r"|metric_for_best_model|greater_is_better|restore_callback_states_from_checkpoint|remove_unused_columns"
    r"|label_names|parallelism_config|deepspeed|debug|skip_memory_metrics|resume_from_checkpoint|local_rank"
)
"""Names of options that change no weight of a training; `distributed_type` and `world_size` count instead."""
COUNTED = {"dataloader_drop_last"}
"""Names that `FREE` matches, but that change the batches."""

ADAPTER = (
    "peft_type", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "bias", "target_modules", "modules_to_save", "fan_in_fan_out",
)  # fmt: skip
"""Settings of an adapter that change how it acts or trains, and that its weights do not show."""


def options(args: Any) -> dict[str, Any]:
    """Return every option that can change the weights: of `TrainingArguments` and of the method's Config."""
    free = {f.name for f in fields(TrainingArguments) if FREE.fullmatch(f.name)} - COUNTED
    names = [f.name for f in fields(args) if f.name not in free]
    found = {name: getattr(args, name) for name in names}
    config = found.pop("accelerator_config", None)
    loader = ("split_batches", "dispatch_batches", "even_batches", "use_seedable_sampler")
    return found | {name: getattr(config, name) for name in loader if hasattr(config, name)}


def default(name: str) -> Any:
    """Return the default of an option of `TrainingArguments`, for checkpoints that lack it; else None."""
    return _defaults().get(name)


@cache
def _defaults() -> dict[str, Any]:
    return {f.name: f.default for f in fields(TrainingArguments) if f.default is not MISSING}


def model_facts(model: nn.Module) -> dict[str, Any]:
    """Return the dtype, the dropout rates and the adapters' settings."""
    config: Any = getattr(model, "config", None)
    values = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else {}
    found: dict[str, Any] = {
        f"model.{name}": value
        for name, value in values.items()
        if re.search("dropout|pdrop", name) and isinstance(value, int | float)
    }
    first = next(model.parameters(), None)
    found["model.dtype"] = None if first is None else str(first.dtype)
    for adapter, settings in getattr(model, "peft_config", {}).items():
        for name in ADAPTER:
            value = getattr(settings, name, None)
            found[f"adapter {adapter}.{name}"] = sorted(value) if isinstance(value, set) else value
    return found


def optimizer_facts(optimizer: Any, scheduler: Any) -> dict[str, Any]:
    """Return class and settings of optimizer and scheduler, without what changes from step to step."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
    scheduler = getattr(scheduler, "scheduler", scheduler)
    found: dict[str, Any] = {"optimizer": type(optimizer).__name__, "scheduler": type(scheduler).__name__}
    moving = {
        "params",
        "lr",
        "param_names",
        "step",
        "k",
        "train_mode",
        "scheduled_lr",
        "lr_max",
        "weight_sum",
    }
    if found["scheduler"] in ("OneCycleLR", "CyclicLR"):
        moving |= {"betas", "momentum", "max_momentum", "base_momentum", "max_lr", "min_lr"}
    for number, group in enumerate(getattr(optimizer, "param_groups", [])):
        found[f"optimizer group {number}.parameters"] = len(group["params"])
        for name in sorted(set(group) - moving):
            found[f"optimizer group {number}.{name}"] = group[name]
    for number, function in enumerate(getattr(scheduler, "lr_lambdas", [])):
        for name, value in sorted(getattr(function, "keywords", {}).items()):
            found[f"scheduler {number}.{name}"] = value
    return found
