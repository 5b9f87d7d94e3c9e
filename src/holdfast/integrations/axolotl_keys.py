"""The keys that Holdfast adds to axolotl's configuration, checked before a model is loaded."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from holdfast.errors import InputError, nearest
from holdfast.integrations.composing import Method, rows_of
from holdfast.integrations.hosted import named_method
from holdfast.registry import faces

Rows = str | dict[str, Any] | list[dict[str, Any]]
"""A source of ours, or one or several data sets in axolotl's syntax."""

REFUSED = {
    "sample_packing": "its batches hold rows of one data set only. Set sample_packing: false",
    "batch_flattening": "it removes the border between rows. Leave it out",
    "pretraining_dataset": "it is for fine-tuning on questions and answers",
    "streaming": "it needs the number of rows. Leave it out",
    "rl": "it extends supervised fine-tuning",
    "reward_model": "it extends supervised fine-tuning",
    "process_reward_model": "it extends supervised fine-tuning",
    "trainer_cls": "it makes the trainer class itself. Leave trainer_cls out",
    "curriculum_sampling": "it makes the order of the rows itself. Leave it out",
}
"""Keys of axolotl that do not work with a defense, and why."""


class ProbeKeys(BaseModel):
    """`probe:`, the arguments of SafetyProbe."""

    model_config = ConfigDict(extra="allow")  # further arguments go to the judge

    prompts: str = Field(description="Harmful prompts: a data set of ours, a file or a Hub id.")
    judge: str = "keyword"
    every: int = 50
    limit: float | None = None
    action: str = "warn"
    size: int | None = 16
    max_new_tokens: int = 16
    template: str = "auto"


class SafeLoraKeys(BaseModel):
    """`safe_lora:`, the repair after `axolotl merge-lora`."""

    model_config = ConfigDict(extra="forbid")

    base: str = Field(description="The model before alignment; base_model is the aligned one.")
    aligned: str | None = Field(default=None, description="The aligned model, if it is not base_model.")
    threshold: float | str | None = None
    num_layers: int | None = None
    projection: str = "approx"
    device: str = "cpu"

    @model_validator(mode="after")
    def _one_gate(self) -> SafeLoraKeys:
        if (self.threshold is None) == (self.num_layers is None):
            raise ValueError("safe_lora: give threshold or num_layers.")
        return self


class HoldfastKeys(BaseModel):
    """The block `holdfast:`; further keys are the parameters of the defense."""

    model_config = ConfigDict(extra="allow")

    defense: str | None = None
    alignment_dataset: Rows | None = None
    harmful_dataset: Rows | None = None
    probe: ProbeKeys | None = None
    safe_lora: SafeLoraKeys | None = None

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of the defense."""
        return dict(self.model_extra or {})

    def method(self) -> Method | None:
        """Return the method; None without `defense`."""
        return None if self.defense is None else named_method(self.defense, "axolotl")

    @model_validator(mode="after")
    def _sound(self) -> HoldfastKeys:
        own = [name for name in type(self).model_fields if name != "defense"]
        try:
            found = self.method()
        except InputError as error:
            raise ValueError(str(error)) from None
        if found is None:
            if self.parameters:
                name = min(self.parameters)
                raise ValueError(f"holdfast: '{name}' needs `defense`, or is unknown.{nearest(name, own)}")
            return self
        known = faces("defenses")[found.name].parameters
        for name in self.parameters:
            if name not in known:
                raise ValueError(f"{self.defense} has no parameter '{name}'.{nearest(name, [*known, *own])}")
        try:
            rows_of(found, self.alignment_dataset, self.harmful_dataset)
        except InputError as error:
            raise ValueError(f"holdfast: {error}") from None
        return self


class HoldfastArgs(BaseModel):
    """What the plug-in adds to axolotl's configuration; axolotl combines it with its own model."""

    holdfast: HoldfastKeys | None = None

    @model_validator(mode="after")
    def _with_axolotls_keys(self) -> HoldfastArgs:
        if self.holdfast is None or self.holdfast.defense is None:
            return self
        for name, why in REFUSED.items():
            if getattr(self, name, None):
                raise ValueError(f"holdfast: {self.holdfast.defense} does not work with {name}: {why}.")
        return self
