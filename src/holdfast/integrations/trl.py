"""TRL: every method's trainer on `trl.SFTTrainer`, made from the registry, and TRL's own script with it.

`from holdfast.integrations.trl import LisaSFTConfig, LisaSFTTrainer` works for every method with a trainer;
`dir()` of this module lists the names. The configs have TRL's defaults.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from holdfast.errors import DataError, InputError, RecipeError, first_line
from holdfast.integrations.composing import Method, combined, method, methods, rows_of


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    for found in methods().values():
        if name.replace("SFTScriptConfig", "SFTConfig") in names(found):
            classes(found), script_options(found)  # they are in `globals()` now
            return globals()[name]
    known = ", ".join(sorted(names(found)[1] for found in methods().values()))
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'. Trainers: {known}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(name for found in methods().values() for name in names(found))})


def names(found: Method) -> tuple[str, str]:
    """Return the names of a method's config and trainer here: LisaSFTConfig, LisaSFTTrainer."""
    stem = found.stem.removesuffix("SFT")
    return f"{stem}SFTConfig", f"{stem}SFTTrainer"


def classes(found: Method) -> tuple[type, type]:
    """Return a method's config and trainer on TRL's, which are made once.

    Raises:
        RecipeError: TRL is not installed.
    """
    trl, (config, trainer) = _trl(), names(found)
    if trainer not in globals():
        text = f"{found.stem} on `trl.SFTTrainer`; see holdfast.defenses.{found.name}."
        made = combined(config, (trl.SFTConfig, found.config), __name__, f"TRL's options and {found.stem}'s.")
        globals()[config] = dataclass(made)
        globals()[trainer] = combined(trainer, (*found.mixins, trl.SFTTrainer), __name__, text)
    return globals()[config], globals()[trainer]


def script_options(found: Method) -> type:
    """Return the config for TRL's script: that of the method with the options of `run_script`."""
    config, _ = classes(found)
    name = config.__name__.replace("SFTConfig", "SFTScriptConfig")
    if name not in globals():
        members: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"{config.__name__} with the method and the places of its rows.",
            "__annotations__": {
                "defense": str,
                "alignment_dataset": str | None,
                "harmful_dataset": str | None,
            },
            "defense": field(default=found.name, metadata={"help": "The method, such as lisa."}),
            "alignment_dataset": _rows("Alignment rows: harmful questions with refusals."),
            "harmful_dataset": _rows("Harmful questions."),
        }
        globals()[name] = dataclass(type(name, (config,), members))
    return globals()[name]


def run_script(arguments: Sequence[str]) -> None:
    """Run TRL's SFT script with the trainer of a method.

    Args:
        arguments: TRL's own options, those of the method, `--defense`, `--alignment_dataset` and
            `--harmful_dataset`. All of them may stand in the YAML file of `--config`.

    Raises:
        RecipeError: an option of ours is missing or not valid, or TRL is not installed.
    """
    trl = _trl()
    from trl.scripts import sft

    found = method(_defense(arguments))
    _, trainer = classes(found)
    with _replaced((trl, sft), SFTConfig=script_options(found)):
        parser = sft.make_parser(prog="holdfast trl")
        try:
            script, training, model, data = parser.parse_args_and_config(list(arguments))
        except ValueError as error:
            raise RecipeError(f"holdfast trl: {first_line(error)}") from None
    places = {kind: getattr(training, kind) for kind in ("alignment_dataset", "harmful_dataset")}
    given = rows_of(found, *places.values(), where="--")
    rows = {kind: _load(f"--{kind}", place) for kind, place in given.items()}
    with _replaced((trl, sft), SFTTrainer=partial(trainer, **rows)):
        try:
            sft.main(script, training, model, data)
        except ValueError as error:
            if "`dataset_name` must be provided" in str(error):
                raise RecipeError("Give --dataset_name, the user's rows.") from None
            raise


def _trl() -> Any:
    try:
        import trl
    except ImportError:
        raise RecipeError("TRL is not installed. Install it: pip install 'holdfast[trl]'.") from None
    return trl


def _rows(text: str) -> Any:
    return field(
        default=None, metadata={"help": f"{text} A .jsonl, .json, .csv or .parquet file, or a data set."}
    )


def _defense(arguments: Sequence[str]) -> str:
    """Return the name of the method from the options or the YAML file."""
    import yaml

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--defense")
    first.add_argument("--config")
    given, _ = first.parse_known_args(list(arguments))
    name = given.defense
    if name is None and given.config is not None and Path(given.config).is_file():
        try:
            settings = yaml.safe_load(Path(given.config).read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise RecipeError(f"{given.config} is not valid YAML: {first_line(error)}.") from None
        name = settings.get("defense") if isinstance(settings, Mapping) else None
    if not isinstance(name, str):
        raise RecipeError(
            f"Give --defense, the method. Methods with a trainer: {', '.join(sorted(methods()))}. "
            "All other options are those of TRL's script: trl sft --help."
        )
    return name


def _load(option: str, place: str) -> Any:
    """Return rows as a `datasets.Dataset`: from a file, or from a data set's train split."""
    from datasets import load_dataset

    path = Path(place)
    kinds = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    try:
        if path.is_file() and path.suffix in kinds:
            return load_dataset(kinds[path.suffix], data_files=str(path), split="train")
        return load_dataset(place, split="train")
    except InputError:
        raise
    except Exception as error:  # `datasets` raises many kinds
        raise DataError(f"{option}: {place} cannot be read: {first_line(error)}") from None


@contextmanager
def _replaced(modules: Sequence[ModuleType], **values: Any) -> Iterator[None]:
    """Replace names of modules for a while; TRL's script imports them from `trl` when it runs."""
    kept = [
        (module, name, getattr(module, name))
        for module in modules
        for name in values
        if hasattr(module, name)
    ]
    for module, name, _ in kept:
        setattr(module, name, values[name])
    try:
        yield
    finally:
        for module, name, value in kept:
            setattr(module, name, value)
