"""The mixin of all trainers: exact resume, with the method's state in the checkpoint.

A method's tensors go into `method/` of Trainer's own checkpoint. With two active adapters Trainer would load
only the first one and make it trainable; the list and the flags are restored. `training/private.py` holds the
private names that this needs.

Resuming runs no code from a checkpoint. `method/` holds JSON and safetensors. Trainer reads its own files
(optimizer, scheduler, scaler, random numbers, weights in `.bin`) with `weights_only=True`. Files of
`torch.distributed.checkpoint` (FSDP with SHARDED_STATE_DICT) are read only within `private.only_tensors`.
DeepSpeed reads its own files with pickle: resume a DeepSpeed training only from a checkpoint that you trust.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import DistributedType
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from holdfast.errors import DataError, ModelError, first_line
from holdfast.machine.files import read_json, write_text
from holdfast.training import fingerprint
from holdfast.training.batches import knows_epoch, not_empty, refuse_no_rows
from holdfast.training.casts import without_undone_casts
from holdfast.training.method_files import read_tensors, write_tensors
from holdfast.training.private import CheckpointSlots, compiling_layers, is_sft, metrics_kept, sft_rows
from holdfast.training.quantised import without_kept_inputs
from holdfast.training.shards import complete_state
from holdfast.training.tokenising import as_sequence, prepare_rows, rows_fingerprint

METHOD_FOLDER = "method"
METHOD_STATE = "state.safetensors"


class ResumableMixin(CheckpointSlots):
    """Saves what a method needs to resume exactly, and refuses to resume from a checkpoint of another run.

    A subclass returns its tensors from `method_state`. Anything that follows from `global_step` is not
    stored. Tensors may be sharded (DTensor): the file contains whole ones, and each process reads its part.
    """

    @classmethod
    def check_model(cls, config: Any, model: nn.Module) -> None:
        """Raise ModelError if the method cannot train these weights of `model` (its tensors may be "meta").

        A run calls this before anything starts. A trainer that overrides it calls it for itself.
        """

    def create_accelerator_and_postprocess(self: Any) -> None:
        """If the model is compiled: layer by layer, and in a way that notices a method's hooks."""
        with compiling_layers(self.args):
            super().create_accelerator_and_postprocess()  # type: ignore[misc]

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Train without casts that autocast undoes, and without inputs that 8-bit layers need not keep."""
        with without_undone_casts(self.model, self.args.device.type), without_kept_inputs(self.model):
            return super().train(*args, **kwargs)  # type: ignore[misc]

    def method_state(self: Any) -> dict[str, Tensor]:
        """Return the tensors to save, by name. A resume fills them in place and calls `method_loaded`."""
        return {}

    def method_loaded(self: Any, state: dict[str, Tensor]) -> None:
        """Take over the tensors of `method_state`, filled from the checkpoint."""

    def reported(self: Any, steps: int) -> dict[str, Any]:
        """Facts on a training of `steps` optimizer steps, for `step.json`: those the method declares."""
        return {}

    def state_at(self: Any, step: int) -> str | None:
        """The state of optimizer step `step` (from 0), for the progress bar; None without states."""
        return None

    def run_fingerprint(self: Any) -> dict[str, Any]:
        """Return what must not change for a resumed run to equal an uninterrupted run."""
        args = self.args
        # DDP, FSDP and DeepSpeed write different checkpoints.
        kind = self.accelerator.distributed_type.value
        return {
            "trainer": type(self).__name__,
            "world_size": args.world_size,
            **({"distributed_type": kind} if args.world_size > 1 else {}),
            **fingerprint.options(args),
            **fingerprint.model_facts(self.accelerator.unwrap_model(self.model)),
            "data_collator": type(self.data_collator).__name__,
            "compute_loss_func": getattr(self.compute_loss_func, "__qualname__", None),
            "train_dataset": rows_fingerprint(self.train_dataset),
        }

    def prepare_extra_rows(self: Any, rows: Any) -> Any:
        """Prepare rows beyond `train_dataset` like this trainer prepares its own (TRL: also packed).

        Raises:
            DataError: on `trl.SFTTrainer`, rows of another kind than `train_dataset` (training would silently
                include their prompts), rows without any completion within max_length, or `loss_on`, which has
                no effect there.
        """
        if rows is None or not is_sft(self):
            return prepare_rows(rows, self.processing_class, self.args.max_length, self.args.loss_on)
        args = self.args
        if getattr(args, "loss_on", "all") != "all":
            raise DataError("loss_on has no effect on trl.SFTTrainer. Set assistant_only_loss instead.")
        rows = rows if hasattr(rows, "column_names") else Dataset.from_list(list(as_sequence(rows)))
        told = args.completion_only_loss is not None or "input_ids" in rows.column_names
        if not told and self.completion_only_loss != ("completion" in rows.column_names):
            has = "has" if self.completion_only_loss else "does not have"
            raise DataError(
                f"train_dataset {has} prompt and completion columns, the other rows have "
                f"{', '.join(rows.column_names)}: the loss would be on other parts of them. "
                "Give both as prompt and completion, or set completion_only_loss."
            )
        made = sft_rows(self, rows)
        if not len(made):
            raise DataError(
                f"None of the other {len(rows)} rows has a completion within max_length={args.max_length}. "
                "Raise it."
            )
        return made

    def get_train_dataloader(self: Any) -> DataLoader:
        """Return the loader of the parent class, with an order that depends on seed and epoch alone."""
        refuse_no_rows(self.train_dataset)
        return knows_epoch(not_empty(self, super().get_train_dataloader()))

    def unrecorded(self: Any) -> AbstractContextManager[None]:
        """Keep losses computed inside out of the metrics that `trl.SFTTrainer` collects with each loss."""
        return metrics_kept(self)

    def before_optimizer_is_saved(self: Any) -> None:
        """Complete the optimizer's state, without which FSDP could not load it."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            complete_state(self.optimizer)

    def save_to(self: Any, checkpoint: Path) -> None:
        """Write `method/`: the run's fingerprint and the method's tensors."""
        folder = checkpoint / METHOD_FOLDER
        if self.args.should_save:
            folder.mkdir(exist_ok=True)
            write_text(folder / "run.json", _as_json(self.run_fingerprint() | self._optimizer_facts()))
        state = self.method_state()
        if state:
            write_tensors(folder / METHOD_STATE, state, main=self.args.should_save)

    def _optimizer_facts(self: Any) -> dict[str, Any]:
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            return {}  # its own wrappers, which its checkpoint checks
        return fingerprint.optimizer_facts(self.optimizer, self.lr_scheduler)

    def before_optimizer_is_read(self: Any, checkpoint: Path) -> None:
        """Refuse a checkpoint of another optimizer or scheduler, whose state would replace this run's."""
        self._refuse_other_run(checkpoint / METHOD_FOLDER / "run.json", self._optimizer_facts())

    def load_from(self: Any, checkpoint: Path) -> None:
        """Read `method/`, after a check that it is of this run."""
        folder = checkpoint / METHOD_FOLDER
        self._refuse_other_run(folder / "run.json")
        state = self.method_state()
        if state:
            read_tensors(folder / METHOD_STATE, state)
            self.method_loaded(state)

    def _refuse_other_run(self: Any, path: Path, facts: dict[str, Any] | None = None) -> None:
        """Raise ModelError if the run that wrote `path` differs in its fingerprint, or in these `facts`."""
        if not path.is_file():
            raise ModelError(
                f"{path.parent.parent} was not written by a Holdfast trainer: {path} is missing, so the run "
                "cannot resume exactly. Start without resume_from_checkpoint."
            )
        ours = json.loads(_as_json(self.run_fingerprint() if facts is None else facts))
        try:
            saved = read_json(path)
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} is damaged ({first_line(error)}). Use another checkpoint.") from None
        if not isinstance(saved, dict):
            raise ModelError(f"{path} is damaged (expected an object). Use another checkpoint.")
        saved = {name: fingerprint.default(name) for name in ours} | saved
        different = [k for k in ours if saved[k] != ours[k]]
        if different:
            what = "; ".join(f"{k}: {saved[k]} in the checkpoint, {ours[k]} now" for k in different)
            raise ModelError(
                f"{path.parent.parent} belongs to another run ({what}). Resume with the same values."
            )

    def _refuse_inexact(self: Any) -> None:
        config, wrong = self.args.accelerator_config, None
        if not config.use_seedable_sampler:
            wrong = "use_seedable_sampler=False, the order of the rows is not known after a stop"
        if self.args.ignore_data_skip:
            wrong = "ignore_data_skip=True, the epoch begins again with its first rows"
        if wrong:
            raise ModelError(f"The run cannot resume exactly: with {wrong}. Leave it out, or start anew.")

    @contextmanager
    def loading_weights(self: Any, checkpoint: Path, model: Any) -> Iterator[None]:
        """Refuse another run's checkpoint, and restore which adapters are active and what trains."""
        self._refuse_inexact()
        self._refuse_other_run(checkpoint / METHOD_FOLDER / "run.json")
        active = getattr(model, "active_adapters", [])
        # On a whole model, where older versions of PEFT leave a `peft_config`, it is a method.
        adapters = list(active) if hasattr(model, "peft_config") and not callable(active) else []
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        yield
        if len(adapters) > 1:
            # Older versions of Trainer do not read this file; FSDP and DeepSpeed load weights themselves.
            weights, sharded = checkpoint / "adapter_model.safetensors", self.is_fsdp_enabled
            if "default" in adapters and weights.is_file() and not (sharded or self.is_deepspeed_enabled):
                from peft import set_peft_model_state_dict

                set_peft_model_state_dict(model, load_file(weights), adapter_name="default")
            model.base_model.set_adapter(adapters)
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trainable)


def _as_json(fingerprint: dict[str, Any]) -> str:
    return json.dumps(fingerprint, indent=1, default=str)
