"""A plan: the steps of a run in order, and the states of the model that it evaluates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast.pipeline.step import Step
from holdfast.recipe import Recipe


@dataclass(frozen=True)
class State:
    """A state of the model that is evaluated: its defenses, and the ids of its steps.

    Attributes:
        chain: the trainings that led to it, even if a later one continued their adapter, and the repair.
        post_hoc_parameters: the parameters of the repair.
        lm_eval: the step of lm-evaluation-harness, if the recipe asks for it.
        chosen: the steps that change or select user rows, by kind; a list for several attacks.
        tampered: the attack on its weights.
        point: the point of an attack sweep at which it was trained.
    """

    name: str
    alignment: str | None
    user: str | None
    post_hoc: str | None
    chain: tuple[str, ...]
    generate: str
    moderate: tuple[str, ...]
    score: str
    rate: str | None = None
    lm_eval: str | None = None
    post_hoc_parameters: Mapping[str, Any] | None = None
    chosen: Mapping[str, str | list[str]] = field(default_factory=dict)
    tampered: str | None = None
    point: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Plan:
    """The steps of a run in order, and the states of the model that it evaluates.

    Attributes:
        dtype: the dtype that the model computes in.
        elsewhere: what is not on this machine, so that the names of the steps are not known.
    """

    recipe: Recipe
    steps: tuple[Step, ...]
    states: tuple[State, ...]
    manifest: str
    model: Path
    elsewhere: tuple[str, ...] = ()
    dtype: str = "float32"

    def __iter__(self) -> Any:
        return iter(self.steps)
