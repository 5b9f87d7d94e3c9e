"""The trainer of all methods: a `transformers.Trainer` for rows of text, and its configuration."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any

from transformers import Trainer, TrainerCallback, TrainingArguments

from holdfast.chat.rendering import LOSS_ON
from holdfast.chat.tokenizers import embedding_rows
from holdfast.errors import ModelError, first_line
from holdfast.training.batches import refuse_no_rows
from holdfast.training.gradient_checkpointing import checkpoints_reentrantly, free_inputs
from holdfast.training.lean_loss import LeanLossMixin
from holdfast.training.quantised import keep_differentiable
from holdfast.training.resuming import ResumableMixin
from holdfast.training.shards import drop_gathered
from holdfast.training.tokenising import collator, equal_lengths, prepare_rows


@dataclass
class MethodConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the maximum row length, the trained answers, and the loss."""

    max_length: int | None = field(
        default=2048, metadata={"help": "Maximum tokens of prompt and completion together; None: no limit."}
    )
    loss_on: str = field(
        default="all", metadata={"help": "Trained answers of a conversation: 'all', or the 'last' only."}
    )
    lean_loss: bool = field(
        default=True, metadata={"help": "Compute logits for labels only, if that does not change the loss."}
    )

    def __post_init__(self) -> None:
        for option in fields(self):
            refuse_not_finite(option.name, getattr(self, option.name, None))
        if self.use_liger_kernel:
            raise ValueError(
                "use_liger_kernel must be False: liger-kernel replaces the model's forward, in which methods "
                "read layers and logits, and its numbers were not compared. lean_loss saves the same logits"
            )
        super().__post_init__()
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length must be at least 2, found {self.max_length}")
        if self.loss_on not in LOSS_ON:
            raise ValueError(f"loss_on must be one of {', '.join(LOSS_ON)}, found {self.loss_on!r}")
        if self.fp16 and self.device.type == "cpu":
            # accelerate would continue silently without a scaler, and small gradients would become zero.
            raise ValueError("fp16 needs a loss scaler, which a CPU does not have. Use bf16")


def refuse_not_finite(name: str, value: Any) -> None:
    """Raise ValueError if the value of the option `name` is or contains NaN or infinity."""
    if isinstance(value, dict):
        for key, part in value.items():
            refuse_not_finite(f"{name}[{key!r}]", part)
    elif isinstance(value, list | tuple):
        for part in value:
            refuse_not_finite(name, part)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, found {value}")


class RowTrainer(LeanLossMixin, ResumableMixin, Trainer):
    """A `transformers.Trainer` that accepts rows of text and resumes exactly."""

    def __init__(
        self,
        model: Any = None,
        args: MethodConfig | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ):
        args = args or MethodConfig()
        refuse_no_rows(train_dataset)
        if data_collator is None:
            data_collator = equal_lengths
            if processing_class is not None:
                data_collator = collator(processing_class, embedding_rows(model))
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=prepare_rows(train_dataset, processing_class, args.max_length, args.loss_on),
            eval_dataset=prepare_rows(eval_dataset, processing_class, args.max_length, args.loss_on),
            processing_class=processing_class,
            **kwargs,
        )
        self.add_callback(_BeforeTheFirstStep(self))


class _BeforeTheFirstStep(TrainerCallback):
    """Runs with the model as it will train: wrapped, checkpointing enabled, no hook of a method on it."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        check_savable(self.trainer)
        keep_differentiable(self.trainer.model)
        if not checkpoints_reentrantly(self.trainer.model):
            free_inputs(self.trainer.model)
        self.trainer.decide_lean()
        drop_gathered(self.trainer.model)


def check_savable(trainer: Any) -> None:
    """Refuse generation settings that transformers loads but does not save, before a whole model trains.

    Those of Llama-2 and Vicuna are such: a temperature without sampling. An adapter is saved without them.

    Raises:
        ModelError: checkpoints are to be written; otherwise it is a warning.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    settings = getattr(model, "generation_config", None)
    if settings is None or hasattr(model, "peft_config"):
        return
    try:
        settings.validate(strict=True)
    except ValueError as error:
        reasons = [line.strip("- ") for line in str(error).splitlines() if line.startswith("- ")]
        text = (
            f"transformers will not save this model: {'; '.join(reasons) or first_line(error)} Set "
            "model.generation_config.do_sample = True, or model.generation_config = GenerationConfig()."
        )
        if trainer.args.save_strategy != "no":
            raise ModelError(text) from None
        logging.getLogger(__name__).warning(text)


def planned_steps(trainer: Any) -> int:
    """Return the total number of optimizer steps of the trainer, counted like Trainer does."""
    if trainer.args.max_steps > 0:
        return trainer.args.max_steps
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]
