"""Digests of code that ignore comments, docstrings, imports and layout."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import holdfast

PACKAGE = Path(holdfast.__file__).parent


def code_of(script: str) -> bytes:
    """Return a Python file's code without comments, docstrings, imports and `__all__`."""
    tree = ast.parse(script)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [part for part in body if not _is_prose(part)] or [ast.Pass()]  # type: ignore[attr-defined]
    return ast.unparse(tree).encode()


def _is_prose(node: ast.stmt) -> bool:
    names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Import | ast.ImportFrom) or names == ["__all__"]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return twelve hex digits of the code of some files; a file that is not Python 3 is hashed as bytes."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        text = path.read_bytes()
        try:
            digest.update(code_of(text.decode("utf-8")))
        except (SyntaxError, ValueError):
            digest.update(text)
    return digest.hexdigest()[:12]


@cache
def digest_of_module(module: str) -> str:
    """Return twelve hex digits of the code of one of our modules and of all of ours that it imports."""
    seen: set[Path] = set()
    waiting = [_path(module)]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in seen:
            seen.add(path)
            waiting += [_path(name) for name in _imported(path)]
    return digest_of_files(seen)


def _path(module: str) -> Path | None:
    """Return the file of one of our modules; None for any other name."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if module.startswith("holdfast.") and path.is_file():
            return path
    return None


def _imported(path: Path) -> Iterator[str]:
    """Yield the names of the modules of ours that a file may import."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "holdfast":
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
