"""One training stage: trains a model on rows with a method, writes a PEFT adapter folder, and can resume.

The step's folder contains `checkpoints/` during the training, then `adapter/` (or `model/` if all weights
were trained) with a model card, and `trainer_state.json`.

Several processes train together; the main one writes the complete files after all have written their parts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType, broadcast_object_list
from transformers import PrinterCallback
from transformers.integrations import TensorBoardCallback

from holdfast.defenses import Defense
from holdfast.errors import ModelError, RecipeError
from holdfast.machine.files import remove_tree, replace_folder, write_text
from holdfast.machine.processes import Processes
from holdfast.machine.progress import Progress
from holdfast.machine.seeds import derive_seed
from holdfast.machine.store import SCRATCH
from holdfast.models.trained import load_trainable, save_trained
from holdfast.pipeline.checkpoints import last_checkpoint
from holdfast.pipeline.method_config import make_config
from holdfast.pipeline.monitor import TrainingMonitor, over_processes
from holdfast.recipe.stages import NOT_IDENTITY
from holdfast.training.shards import finite, gather_trainable
from holdfast.training.trainer import planned_steps
from holdfast.weights.card import name_base, without_paths
from holdfast.weights.chains import write_below

CHECKPOINTS = 10
"""Approximate number of checkpoints that a training writes; only the last two are kept."""


@dataclass(frozen=True)
class TrainingJob:
    """The inputs of a training stage, except its folder.

    Attributes:
        stage: the kind of step: "alignment", "user", "post_hoc", "harmful_adapter" or "refusal_adapter".
        parameters: the method's own parameters.
        training: `TrainingArguments` fields.
        trains: "new" (an adapter), "continue" (the last of `adapters`) or "full" (all weights).
        lora: settings of the new adapter; None if no new adapter is trained.
        model_name: the path or Hub id of the model.
        model_title: its name in the card and in the adapter's configuration, without a path.
        adapters: the adapters below, in order.
        buffer: an adapter above these and below the trained one, which is used without it.
        rows: by argument of the trainer ("train_dataset", "alignment_dataset", ...), as prompt + completion.
        folders: folders of weights that the method reads, by argument of the trainer ("base", "aligned").
        logs: the folder for TensorBoard, if the recipe asks for it.
    """

    stage: str
    defense: Defense
    parameters: Mapping[str, Any]
    training: Mapping[str, Any]
    trains: str
    lora: Mapping[str, Any] | None
    model: Path
    model_name: str
    model_title: str
    tokenizer: Any
    model_options: Mapping[str, Any]
    adapters: Sequence[Path]
    rows: Mapping[str, Sequence[Mapping[str, Any]]]
    seed: int
    folders: Mapping[str, Path] = field(default_factory=dict)
    buffer: Path | None = None
    logs: Path | None = None


def train(
    folder: Path, job: TrainingJob, *, device: str, progress: Progress, processes: Processes | None = None
) -> dict[str, Any]:
    """Train in `folder`, or resume, and return facts for `step.json`. All `processes` call it.

    Raises:
        RecipeError: the method's configuration refuses a value, or the processes cannot train together.
        ModelError: the model cannot be loaded, LoRA cannot be added to it, or the training diverged.
    """
    seed = derive_seed(job.seed, job.stage)
    checkpoints = folder / SCRATCH
    config = make_config(job.defense, job.parameters, job.training, seed, checkpoints, device)
    processes = processes or Processes()
    model = load_trainable(
        job.model,
        [*job.adapters, *([job.buffer] if job.buffer else [])],
        job.trains,
        job.lora,
        base=job.model_name,
        seed=derive_seed(job.seed, job.stage, "lora"),
        initial=checkpoints / "initial",
        # FSDP and DeepSpeed place the model themselves; the whole model may not fit on the device.
        device="cpu" if processes.sharded else device,
        **job.model_options,
    )
    assert job.defense.trainer is not None
    trainer = job.defense.trainer(
        model=model, args=config, processing_class=job.tokenizer, **job.rows, **job.folders
    )
    _check_processes(trainer, processes)
    total = planned_steps(trainer)
    config.save_steps = config.logging_steps * math.ceil(total / CHECKPOINTS / config.logging_steps)
    # All resume from the checkpoint that the main process sees: file systems may show others different files.
    last = broadcast_object_list([last_checkpoint(checkpoints, progress.say) if processes.main else None])[0]
    monitor = TrainingMonitor(trainer, total, last, progress)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(monitor)
    with tracked(trainer, folder.name, job.logs or folder / "tensorboard"):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    facts = monitor.facts()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    broken = not finite(p for p in trained.parameters() if p.requires_grad)
    if over_processes(trainer, broken).any():
        raise ModelError(
            f"Training at the {job.stage} stage diverged: some weights are not finite. Lower learning_rate."
        )
    weights = gather_trainable(trained, keep=processes.main) if processes.count > 1 else None
    if processes.main:
        _save(folder, trained, weights, job, facts)
        trainer.state.save_to_json(str(folder / "trainer_state.json"))
    trainer.accelerator.wait_for_everyone()
    forget_sharding()
    return facts


def forget_sharding() -> None:
    """Load later models whole; under ZeRO-3, loading would wait for processes that do not load anything."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def _check_processes(trainer: Any, processes: Processes) -> None:
    """Raise RecipeError if accelerate would silently train separately, or without the requested sharding."""
    found, kind = trainer.args.world_size, trainer.accelerator.distributed_type
    if found != processes.count:
        raise RecipeError(
            f"{processes.count} processes were started, but each would train alone (accelerate found "
            f"{found}). Give --device cpu, or start one process for each GPU."
        )
    if processes.sharded and kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise RecipeError(
            f"The launcher asked for FSDP or DeepSpeed, but accelerate would use {kind.value}: both need "
            "GPUs. Leave them out, or run on GPUs."
        )


