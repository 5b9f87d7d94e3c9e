"""Describe the training steps of a plan: the stages, and the adapters that a method needs beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from holdfast import registry
from holdfast.machine.processes import launched
from holdfast.pipeline import mixing, repairing, stages
from holdfast.pipeline.plan_draft import Draft, parameters_of
from holdfast.pipeline.step import Code, Content, Made
from holdfast.pipeline.versions import TRAINED_BY, packages
from holdfast.recipe.stages import NOT_IDENTITY, USER_TRAINING, StageRecipe

TITLES = {
    "alignment": "alignment with {label}",
    "user": "user fine-tuning with {label}",
    "harmful_adapter": "adapter on the harmful rows",
    "refusal_adapter": "adapter on the alignment rows, above the harmful one",
    "post_hoc": "repair with {label}",
}
"""The titles of trainings, by kind of step."""


def add_training(
    draft: Draft,
    stage: str,
    part: StageRecipe,
    defaults: Mapping[str, Any],
    rows: Mapping[str, Made],
    below: tuple[str, ...],
    buffer: str | None = None,
    kind: str | None = None,
) -> str:
    """Add a training stage on top of the weights of the steps `below`.

    Args:
        buffer: the step of an adapter above these, which the result is used without.
        kind: the kind of step, if it is not the stage.
    """
    recipe = draft.recipe
    if repairing.hardens(part):  # plain SFT, whose weights the method changes afterwards
        part = part.as_sft()
    parameters = parameters_of(part)
    training = {**defaults, **part.training.given()}
    if stage == "user" and kind is None:
        training |= recipe.data.attack_training()
    trains = recipe.trains(stage)
    processes = draft.processes.get(stage, launched().count)
    last = "user" if stage == "post_hoc" else stage
    # Single LoRA continues the alignment stage's adapter.
    single = stage != "alignment" and recipe.trains("user") == "continue"
    lora = None if trains == "full" else recipe.lora("alignment" if single else last)
    inputs = {
        **draft.model,
        "stage": kind or stage,
        "method": Code("defenses", part.defense),
        "parameters": parameters,
        "training": Content(training, {k: v for k, v in training.items() if k not in NOT_IDENTITY}),
        "trains": trains,
        "lora": lora.identity() if lora else None,
        "rows": dict(rows),
        "chain": [Made(step) for step in below],
        "seed": recipe.seed,
        "processes": processes,  # multiplies the rows of an optimizer step
        "packages": packages(TRAINED_BY, recipe.model.quantization),
        **({"buffer": Made(buffer)} if buffer else {}),
    }
    if kind is None and "base" in recipe.needs(stage) and not repairing.hardens(getattr(recipe, stage)):
        inputs |= repairing.alignment_inputs(recipe, stage, draft.base(stage), draft.digests)
    label = registry.face("defenses", part.defense).facts.get("label", part.defense)
    title = TITLES[kind or stage].format(label=label)
    detail = stages.training_detail(training, trains, processes)
    detail += mixing.detail(part.defense, parameters) or repairing.shown_after(parameters)
    work = stages.train_stage, stages.check_stage
    return draft.add(kind or stage, title, detail, inputs, *work, together=True)


def add_harmful_adapter(
    draft: Draft, stage: str, rows: Mapping[str, str], below: tuple[str, ...]
) -> str | None:
    """Add the adapter that plain SFT trains on the harmful rows, if the stage's method needs it."""
    if not {"harmful_adapter", "refusal_adapter"} & set(draft.recipe.needs(stage)):
        return None
    return add_adapter(draft, "harmful_adapter", rows["harmful"], below, None)


def add_adapter(draft: Draft, kind: str, rows: str, below: tuple[str, ...], buffer: str | None) -> str:
    """Add an adapter that is trained like the user's, with plain SFT and on other rows."""
    assert draft.recipe.user is not None
    part, given = draft.recipe.user.as_sft(), {"train_dataset": Made(rows)}
    return add_training(draft, "user", part, USER_TRAINING, given, below, buffer, kind)
