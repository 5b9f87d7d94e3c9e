"""What a gate measures: a file of answers, a model, or an adapter on its base model, checked first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from holdfast.errors import ModelError, RecipeError
from holdfast.recipe.model import Weights

SETTINGS = ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules", "peft_version")
"""The settings of an adapter that a gate reports."""


@dataclass(frozen=True)
class Side:
    """One of the models that a gate compares.

    Attributes:
        name: as the user gave it.
        kind: where the answers come from.
        file: the file of answers; None for weights.
        model: the model; None for a file of answers.
        chain: the adapters on it, in order.
        facts: for an adapter, what was read from its folder.
        notes: what a user should check, such as a base model that is not the one that the adapter names.
    """

    name: str
    kind: Literal["answers", "model", "adapter"]
    file: Path | None = None
    model: Weights | None = None
    chain: tuple[Path, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def find_side(
    given: str | Path,
    how: Mapping[str, Any],
    *,
    adapters: Sequence[str | Path] = (),
    base: str | None = None,
    start: Side | None = None,
) -> Side:
    """Find a file of answers, a model or an adapter, and check an adapter's files.

    Args:
        given: a JSONL file, a folder or a Hub id.
        how: keys of `Weights` for the model.
        adapters: adapters on a model.
        base: the base model of an adapter; by default the one that its configuration names.
        start: the model before. An adapter that was trained on top of its adapters is put on them.

    Raises:
        ModelError: nothing is found, or an adapter is damaged or does not fit its base model.
        RecipeError: adapters are given for an adapter or a file.
    """
    name = str(given)
    kind, folder = _kind(name)
    if kind != "model" and adapters:
        raise RecipeError(f"--adapter needs a model, but {name} is {_ARTICLE[kind]}. Give the base model.")
    if kind == "answers":
        return Side(name, kind, file=Path(name))
    if kind == "adapter":
        return _adapter(name, folder, base, how, start)
    from holdfast.weights.adapter_folder import find_adapter

    chain = tuple(find_adapter(str(one))[0] for one in adapters)
    facts = [lint(one, folder) for one in chain]
    shown = " + ".join([name, *map(str, adapters)])
    notes = [text for one in facts for text in another_base(one["base"], name)]
    return Side(
        shown,
        "model",
        model=Weights(path=name, **how),
        chain=chain,
        facts=facts[-1] if facts else {},
        notes=tuple(dict.fromkeys(notes)),
    )


_ARTICLE = {"answers": "a file of answers", "adapter": "an adapter", "model": "a model"}


def _kind(name: str) -> tuple[Literal["answers", "model", "adapter"], Path]:
    """Tell a file of answers, a model and an adapter apart; return the folder (or the file) too."""
    from holdfast.weights.adapter_folder import find_adapter
    from holdfast.weights.folders import find_model, from_hub, holds_adapter, looks_local, model_path

    path = Path(model_path(name))
    if path.is_file():
        return "answers", path
    if not path.exists() and looks_local(name):
        raise ModelError(
            f"No such file or folder: {name}. Expected a file of answers, a model or an adapter."
        )
    if not path.exists() and name == str(path):
        path = from_hub(name, None, download=True)
    if holds_adapter(path) or not (path / "config.json").exists():
        return "adapter", find_adapter(str(path))[0]
    return "model", find_model(str(path))


def _adapter(name: str, folder: Path, base: str | None, how: Mapping[str, Any], start: Side | None) -> Side:
    """Return an adapter on its base model, or on the adapters of `start` that it was trained on top of."""
    from holdfast.weights.chains import RECORD, check_chain
    from holdfast.weights.folders import find_model, model_path

    facts = lint(folder, None)
    on = base or facts["base"]
    if not on:
        raise ModelError(
            f"{name} does not name its base model (base_model_name_or_path). Give it: --base MODEL."
        )
    try:
        model = find_model(str(model_path(on)))
    except ModelError as error:
        if base:
            raise
        raise ModelError(
            f"{name} names the base model {on}, which cannot be used ({error}) Give it: --base MODEL."
        ) from None
    facts = lint(folder, model)
    below = (
        start.chain if start is not None and start.kind == "adapter" and (folder / RECORD).exists() else ()
    )
    chain = (*(one for one in below if one.resolve() != folder.resolve()), folder)
    try:
        check_chain(chain)
    except ModelError as error:
        raise ModelError(f"{error} For a gate, give the adapter below as --against.") from None
    return Side(
        name,
        "adapter",
        model=Weights(path=str(on), **how),
        chain=chain,
        facts={**facts, "base": on},
        notes=tuple(another_base(facts["base"], str(on))),
    )


def another_base(named: Any, used: str) -> list[str]:
    """Return a note if an adapter names another base model than the one that it is put on.

    The same model may have another path on this machine, so that only the last part of the names counts.
    """
    from holdfast.weights.folders import model_path

    names = [str(one).replace("\\", "/").rstrip("/") for one in (named, used) if one]
    if len(names) < 2 or len({name.rpartition("/")[2].lower() for name in names}) == 1:
        return []
    if len({Path(model_path(name)).resolve() for name in names}) == 1:
        return []
    return [
        f"Check the base model: the adapter's configuration names {named}, but it was measured on {used}. If "
        "these are different models, the scores say nothing about the adapter on its own model."
    ]


def lint(folder: Path, base: Path | None) -> dict[str, Any]:
    """Check an adapter's files and return what it was trained with.

    The format, the names and the numbers (finite) are checked, and the shapes if `base` is given.

    Raises:
        ModelError: the adapter is damaged or does not fit the base model.
    """
    from holdfast.weights.adapter import FOREIGN, read_adapter
    from holdfast.weights.adapter_folder import open_adapter

    with open_adapter(folder) as opened:
        config = dict(opened.config)
        shapes = [tensor.shape for tensor in opened.file.tensors.values()]
    facts = {key: config[key] for key in SETTINGS if config.get(key) not in (None, False)}
    facts |= {"base": config.get("base_model_name_or_path"), "tensors": len(shapes), "finite": True}
    if isinstance(facts.get("target_modules"), list):
        facts["target_modules"] = sorted(facts["target_modules"])
    # PEFT loads more kinds of LoRA than this reads; their shapes are compared when they are loaded.
    foreign = any(config.get(key) for key in (*FOREIGN, "ensure_weight_tying"))
    if foreign or config.get("bias", "none") != "none" or any(len(shape) > 2 for shape in shapes):
        return facts
    with read_adapter(folder) as adapter:
        facts["modules"] = len(adapter.modules)
        if base is not None:
            _check_shapes(adapter.modules, base)
    return facts


def _check_shapes(modules: Sequence[Any], base: Path) -> None:
    from holdfast.weights.matching import find_weight
    from holdfast.weights.reader import open_weights

    with open_weights(base) as weights:
        for module in modules:
            try:
                weight = find_weight(weights, module.name)
            except ModelError:
                continue  # fused or renamed at loading, where its names and shapes are compared
            if len(weight.shape) == 2 and sorted(weight.shape) != sorted(module.shape):
                raise ModelError(
                    f"'{module.name}' adapts a weight of shape {list(module.shape)}, but '{weight.name}' in "
                    f"{base} has {list(weight.shape)}. The adapter is for another model: give its base model "
                    "as --base."
                )
