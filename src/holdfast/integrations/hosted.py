"""A method on the trainer of a host that makes trainer and training arguments itself (axolotl, ms-swift)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from holdfast import data as datasets
from holdfast.data import prompts as prompting
from holdfast.errors import InputError, RecipeError, first_line, nearest
from holdfast.integrations.composing import Method, combined, method
from holdfast.registry import faces


class Hosted:
    """The first base class of a method's trainer on a host's: it adds what the host does not pass.

    Attributes:
        method: the method.
        parameters: its parameters.
        load_rows: returns the rows that the method needs, as keyword arguments, for the arguments that the
            host passes.
    """

    method: Method
    parameters: Mapping[str, Any]
    load_rows: Callable[[Mapping[str, Any]], dict[str, Any]]

    def __init__(self, **given: Any):
        become_arguments(given["args"], self.method, self.parameters)
        super().__init__(**given, **type(self).load_rows(given))


def hosted(
    found: Method,
    parameters: Mapping[str, Any],
    load_rows: Callable[[Mapping[str, Any]], dict[str, Any]],
    bases: tuple[type, ...],
    host: str,
) -> type:
    """Return the class of a method on the trainer class of a host, the last one in `bases`."""
    text = f"{found.stem} on {bases[-1].__name__}."
    made = combined(f"{found.stem}{host}Trainer", (Hosted, *found.mixins, *bases), __name__, text)
    made.method, made.parameters = found, dict(parameters)  # type: ignore[attr-defined]
    made.load_rows = staticmethod(load_rows)  # type: ignore[attr-defined]
    return made


def become_arguments(args: Any, found: Method, parameters: Mapping[str, Any]) -> None:
    """Turn the training arguments of a host into those of a method as well, in place.

    The class becomes one that extends the method's config and the host's class, so that the method's
    parameters are fields. It is a name of this module, because checkpoints contain the arguments.
    """
    from transformers import TrainingArguments

    checked = check_parameters(found, parameters, output_dir=args.output_dir, use_cpu=args.use_cpu)
    host = type(args)
    name = f"{found.stem}{host.__name__}_{host.__module__.replace('.', '_')}"
    module = sys.modules[__name__]
    if not hasattr(module, name):
        made = combined(name, (found.config, host), __name__, f"{host.__name__} with {found.stem}'s fields.")
        setattr(module, name, dataclass(made))
    plain = {f.name for f in fields(TrainingArguments)} | {f.name for f in fields(host)}
    args.__class__ = getattr(module, name)
    for f in fields(found.config):
        if f.name not in plain:
            setattr(args, f.name, getattr(checked, f.name))


def check_parameters(found: Method, parameters: Mapping[str, Any], **options: Any) -> Any:
    """Return a method's config with these parameters.

    Args:
        options: options of `TrainingArguments`.

    Raises:
        RecipeError: a parameter is unknown or not valid.
    """
    known = faces("defenses")[found.name].parameters
    for name in parameters:
        if name not in known:
            raise RecipeError(f"{found.name} has no parameter '{name}'.{nearest(name, known)}")
    try:
        return found.config(report_to="none", **options, **parameters)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{found.name}: {first_line(error)}.") from None


def named_method(name: str, host: str) -> Method:
    """Return a method by the name that it has in hosts, in which LISA is another method.

    Raises:
        RecipeError: there is no such method, or the name is "lisa".
    """
    if name == "lisa":
        raise RecipeError(
            f"defense: 'lisa' is ambiguous: in {host}, LISA is layerwise importance sampling, which is no "
            "safety method. For lazy safety alignment (bi-state optimization with a proximal term), write "
            "bso_lisa."
        )
    return method("lisa" if name == "bso_lisa" else name)


def own_rows(kind: str, source: str, seed: int) -> list[dict[str, Any]]:
    """Read rows from a source of ours: `instruction`, `input`, `output`, or `messages`.

    Args:
        kind: "alignment_dataset" or "harmful_dataset".
        source: a file, the name of a data set or a Hub id; see docs/data.md.
        seed: the seed of the order.

    Raises:
        DataError: the source cannot be read, or its rows are not as required.
    """
    read = datasets.alignment_rows if kind == "alignment_dataset" else datasets.harmful_rows
    try:
        return list(read(source=source, seed=seed).rows)
    except InputError as error:
        raise type(error)(f"{kind}: {error}") from None


def rendered(rows: list[dict[str, Any]], tokenizer: Any) -> list[dict[str, Any]]:
    """Render rows of `own_rows` with the tokenizer's chat template, else with the Alpaca prompt."""
    template = prompting.resolve_template(tokenizer)
    return [prompting.training_row(row, tokenizer, template) for row in rows]
