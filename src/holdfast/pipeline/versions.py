"""The version of the code that a step runs: a method, a judge or a task, ours or another package's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.machine.code import digest_of_files, digest_of_module
from holdfast.machine.store import versions

TRAINED_BY = ("torch", "transformers", "peft", "accelerate", "tokenizers")
"""Packages whose version can change the result of a training."""

ANSWERED_BY = ("torch", "transformers", "peft", "tokenizers")
"""Packages whose version can change an answer, or a verdict of a judge that loads a model."""

ABILITY_BY = (*ANSWERED_BY, "lm_eval")
"""Packages whose version can change a result of lm-evaluation-harness."""

REPAIRED_BY = ("numpy", "safetensors", "torch", "peft")
"""Packages whose version can change the result of a post-hoc method."""


def packages(names: tuple[str, ...], quantization: str | None = None) -> dict[str, str]:
    """Return the versions of some packages, and that of bitsandbytes if the model is quantised."""
    wanted = (*names, "bitsandbytes") if quantization else names
    return {name: known for name, known in versions().items() if name in wanted}


def version(group: str, name: str) -> dict[str, Any]:
    """Return the values that identify the code behind `name`: its declared version and a digest of its code.

    For our own code, the digest covers the file and every file of ours that it imports. For another package,
    it covers the whole package, and the name and version of the distribution are added. For a user's file (a
    name that ends in .py), it covers the file and is part of the version.
    """
    face = registry.face(group, name)
    declared = {"version": face.facts.get("version", 1)}
    if name.endswith(".py"):
        return declared  # the version ends in a digest of the file
    if face.module.split(".")[0] == "holdfast":
        return {"name": name, **declared, "code": digest_of_module(face.module)}
    return {"name": name, **declared, "package": face.package, "code": _code_of_package(face.module)}


def _code_of_package(module: str) -> str:
    """Return a digest of the Python files of a module's package, or of the module's only file."""
    spec = importlib.util.find_spec(module.split(".")[0])
    if spec is None:
        return ""
    if spec.submodule_search_locations:
        folders = [Path(place) for place in spec.submodule_search_locations]
        return digest_of_files(path for folder in folders for path in folder.rglob("*.py"))
    return digest_of_files([Path(spec.origin)] if spec.origin else [])
