"""Our methods on the trainer of another library: a method's mixin and the library's trainer as one class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from holdfast.errors import RecipeError
from holdfast.registry import faces, get_defense, unknown

OWN = {"__module__", "__doc__", "__parameters__", "__firstlineno__", "__static_attributes__"}
"""What a class that only combines others has in its namespace."""


@dataclass(frozen=True)
class Method:
    """A method with a trainer of its own.

    Attributes:
        name: its name in recipes.
        stem: the first part of the names of its classes, such as "Lisa".
        mixins: the base classes of its trainer without the trainer that they extend.
        config: its `TrainingArguments`.
        needs: "alignment_dataset" or "harmful_dataset", if its trainer takes one.
        models: "base" and "aligned", if its trainer takes them.
    """

    name: str
    stem: str
    mixins: tuple[type, ...]
    config: type
    needs: tuple[str, ...]
    models: tuple[str, ...] = ()


def methods() -> dict[str, Method]:
    """Return the methods that can be combined with another trainer, by name."""
    found = (_method(name) for name, face in faces("defenses").items() if "trainer" in face.code)
    return {method.name: method for method in found if method is not None}


def method(name: str) -> Method:
    """Return the method called `name`.

    Raises:
        RecipeError: there is no such method, or it has no trainer of its own.
    """
    if name not in faces("defenses"):
        known = methods()
        raise RecipeError(f"defense: {unknown('defenses', name, known)}")
    found = _method(name)
    if found is not None:
        return found
    face = faces("defenses")[name]
    if "apply" in face.code:
        how = "It changes weights after training: see holdfast run, and holdfast safe-lora for Safe LoRA"
    elif "mix" in face.code or "prefix" in face.code:
        how = "It changes the rows or the prompt: prepare them with holdfast run, or in your own data"
    else:
        how = "It is plain training, which this tool does itself"
    raise RecipeError(
        f"defense: '{name}' has no trainer to combine with another one. {how}. Methods with a trainer: "
        f"{', '.join(sorted(methods()))}."
    )


def _method(name: str) -> Method | None:
    """Return a method, or None if its trainer is plain training or no combination of mixins."""
    from transformers import Trainer

    defense = get_defense(name)
    trainer, config = defense.trainer, defense.config
    if trainer is None or config is None or set(vars(trainer)) - OWN:
        return None
    mixins = tuple(base for base in trainer.__bases__ if not issubclass(base, Trainer))
    if not mixins or defense.mix is not None or defense.prefix is not None:
        return None
    needs = tuple(need for need in defense.needs if need.endswith("_dataset") and need != "train_dataset")
    models = tuple(need for need in defense.needs if not need.endswith("_dataset"))
    return Method(name, trainer.__name__.removesuffix("Trainer"), mixins, config, needs, models)


def combined(name: str, bases: tuple[type, ...], module: str, text: str) -> type:
    """Return a class that only combines others."""
    return type(name, bases, {"__module__": module, "__doc__": text, "__qualname__": name})


def rows_of(method: Method, alignment: Any, harmful: Any, *, where: str = "") -> dict[str, Any]:
    """Return the rows that a method's trainer takes, as its keyword arguments.

    Args:
        where: put before the names of the options in messages, such as "--".

    Raises:
        RecipeError: rows are missing, the method does not use them, or it also needs models.
    """
    if method.models:
        raise RecipeError(
            f"{method.name} needs {' and '.join(method.models)}, which this tool cannot pass on. Use "
            "holdfast run, or the trainer in your own script."
        )
    given = {"alignment_dataset": alignment, "harmful_dataset": harmful}
    for kind, rows in given.items():
        if kind in method.needs and rows is None:
            what = "alignment rows" if kind == "alignment_dataset" else "harmful questions"
            raise RecipeError(f"{method.name} needs {where}{kind}: {what}.")
        if kind not in method.needs and rows is not None:
            raise RecipeError(f"{method.name} does not use {where}{kind}. Leave it out.")
    return {kind: rows for kind, rows in given.items() if rows is not None}
