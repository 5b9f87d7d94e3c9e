"""What the steps of a run have at hand, and the states of the model that it evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from holdfast import data as datasets
from holdfast.machine.processes import Processes
from holdfast.machine.progress import Progress
from holdfast.machine.store import Store
from holdfast.models.device import choose_device
from holdfast.recipe import Recipe


@dataclass
class Context:
    """What every step of a run has at hand."""

    recipe: Recipe
    store: Store
    device_asked: str
    progress: Progress
    model: Path
    processes: Processes = field(default_factory=Processes)
    _device: str = field(default="", repr=False)

    @property
    def device(self) -> str:
        """The device to compute on, decided (and CPU threads set) at first use."""
        if not self._device:
            self._device = choose_device(self.device_asked, self.model, self.processes)
        return self._device

    @property
    def model_options(self) -> dict[str, Any]:
        """Keyword arguments of `load_model`."""
        model = self.recipe.model
        return {
            "dtype": model.dtype,
            "compose": model.adapters,
            "quantization": model.quantization,
            "trust_remote_code": model.trust_remote_code,
        }

    def weights(self, chain: Sequence[str]) -> tuple[Path, list[Path]]:
        """The model folder and the adapters on it that training steps made, in order.

        A step that trained all weights left a model instead of an adapter: the chain starts from there.
        """
        folder = self.model
        adapters: list[Path] = []
        for made in map(self.made, chain):
            if made.name == "model":
                folder, adapters = made, []
            else:
                adapters.append(made)
        return folder, adapters

    def made(self, step: str) -> Path:
        """The weights that a step made: its `model` folder where it trained all of them, or its `adapter`."""
        folder = self.store.path(step)
        return folder / ("model" if (folder / "model").is_dir() else "adapter")

    def rows(self, step: str) -> list[dict[str, Any]]:
        """The rows of a data step."""
        return datasets.read_rows(self.store.path(step) / "rows.jsonl")


@dataclass(frozen=True)
class State:
    """A state of the model that is evaluated: the defenses that ran, and the steps that tell of it.

    `chain` holds the trainings that led to it, also one whose adapter a later one went on with, and the
    repair after them, whose parameters are `post_hoc_parameters`; `chosen` the steps that chose among the
    user's rows, by kind.
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
    post_hoc_parameters: Mapping[str, Any] | None = None
    chosen: Mapping[str, str] = field(default_factory=dict)
