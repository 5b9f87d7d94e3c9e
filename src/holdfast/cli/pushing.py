"""The options `--push` and `--public`: upload a result to the Hugging Face Hub, only if asked."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from holdfast.errors import RecipeError

if TYPE_CHECKING:
    from holdfast.recipe import Recipe

Push = Annotated[
    str | None,
    typer.Option(metavar="REPO", help="Upload the result to this repository on the Hub, private by default."),
]
Public = Annotated[bool, typer.Option("--public", help="With --push: make the repository public.")]


def check(repo: str | None, public: bool) -> None:
    """Check before any work that an upload is possible.

    Raises:
        RecipeError: --public without --push.
        OutputError: an upload is not possible.
    """
    if repo is None:
        if public:
            raise RecipeError("--public needs --push REPO.")
        return
    from holdfast.weights import pushing

    pushing.check(repo, public=public)


def check_run(recipe: Recipe, repo: str | None, public: bool) -> None:
    """Check before a run that its result can be uploaded."""
    from holdfast.pipeline import delivering

    if repo is not None:
        delivering.check(recipe)
    check(repo, public)


def push(folder: Path, repo: str | None, public: bool) -> None:
    """Upload a folder, and print the address."""
    if repo is None:
        return
    from holdfast.cli import console
    from holdfast.weights import pushing

    address = pushing.push(folder, repo, public=public)
    text = f"Uploaded: {address} ({'public' if public else 'private'})"
    console.out.print(text, highlight=False, soft_wrap=True, markup=False)


def push_run(run: Path, repo: str | None, public: bool) -> None:
    """Upload the adapter of a run with its card and results."""
    if repo is None:
        return
    from holdfast.pipeline import delivering

    with tempfile.TemporaryDirectory() as folder:
        push(delivering.deliver(run, Path(folder) / "adapter"), repo, public)
