"""`holdfast combine | merge`: turn a chain of adapters into one adapter or one full model."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from holdfast.cli import pushing

Adapters = Annotated[
    list[str],
    typer.Argument(metavar="ADAPTER...", help="Adapter folders or Hub ids, in the order of training."),
]
Out = Annotated[Path, typer.Option(help="New folder.")]


class Server(StrEnum):
    """The servers whose rules for LoRA are known."""

    vllm = "vllm"
    sglang = "sglang"
    tgi = "tgi"


class Dtype(StrEnum):
    """The dtypes in which weights can be written."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


def combine(
    adapters: Adapters,
    out: Out,
    orthogonal: Annotated[
        bool, typer.Option(help="Take the output directions of the first adapter out of the others.")
    ] = False,
    share: Annotated[
        float | None, typer.Option(help="With --orthogonal: how much of them, 0 to 1. Default: 1.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="W1,W2,...", help="Factor of each adapter in the sum. Default: 1.")
    ] = None,
    push: pushing.Push = None,
    public: pushing.Public = False,
    server: Annotated[
        Server | None, typer.Option("--for", help="Check that this server can serve the adapter.")
    ] = None,
) -> None:
    """Combine adapters (alignment and user delta) into one plain PEFT adapter with the same answers."""
    from holdfast.cli import console
    from holdfast.errors import RecipeError
    from holdfast.weights.combine import combine as combine_adapters

    pushing.check(push, public)
    if share is not None and not orthogonal:
        raise RecipeError("--share is a part of --orthogonal. Give both, or leave it out.")
    amount = (1.0 if share is None else share) if orthogonal else None
    made = combine_adapters(
        adapters, out, weights=_numbers(weights), orthogonal=amount, server=server and server.value
    )
    console.out.print(
        f"{made.folder}: one adapter of rank {made.rank} on {made.modules} modules"
        + (f", {made.padded} of them filled up with zeros" if made.padded else "")
        + (f"; {made.overlap:.1%} of the others lay in the first one's directions." if made.overlap else "."),
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    if made.serve:
        line = f"To serve it with {server}: {made.serve.replace('FOLDER', str(made.folder))}"
        console.out.print(line, highlight=False, soft_wrap=True, markup=False)
    pushing.push(made.folder, push, public)


def _numbers(text: str | None) -> list[float] | None:
    """Read "0.5,0.5"; None stays None."""
    from holdfast.errors import RecipeError

    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights: expected numbers with commas, as 0.5,0.5; found '{text}'.") from None


def merge(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Base model: a folder or Hub id.")],
    adapters: Adapters,
    out: Out,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights. Default: unchanged.")] = None,
    push: pushing.Push = None,
    public: pushing.Public = False,
) -> None:
    """Write a full model with adapters added to its weights, shard by shard."""
    from holdfast.cli import console
    from holdfast.weights.merge import merge as merge_adapters

    pushing.check(push, public)
    made = merge_adapters(base, adapters, out, dtype=dtype and dtype.value)
    console.out.print(
        f"{made.folder}: {made.changed} of {made.tensors} tensors changed, {made.nbytes / 1e9:.2f} GB.",
        highlight=False, soft_wrap=True, markup=False,
    )  # fmt: skip
    pushing.push(made.folder, push, public)
