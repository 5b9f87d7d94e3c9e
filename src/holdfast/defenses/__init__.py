"""Defenses: one file for each method, found by the registry.

This file does not import torch, so that importing `Defense` is fast; the files beside it do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

__all__ = ["Defense", "Planned", "Stage", "Tuned", "safe_lora", "safe_lora_parts"]

Stage = Literal["alignment", "user", "post_hoc"]
Trains = Literal["new", "continue", "full"]


@dataclass(frozen=True)
class Defense:
    """The declaration of a method, in a file in `defenses/` or an entry point `holdfast.defenses`.

    No other code in Holdfast knows a method by name: recipes, the pipeline, the report, the contract suite
    and the tables of the documentation read this declaration. Every argument is a literal or a name, because
    the registry reads the file without importing it.

    Attributes:
        name: the name that recipes use.
        label: the name in tables and charts.
        stages: the stages at which it acts: "alignment", "user", "post_hoc".
        paper: the source of the method.
        needs: its inputs in addition to `train_dataset`. For a trainer (or its `mix`): "alignment_dataset",
            "harmful_dataset", and "base" and "aligned" together (folders, as for a post-hoc method). For a
            post-hoc method: "base" and "aligned" (the model before and after alignment), "train_dataset",
            "alignment_dataset", "harmful_dataset" (rows) and "tokenizer". A run also trains adapters for a
            method, with plain SFT and the settings of the user stage: "harmful_adapter" (on the harmful rows)
            is frozen below the trainer's own adapter and taken away afterwards; "refusal_adapter" (on the
            alignment rows, above a harmful one that is taken away) is for a post-hoc method.
        optional: inputs that a post-hoc method also gets if the run has them.
        config: its `TrainingArguments` with the method's own fields; a plain dataclass for a post-hoc method.
        trainer: its `transformers.Trainer`. That of a post-hoc method trains the user stage's weights further
            and gets the alignment rows as `train_dataset`.
        adapter: what the user stage trains unless the recipe says otherwise: "new" (double LoRA: a fresh
            adapter on top of the alignment one) or "continue" (single LoRA: the alignment adapter itself).
        mix: for methods that change rows only, `mix(user_rows, alignment_rows, *, seed, folder,
            **parameters)` returns the rows to train on; `folder` is for files that must stay beside the
            adapter. A row's "prefix" is put before its question. The trainer then gets no alignment rows.
        prefix: for methods that serve the model with a text before every question,
            `prefix(folder, **parameters)` returns that text.
        secret: whether that text is secret; a run then hides it in answers that repeat it.
        serving: one sentence for the model card on how the model must be served.
        apply: for post-hoc methods, `apply(tuned, **parameters)` writes a changed copy of `tuned.source` at
            `tuned.out` and returns facts for `step.json`. See `Tuned`. A method of the alignment stage with
            `apply` and without a trainer changes what plain SFT aligned, before the user stage.
        check: for methods that change weights or need "base", `check(planned, **parameters)` raises before
            training starts if that is not possible. See `Planned`.
        folders: parameters that name a folder of weights; a recipe's step is identified by its content.
        repairs: what the user stage may train for a post-hoc method: "new", "continue", "full".
        one_of: parameters of which a recipe must give exactly one.
        controls: parameters that turn the method into a control; such results are never shown under the
            method's own name.
        baseline: whether it is plain training, with which the other methods are compared.
        series: the values that it logs beside `loss` and `grad_norm`, for the report: {key: (chart, name of
            the line)}.
        facts: the values that its trainer reports (`reported`) or `apply` returns: {key: description}.
        headline: the text of tables for a repair, with the names of facts in braces.
        plan: phrases for `holdfast plan`, each {parameter: text}; the first parameter that is not None gives
            the text, which contains {value} or {percent}, or is a pair (if false, if true).
        strong: parameters that have a clear effect within a few steps, for the contract suite.
        identity: for post-hoc methods, parameters that change nothing.
        protocols: the settings of packaged recipes, by the protocol's name: `recipes/NAME.yaml`.
    """

    name: str
    label: str
    stages: tuple[Stage, ...]
    paper: str
    needs: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    config: type | None = None
    trainer: type | None = None
    adapter: Literal["new", "continue"] = "new"
    mix: Callable[..., Any] | None = None
    prefix: Callable[..., str] | None = None
    secret: bool = False
    serving: str = ""
    apply: Callable[..., Any] | None = None
    check: Callable[..., None] | None = None
    folders: tuple[str, ...] = ()
    repairs: tuple[Trains, ...] = ("new", "continue", "full")
    one_of: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    baseline: bool = False
    series: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    headline: str = ""
    plan: tuple[Mapping[str, Any], ...] = ()
    strong: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, Any] | None = None
    protocols: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Tuned:
    """The inputs of a post-hoc method: those that it declares in `needs` and `optional`.

    Attributes:
        source: the folder that the user stage (or the alignment stage) wrote: an adapter, or a model if it
            trained all weights.
        out: the folder to write, which does not exist yet.
        trains: what that stage trained: "new" (an adapter on top of the alignment's), "continue" (the
            alignment's adapter itself) or "full" (all weights).
        base: the folder of the model before alignment.
        aligned: the folder of the aligned model, or of the alignment's adapter on `base`.
        refusal: the folder of the "refusal_adapter", on the aligned model.
        seed: the seed of the run.
        device: the device to compute on, such as "cpu" or "cuda".
        dtype: the dtype of the run's model, such as "bfloat16".
    """

    source: Path
    out: Path
    trains: Trains = "new"
    base: Path | None = None
    aligned: Path | None = None
    refusal: Path | None = None
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float32"
    load_rows: Mapping[str, Callable[[], list[dict[str, Any]]]] = field(default_factory=dict, repr=False)
    load_tokenizer: Callable[[], Any] | None = field(default=None, repr=False)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """Return the rows of "train_dataset", "alignment_dataset" or "harmful_dataset", read at each call.

        Raises:
            KeyError: the method does not declare these rows.
        """
        return self.load_rows[name]()

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer, loaded at first use."""
        assert self.load_tokenizer is not None, "the method does not declare that it needs the tokenizer"
        return self.load_tokenizer()


@dataclass(frozen=True)
class Planned:
    """The facts about a repair that are known before training.

    Attributes:
        model: the folder of the run's model: the base model, or the aligned one in a run without alignment.
        base: the folder of the model before alignment, if the run has one.
        trains: as in `Tuned`.
        aligns: what the alignment stage trains, "new" (an adapter) or "full"; None if it does not run.
        find_modules: returns the linear modules that a stage, "user" or "alignment", changes.
    """

    model: Path
    base: Path | None
    trains: Trains
    aligns: Trains | None
    find_modules: Callable[[str], set[str] | None] = field(repr=False)

    @cached_property
    def tuned_modules(self) -> set[str] | None:
        """The modules that the user stage's LoRA adapts; None if it trains all weights."""
        return self.find_modules("user")

    @cached_property
    def aligned_modules(self) -> set[str] | None:
        """The modules that the alignment's LoRA adapts; None if the alignment changes all weights."""
        return self.find_modules("alignment")
