"""The block `launcher` of a grid: where its steps run, and what each kind of step needs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from holdfast.errors import RecipeError
from holdfast.pipeline.step import FORMAT
from holdfast.recipe import layers
from holdfast.recipe.reading import Layer

TRAINED = ("alignment", "user")
"""Kinds of steps that several processes can run together."""

LIGHT = ("data", "manifest", "change", "rate", "score")
"""Kinds of steps that use no GPU."""

KINDS = tuple(FORMAT)

TRAINED_AS = {"harmful_adapter": "user", "refusal_adapter": "user"}
"""Adapters that are trained with the processes of another kind of step."""

MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])i?B?", re.IGNORECASE)
TIME = re.compile(r"(?:(\d+)d)?\s*(?:(\d+)h)?\s*(?:(\d+)m)?", re.IGNORECASE)


class Needs(BaseModel):
    """What a step needs; None takes the value of the whole block."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    gpus: int | None = Field(default=None, ge=0)
    cpus: int | None = Field(default=None, ge=1)
    memory: str | None = None
    time: str | None = None
    processes: int | None = Field(default=None, ge=1)

    @field_validator("memory")
    @classmethod
    def _memory(cls, value: str | None) -> str | None:
        if value is not None and not MEMORY.fullmatch(value):
            raise ValueError(f"expected a size such as 500M or 32G, found '{value}'")
        return value

    @field_validator("time")
    @classmethod
    def _time(cls, value: str | None) -> str | None:
        if value is not None and not (value and TIME.fullmatch(value)):
            raise ValueError(f"expected a time such as 30m, 4h or 1d12h, found '{value}'")
        return value


class Launcher(Needs):
    """The block `launcher`.

    Attributes:
        steps: by kind of step, what differs from the values above.
        workers: the number of steps that run at the same time.
        partition, account, qos, constraint: as for `sbatch`.
        options: further options of `sbatch`, by name.
        setup: lines of shell that every Slurm job runs first.
        jobs: the largest number of Slurm jobs in the queue.
        address: a Ray cluster, "auto" for the one of this machine; by default one is started here.
    """

    name: Literal["local", "slurm", "ray"] = "local"
    steps: dict[Literal[KINDS], Needs] = Field(default_factory=dict)  # type: ignore[valid-type]
    workers: int | None = Field(default=None, ge=1)
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: dict[str, str | int | bool] = Field(default_factory=dict)
    setup: list[str] = Field(default_factory=list)
    jobs: int = Field(default=1000, ge=1)
    address: str | None = None

    def need(self, kind: str, device: str) -> Need:
        """Return what a kind of step needs.

        Args:
            device: the device of the sweep; on "cpu" a step needs no GPU.
        """
        own = self.steps.get(kind, Needs())

        def value(key: str) -> Any:
            given = getattr(own, key)
            return getattr(self, key) if given is None else given

        light = kind in LIGHT and own.gpus is None
        gpus = 0 if device == "cpu" or light else 1 if value("gpus") is None else value("gpus")
        if kind in TRAINED_AS:
            processes = self.need(TRAINED_AS[kind], device).processes
        else:
            processes = (value("processes") or max(1, gpus)) if kind in TRAINED else 1
        return Need(gpus, value("cpus"), size(value("memory")), minutes(value("time")), processes)

    def together(self, device: str) -> dict[str, int]:
        """Return the number of processes that train together, by stage."""
        return {kind: self.need(kind, device).processes for kind in TRAINED}


class _Root(BaseModel):
    launcher: Launcher


@dataclass(frozen=True)
class Need:
    """What one step needs: `memory` in bytes, `minutes` until it is started again."""

    gpus: int = 0
    cpus: int | None = None
    memory: int | None = None
    minutes: int | None = None
    processes: int = 1


def size(text: str | None) -> int | None:
    """Return a size such as "32G" in bytes."""
    found = MEMORY.fullmatch(text) if text else None
    return int(float(found[1]) * 1024 ** {"M": 2, "G": 3, "T": 4}[found[2].upper()]) if found else None


def minutes(text: str | None) -> int | None:
    """Return a time such as "1d12h" in minutes."""
    found = TIME.fullmatch(text) if text else None
    if not found:
        return None
    days, hours, rest = (int(part or 0) for part in found.groups())
    return days * 1440 + hours * 60 + rest


def read(raw: Any, files: Sequence[Layer], name: str | None, overrides: Mapping[str, Any]) -> Launcher:
    """Return the block of a grid.

    Args:
        raw: the value of the key `launcher`; None if the grid has none.
        name: the launcher that the command line asks for.
        overrides: keys that the command line changes.

    Raises:
        RecipeError: the block is not valid.
    """
    if raw is not None and not isinstance(raw, Mapping):
        raise RecipeError(f"launcher: expected a block such as launcher: {{gpus: 1}}, found {raw!r}.")
    given = layers.on_top(raw or {}, overrides, (), ())
    if name is not None:
        given["name"] = name
    try:
        made = _Root.model_validate({"launcher": given}).launcher
    except ValidationError as error:
        raise RecipeError(layers.explain(error, files, _Root)) from None
    for kind, needs in made.steps.items():
        if needs.processes and kind not in TRAINED:
            text = f"only {' and '.join(TRAINED)} steps run in several processes"
            raise RecipeError(f"launcher.steps.{kind}.processes: {text}.")
    return made


def placed(block: Launcher, device: str) -> str:
    """Return the device of a sweep: nodes of a cluster may have GPUs that this machine has not."""
    if block.name == "local" or device != "auto":
        return device
    return "cuda" if any(block.need(kind, "cuda").gpus for kind in KINDS) else "cpu"
