"""The version of what runs in a step: a method, a judge or a task, ours or another package's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from holdfast import registry
from holdfast.machine.code import digest_of_files, digest_of_module
from holdfast.machine.store import versions

TRAINED_BY = ("torch", "transformers", "peft", "accelerate", "tokenizers")
"""Packages whose version can change what a training makes."""

ANSWERED_BY = ("torch", "transformers", "peft", "tokenizers")
"""Packages whose version can change an answer or the verdict of a judge that loads a model."""

REPAIRED_BY = ("numpy", "safetensors", "torch", "peft")
"""Packages whose version can change what a post-hoc method makes."""


def packages(names: tuple[str, ...], quantization: str | None = None) -> dict[str, str]:
    """The versions of some packages, and of the one that quantises where it does."""
    wanted = (*names, "bitsandbytes") if quantization else names
    return {name: known for name, known in versions().items() if name in wanted}


def version(group: str, name: str) -> dict[str, Any]:
    """What names the code behind `name`: its declared version and a digest of its code.

    For ours, the digest covers the file and every file of ours that it imports. For another package's, it
    covers the package, and the distribution with its version stands beside it. For a file of the user's own
    (a name that ends in .py), it covers the file.
    """
    face = registry.face(group, name)
    declared = {"version": face.facts.get("version", 1)}
    if name.endswith(".py"):
        return declared  # it ends in a digest of the file
    if face.module.split(".")[0] == "holdfast":
        return {"name": name, **declared, "code": digest_of_module(face.module)}
    return {"name": name, **declared, "package": face.package, "code": _code_of_package(face.module)}


def _code_of_package(module: str) -> str:
    """A digest of the Python files of the package that holds a module, or of the module's one file."""
    spec = importlib.util.find_spec(module.split(".")[0])
    if spec is None:
        return ""
    if spec.submodule_search_locations:
        folders = [Path(place) for place in spec.submodule_search_locations]
        return digest_of_files(path for folder in folders for path in folder.rglob("*.py"))
    return digest_of_files([Path(spec.origin)] if spec.origin else [])
