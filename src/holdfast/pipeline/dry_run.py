"""Build the trainer of a stage once without weights, and take one optimizer step with a tiny model.

Both happen before anything is trained. The first finds a method that refuses the rows or the settings, the
second finds an option or a package that this machine does not have.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.defenses import Defense
from holdfast.errors import HoldfastError, RecipeError, first_line
from holdfast.machine.store import canonical_json
from holdfast.pipeline.method_config import make_config
from holdfast.recipe.stages import NOT_IDENTITY
from holdfast.training.trainer import planned_steps

MANY = 10_000
"""Number of rows that is assumed for a data set whose rows an attack or a filter has yet to choose."""


class Standing:
    """A tokenised data set with the right number of rows, all equal; it takes no memory."""

    column_names = ("input_ids", "labels")

    def __init__(self, rows: int):
        self.rows = rows
        self.row = {"input_ids": [0, 0, 0], "labels": [-100, 0, 0], "attention_mask": [1, 1, 1]}

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if not 0 <= index < self.rows:
            raise IndexError(index)
        return self.row

    def map(self, *_: Any, **__: Any) -> Standing:
        """Return the data set itself, which needs no preparation."""
        return self


def build_trainer(
    method: Defense,
    config: Callable[..., Any],
    model: Any,
    tokenizer: Any,
    rows: Mapping[str, int],
    folders: Mapping[str, Path],
) -> None:
    """Build the trainer, the optimizer and the scheduler for `model`, whose tensors are on "meta".

    Args:
        config: returns the configuration of a given method.
        rows: the number of rows, by argument of the trainer.
        folders: the folders of weights, by argument of the trainer; they need not exist yet.

    Raises:
        RecipeError: a setting, an option or the number of rows cannot be used.
        InputError: what the method itself raises.
    """
    assert method.config is not None
    assert method.trainer is not None
    unplaced = type(method.config.__name__, (method.config,), {"place_model_on_device": False})
    with _explained(method.name):
        trainer: Any = method.trainer(
            model=model,
            args=config(replace(method, config=unplaced)),
            processing_class=tokenizer,
            **{name: Standing(number) for name, number in rows.items()},
            **folders,
        )
        trainer.create_optimizer_and_scheduler(max(planned_steps(trainer), 1))


def take_a_step(name: str, training: Mapping[str, Any], device: str) -> None:
    """Take one optimizer step with a tiny model, plain SFT and the same training arguments.

    Raises:
        RecipeError: it fails.
    """
    given = {k: v for k, v in training.items() if k not in NOT_IDENTITY}
    problem = _stepped(canonical_json(given), device)
    if problem is not None:
        raise RecipeError(f"{name}: these training arguments do not work here: {problem}")


@cache
def _stepped(training: str, device: str) -> str | None:
    """Return why a step fails; None if it does not."""
    import json

    from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback

    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    short = {
        "max_steps": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
        "logging_steps": 1, "dataloader_num_workers": 0, "report_to": "none",
    }  # fmt: skip
    plain = registry.get_defense("sft")
    assert plain.trainer is not None
    with tempfile.TemporaryDirectory() as folder:
        config = make_config(plain, {}, {**json.loads(training), **short}, 0, Path(folder), device)
        config.save_strategy = "no"
        config.dataloader_prefetch_factor = None
        try:
            model = LlamaForCausalLM(LlamaConfig(vocab_size=8, max_position_embeddings=8, **sizes))
            trainer: Any = plain.trainer(
                model=model, args=config, train_dataset=Standing(4), data_collator=_collate
            )
            trainer.remove_callback(PrinterCallback)
            gc.freeze()  # Trainer collects garbage, which takes half a second among many objects
            trainer.train()
        except Exception as error:  # an option can fail in any way
            return _sentence(error)
        finally:
            gc.unfreeze()
    return None


def _collate(rows: list[Mapping[str, list[int]]]) -> dict[str, Any]:
    import torch

    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except HoldfastError:
        raise
    except Exception as error:  # an option can fail in any way
        raise RecipeError(f"{name}: the training cannot start: {_sentence(error)}") from None


def _sentence(error: Exception) -> str:
    text = first_line(error)
    return text if text.endswith(".") else f"{text}."
