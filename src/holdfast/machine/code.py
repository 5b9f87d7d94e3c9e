"""Digests of code that ignore comments, docstrings, imports and empty lines."""

from __future__ import annotations

import ast
import hashlib
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import holdfast

PACKAGE = Path(holdfast.__file__).parent


def code_of(script: str) -> bytes:
    """Return the text of a Python file without comments, docstrings, imports, `__all__` and empty lines.

    These parts are cut out of the text itself, so every version of Python gives the same bytes.
    """
    texts = script.split("\n")
    lines = [text.encode() for text in texts]
    spans = [
        (node.lineno, node.col_offset, node.end_lineno or node.lineno, node.end_col_offset or 0)
        for node in ast.walk(ast.parse(script))
        if isinstance(node, ast.stmt) and _is_prose(node)
    ]
    for token in tokenize.generate_tokens(io.StringIO(script).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            start = len(texts[row - 1][:column].encode())
            spans.append((row, start, row, start + len(token.string.encode())))
    for first, start, last, end in sorted(spans, reverse=True):
        rest = lines[last - 1][end:]
        lines[first - 1 : last] = [lines[first - 1][:start] + rest, *[b""] * (last - first)]
    return b"\n".join(line.rstrip() for line in lines if line.strip())


def _is_prose(node: ast.stmt) -> bool:
    names = [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
    text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return text or isinstance(node, ast.Import | ast.ImportFrom) or names == ["__all__"]


def digest_of_files(paths: Iterable[Path]) -> str:
    """Return twelve hex digits of the code of some files; a file that is not Python 3 is hashed as bytes."""
    return _digest(_code_or_bytes(path) for path in sorted(paths))


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:12]


def _code_or_bytes(path: Path) -> bytes:
    text = path.read_bytes()
    try:
        return code_of(text.decode("utf-8"))
    except (SyntaxError, ValueError, tokenize.TokenError):
        return text


@cache
def _ours(path: Path) -> tuple[bytes, tuple[str, ...]]:
    """Return the code of one of our files, and the modules of ours that it may import."""
    return _code_or_bytes(path), tuple(_imported(path))


@cache
def digest_of_module(module: str) -> str:
    """Return twelve hex digits of the code of one of our modules and of all of ours that it imports."""
    seen: set[Path] = set()
    waiting = [_path(module)]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in seen:
            seen.add(path)
            waiting += [_path(name) for name in _ours(path)[1]]
    return _digest(_ours(path)[0] for path in sorted(seen))


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
