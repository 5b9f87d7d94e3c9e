"""What a training stage reports and costs: progress, seconds, peak memory and tokens, over all processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from holdfast.machine.cost import SUM, Cost
from holdfast.machine.files import read_json
from holdfast.machine.progress import Progress
from holdfast.machine.store import MARKER
from holdfast.pipeline.checkpoints import mark
from holdfast.training.shards import trainable_numel


def over_processes(trainer: Any, value: float) -> torch.Tensor:
    """Return the `value` of every process of a training, shape (processes,); all of them call this."""
    here = torch.tensor([float(value)], dtype=torch.float64)
    if trainer.args.world_size == 1:
        return here
    return trainer.accelerator.gather(here.to(trainer.args.device)).cpu()


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
            mark(Path(args.output_dir) / f"checkpoint-{state.global_step}", facts)