@contextmanager
def tracked(trainer: Any, name: str, logs: Path) -> Iterator[None]:
    """Name the training for its trackers, and keep the logs of each training separate.

    Otherwise TensorBoard would write into the checkpoints, which are removed, and wandb would leave its run
    open, so that the next stage would write into it.

    Args:
        name: the name if the recipe sets no `run_name`.
        logs: the folder for TensorBoard.
    """
    trainer.args.run_name = trainer.args.run_name or name
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback):
            callback.logging_dir = callback.logging_dir or str(logs)
    ours = False
    if "wandb" in trainer.args.report_to:
        import wandb

        ours = wandb.run is None
    try:
        yield
    finally:
        if ours:
            wandb.finish()


def _save(
    folder: Path, model: Any, weights: Mapping[str, Any] | None, job: TrainingJob, facts: Mapping[str, Any]
) -> None:
    """Write the trained weights, then rename the folder; `weights` are the whole ones of a sharded model."""
    name = "model" if job.trains == "full" else "adapter"
    beside, target = folder / f"{name}.partial", folder / name
    remove_tree(beside)
    save_trained(model, job.tokenizer, beside, folder / SCRATCH / "initial", weights, job.model)
    if job.trains != "full":
        name_base(beside, job.model_title)
        write_below(beside, job.adapters[:-1] if job.trains == "continue" else job.adapters)
    write_text(beside / "README.md", _card(job, facts))
    replace_folder(beside, target)


WHAT = {
    "new": ("LoRA adapter", "on top of the adapter in"),
    "continue": ("LoRA adapter (single LoRA)", "continues, and replaces, the adapter in"),
    "full": ("Model, all weights trained,", "in its weights: the adapter in"),
}
"""For the card: the kind of result, and its relation to the adapters below."""


def _card(job: TrainingJob, facts: Mapping[str, Any]) -> str:
    """Return a model card that says what was trained and what was not measured."""
    what, how = WHAT[job.trains]
    rows = {name: len(part) for name, part in job.rows.items()}
    training = {key: value for key, value in job.training.items() if key not in NOT_IDENTITY}
    training, parameters = without_paths(training), without_paths(job.parameters)
    adjusted = facts["training"].get("adjusted") or {}
    scaled = "".join(f"- {name}: {used} instead of {asked}, scaled to a short run\n"
                     for name, (asked, used) in adjusted.items())  # fmt: skip
    serving = f"- serving: {job.defense.serving}\n" if job.defense.serving else ""
    chain = "\n".join(f"- {how} `../../{p.parent.name}/{p.name}`" for p in job.adapters)
    if job.buffer:
        chain += f"\n- trained above `../../{job.buffer.parent.name}/{job.buffer.name}`, used without it"
    return f"""---
library_name: {"transformers" if job.trains == "full" else "peft"}
base_model: {json.dumps(job.model_title)}
tags: [holdfast, {job.defense.name}]
---
# {what} from the {job.stage} stage: {job.defense.label}

- base model: `{job.model_title}`
{chain or "- directly on the base model"}
- method: {job.defense.label} ({job.defense.paper})
- parameters: `{json.dumps(parameters, sort_keys=True)}`
- training arguments: `{json.dumps(training, sort_keys=True)}`
- rows: `{json.dumps(rows)}`, seed {job.seed}
- optimizer steps: {facts["training"]["steps"]}, of {facts["training"]["rows_per_step"]} rows each
- processes: {facts["training"]["processes"]} ({facts["training"]["distributed_type"]})
{scaled}{serving}
Harmful score and finetune accuracy are in the `results.json` of the run that made it. Anything that
is not there was not measured. A low harmful score under one judge and one prompt set is not safety.
"""
