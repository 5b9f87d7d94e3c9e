"""The training steps: a method trains on the rows of data steps, on top of the weights of earlier steps."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from holdfast.errors import RecipeError
from holdfast.machine.seeds import derive_seed
from holdfast.pipeline import mixing
from holdfast.pipeline.chain import loading, tokenizer_of, weights
from holdfast.pipeline.data import rendered, rows_of
from holdfast.pipeline.step import Inputs, Machine


def train_stage(inputs: Inputs, folder: Path, machine: Machine) -> dict[str, Any]:
    """Train a stage; writes `adapter` (or `model` if it trains all weights) and `trainer_state.json`."""
    from holdfast.pipeline.training import TrainingJob, train

    model, method, seed = inputs["model"], inputs["method"], inputs["seed"]
    tokenizer = tokenizer_of(model)
    rows: dict[str, Any] = {name: rows_of(step) for name, step in inputs["rows"].items()}
    facts: dict[str, Any] = {}
    if method.mix is not None:
        with machine.processes.main_first():  # the others read what the method wrote there
            rows, facts = mixing.mix(method, rows, inputs["parameters"], seed, folder)
    base, adapters = weights(model["base"].folder, inputs["chain"])
    job = TrainingJob(
        stage=inputs["stage"],
        defense=method,
        parameters=inputs["parameters"],
        training=inputs["training"],
        trains=inputs["trains"],
        lora=inputs["lora"] if inputs["trains"] == "new" else None,
        model=base,
        model_name=model["base"].name if base == model["base"].folder else str(base),
        tokenizer=tokenizer,
        model_options=loading(model),
        adapters=adapters,
        rows={name: rendered(part, tokenizer, inputs["template"]) for name, part in rows.items()},
        seed=seed,
        logs=folder.parent.parent / "tensorboard" / folder.name,
    )
    trained = train(
        folder, job, device=machine.device, progress=machine.progress, processes=machine.processes
    )
    series = {name: list(shown) for name, shown in method.series.items()}
    return {**trained, "training": {**trained["training"], **facts, "series": series}}


def check_stage(inputs: Inputs, machine: Machine) -> None:
    """Check everything that could stop a training: model, template, LoRA, the method's values and rows.

    Raises:
        RecipeError, ModelError, DataError: one of them cannot be used; the message says what to change.
    """
    from holdfast.data.prompts import resolve_template
    from holdfast.models.quantization import check_quantization
    from holdfast.models.trained import MUTATING, blueprint, check_trained
    from holdfast.pipeline.training import forget_sharding, make_config

    model, method, stage = inputs["model"], inputs["method"], inputs["stage"]
    folder, trusted, lora = model["base"].folder, model["trust_remote_code"], inputs["lora"]
    resolve_template(tokenizer_of(model), inputs["template"])
    check_quantization(folder, model["quantization"])
    if inputs["trains"] != "continue":
        if lora and machine.processes.count > 1 and lora.get("init_lora_weights") in MUTATING:
            init = lora["init_lora_weights"]
            raise RecipeError(
                f"{stage}.lora.init_lora_weights: {init} changes the base weights, and only a single "
                "process can correct that when it saves. Train in one process, or leave it out."
            )
        check_trained(folder, lora, model["dtype"], trusted)
    seed, nowhere = derive_seed(inputs["seed"], stage), Path("unused")
    config = make_config(method, inputs["parameters"], inputs["training"], seed, nowhere, machine.device)
    check_model = getattr(method.trainer, "check_model", None)
    if check_model is not None:
        check_model(config, blueprint(folder, lora, trusted))
    _check_sharding(inputs)
    del config  # transformers applies ZeRO-3 as long as the config exists
    forget_sharding()
    _check_mix(inputs)


def _check_sharding(inputs: Inputs) -> None:
    """Raise RecipeError if an adapter must be added to weights that DeepSpeed ZeRO-3 partitions."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    below = inputs["chain"] and inputs["trains"] != "continue"
    merges = inputs["model"]["compose"] == "merge" or inputs["trains"] == "full"
    if below and merges and is_deepspeed_zero3_enabled():
        raise RecipeError(
            "DeepSpeed ZeRO-3 partitions the weights, so the alignment adapter cannot be added to them. "
            "Write model.adapters: stack and train a LoRA, or use ZeRO-2 or FSDP2."
        )


def _check_mix(inputs: Inputs) -> None:
    """Change the rows once as a test, unless an attack or a filter has yet to write them."""
    found: Mapping[str, Path] = inputs["rows"]
    made = all((step / "rows.jsonl").is_file() for step in found.values())
    if inputs["method"].mix is not None and made:
        rows: dict[str, Any] = {name: rows_of(step) for name, step in found.items()}
        with tempfile.TemporaryDirectory() as beside:
            mixing.mix(inputs["method"], rows, inputs["parameters"], inputs["seed"], Path(beside))


def training_detail(training: Mapping[str, Any], trains: str, processes: int = 1) -> str:
    """Return the text that `plan` shows for a training."""
    batch = training["per_device_train_batch_size"] * training.get("gradient_accumulation_steps", 1)
    batch *= processes
    what = {"continue": ", single LoRA", "full": ", all weights"}.get(trains, "")
    if "max_steps" in training:
        return f"{training['max_steps']:,} optimizer steps of {batch} rows{what}"
    return f"{training['num_train_epochs']:g} epochs in steps of {batch} rows{what}"
