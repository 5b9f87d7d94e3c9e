"""Defenses: one file each, found by the registry.

Nothing here imports torch, so that `Defense` can be named cheaply; the files beside this one do.
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
    """What a file in `defenses/` (or an entry point `holdfast.defenses`) says of its method.

    Nothing else in Holdfast knows a method by name: recipes, the pipeline, the report, the contract suite and
    the tables of the documentation read what stands here. Every argument is a literal or a name, because the
    registry reads the file without importing it.

    Attributes:
        name: the name that recipes use.
        label: how tables and charts write it.
        stages: where it acts, of "alignment", "user", "post_hoc".
        paper: where it comes from.
        needs: what it needs beyond `train_dataset`. A trainer (or its `mix`): "alignment_dataset",
            "harmful_dataset". A post-hoc method: "base" and "aligned" (the model before alignment, and after
            it), "train_dataset", "alignment_dataset", "harmful_dataset" (rows) and "tokenizer".
        optional: what a post-hoc method gets too if the run has it.
        config: its `TrainingArguments` with the method's own fields; a plain dataclass for a post-hoc method.
        trainer: its `transformers.Trainer`.
        adapter: what the user stage trains unless the recipe says otherwise: "new" (double LoRA: a fresh
            adapter on top of the alignment one) or "continue" (single LoRA: the alignment adapter itself).
        mix: for methods that change rows only, `mix(user_rows, alignment_rows, *, seed, folder,
            **parameters)` returns the rows to train on; `folder` keeps what must stay beside the adapter.
            A row's "prefix" is a text to stand before its question. The trainer then gets no alignment rows.
        prefix: for methods that serve the model with a text before every question,
            `prefix(folder, **parameters)` returns that text.
        secret: whether that text is secret; a run hides it where the model repeats it.
        serving: one sentence for the model card on how the model must be served.
        apply: for post-hoc methods, `apply(tuned, **parameters)` writes a changed copy of `tuned.source` at
            `tuned.out` and returns facts for `step.json`. See `Tuned`.
        check: for post-hoc methods, `check(planned, **parameters)` raises before training starts if the
            repair is not possible. See `Planned`.
        repairs: what the user stage may train for a post-hoc method: "new", "continue", "full".
        one_of: parameters of which a recipe must give exactly one.
        controls: parameters that, if a recipe gives them, make a control of the method: results never stand
            under the method's own name then.
        baseline: whether it is plain training, with which the others are compared.
        series: what it logs beside `loss` and `grad_norm`, for the report: {key: (chart, name of the line)}.
        facts: what its trainer reports (`reported`) or `apply` returns: {key: what it is}.
        headline: what tables say of a repair, with the names of facts in braces.
        plan: phrases for `holdfast plan`, each {parameter: text}: the first parameter that is not None gives
            it. The text holds {value} or {percent}, or is a pair (if false, if true).
        strong: parameters with which the method is noticed within a few steps, for the contract suite.
        identity: for post-hoc methods, parameters with which nothing changes.
        protocols: the settings at which packaged recipes run it, by the protocol's name: `recipes/NAME.yaml`.
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
    """What a post-hoc method can use. It holds what the method declares in `needs` and `optional`.

    Attributes:
        source: the folder that the user stage made: an adapter, or a model if it trained all weights.
        out: the folder to write, which does not exist yet.
        trains: what the user stage trained: "new" (an adapter on top of the alignment's), "continue" (the
            alignment's adapter went on) or "full" (all weights).
        base: the folder of the model before alignment.
        aligned: the aligned model's folder, or that of the alignment's adapter on `base`.
        seed: of the run.
        device: to compute on, such as "cpu" or "cuda".
        dtype: of the run's model, such as "bfloat16".
    """

    source: Path
    out: Path
    trains: Trains = "new"
    base: Path | None = None
    aligned: Path | None = None
    seed: int = 42
    device: str = "cpu"
    dtype: str = "float32"
    load_rows: Mapping[str, Callable[[], list[dict[str, Any]]]] = field(default_factory=dict, repr=False)
    load_tokenizer: Callable[[], Any] | None = field(default=None, repr=False)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """The rows of "train_dataset", "alignment_dataset" or "harmful_dataset", read at each call.

        Raises:
            KeyError: the method does not declare that it needs them.
        """
        return self.load_rows[name]()

    @cached_property
    def tokenizer(self) -> Any:
        """The run's tokenizer, loaded at first use."""
        assert self.load_tokenizer is not None, "the method does not declare that it needs the tokenizer"
        return self.load_tokenizer()


@dataclass(frozen=True)
class Planned:
    """What is known of a repair before anything is trained.

    Attributes:
        model: the folder of the run's model: the base model, or the aligned one of a run without alignment.
        base: the folder of the model before alignment, if the run has one.
        trains: as in `Tuned`.
        aligns: what the alignment stage trains, "new" (an adapter) or "full"; None if it does not run.
        find_modules: the linear modules that the user stage and the alignment change, by stage.
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
