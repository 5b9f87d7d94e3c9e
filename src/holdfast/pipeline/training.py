"""One training stage: trains a model on rows with a method, writes a PEFT adapter folder, and can resume.

The step's folder contains `checkpoints/` during the training, then `adapter/` (or `model/` if all weights
were trained) with a model card, and `trainer_state.json`. A checkpoint is used only if it has a
`holdfast.json`, which is written last, so that a kill while saving costs only one interval. It lists the
checkpoint's files with sizes and SHA-256; a checkpoint whose files differ is removed.

Several processes train together; the main one writes the complete files after all have written their parts.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, broadcast_object_list
from transformers import PrinterCallback, TrainerCallback
from transformers.integrations import TensorBoardCallback

from holdfast.defenses import Defense
from holdfast.errors import ModelError, RecipeError, first_line
from holdfast.machine import digests
from holdfast.machine.cost import SUM, Cost
from holdfast.machine.files import read_json, remove_tree, replace_folder, write_json, write_text
from holdfast.machine.processes import Processes
from holdfast.machine.progress import Progress
from holdfast.machine.seeds import derive_seed
from holdfast.machine.store import MARKER, SCRATCH
from holdfast.models.trained import load_trainable, save_trained
from holdfast.recipe.stages import NOT_IDENTITY, trackers
from holdfast.training.shards import finite, gather_trainable, trainable_numel
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


def over_processes(trainer: Any, value: float) -> torch.Tensor:
    """Return the `value` of every process of a training, shape (processes,); all of them call this."""
    here = torch.tensor([float(value)], dtype=torch.float64)
    if trainer.args.world_size == 1:
        return here
    return trainer.accelerator.gather(here.to(trainer.args.device)).cpu()


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


def last_checkpoint(folder: Path, say: Callable[[str], None] | None = None) -> Path | None:
    """Return the newest checkpoint that is complete and unchanged.

    Newer ones with other files are removed, and so are half-written ones, which have no marker.

    Args:
        say: called with a message about each checkpoint that is removed.
    """
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdecimal() and (path / MARKER).is_file():
            found[int(number)] = path
        else:
            remove_tree(path)
    for _, checkpoint in sorted(found.items(), reverse=True):
        changed = _changed(checkpoint)
        if changed is None:
            return checkpoint
        if say is not None:
            say(f"{checkpoint} is damaged ({changed}). It is removed; training resumes from an earlier one.")
        remove_tree(checkpoint)
    return None


def _changed(checkpoint: Path) -> str | None:
    """Return what differs between a checkpoint's files and its marker; None if nothing does."""
    try:
        marked = read_json(checkpoint / MARKER)
        if not digests.intact(marked):
            return f"{MARKER} was changed, or was written by an earlier version"
        listed = marked["files"]
        added = [p for p in _files(checkpoint) if p.relative_to(checkpoint).as_posix() not in listed]
        names = digests.changed(listed, checkpoint)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MARKER} cannot be read"
    # Systems add hidden files of their own; `.metadata` is torch's.
    names += [p.name for p in added if p.name == ".metadata" or not p.name.startswith(".")]
    return f"changed, missing or added: {', '.join(names)}" if names else None


def _files(checkpoint: Path) -> list[Path]:
    return [p for p in checkpoint.rglob("*") if p.is_file() and p != checkpoint / MARKER]


class TrainingMonitor(TrainerCallback):
    """Reports progress, measures seconds, peak memory (bytes) and tokens, and marks checkpoints as complete.

    The costs of a killed run up to its last checkpoint are read from that checkpoint's marker and added.
    """

    def __init__(self, trainer: Any, total: int, checkpoint: Path | None, progress: Progress):
        earlier = read_json(checkpoint / MARKER) if checkpoint else {}
        self.trainer, self.total, self.progress = trainer, total, progress
        self.cost = Cost(str(trainer.args.device), earlier.get("cost"))
        self.latest: dict[str, Any] = {}

    def facts(self) -> dict[str, Any]:
        """Return the facts of a training for `step.json`; every process calls this."""
        trainer, args = self.trainer, self.trainer.args
        tokens, steps = int(trainer.state.num_input_tokens_seen), trainer.state.global_step

        def over(value: float, how: str) -> float:
            everywhere = over_processes(trainer, value)
            return float(everywhere.sum() if how == SUM else everywhere.max())

        cost = self.cost.facts(tokens=tokens, steps=steps, over=over)
        training = {
            "steps": steps,
            "tokens": tokens,
            "tokens_per_second": cost["tokens_per_second"],
            "trainable_parameters": trainable_numel(trainer.model),
            "processes": args.world_size,
            "distributed_type": trainer.accelerator.distributed_type.value,
            "rows_per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        }
        if hasattr(trainer, "reported"):
            training |= trainer.reported(self.total)
        same = {key: cost[key] for key in ("seconds", "peak_memory_bytes", "peak_memory_kind")}
        return {**same, "cost": cost, "training": training}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the step and measure the memory."""
        self.cost.look()
        state_at = getattr(self.trainer, "state_at", None)
        now = state_at(state.global_step - 1) if state_at else None
        speed = state.num_input_tokens_seen / max(self.cost.seconds, 1e-9)
        self.latest["tokens_per_second"] = speed
        self.progress.advance(state.global_step, self.total, state=now, **self.latest)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the values that the progress bar shows beside the steps."""
        if logs and "loss" in logs:
            self.latest["loss"] = logs["loss"]

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mark the checkpoint as complete: every process has written its part of it by now."""
        facts = self.facts()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            files = digests.describe(_files(folder), folder)
            write_json(folder / MARKER, digests.sealed({**facts, "files": files}))


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
