"""The covariance of a module's inputs over prompts, and the directions that hold its energy.

For a linear layer with inputs x_1 ... x_N (one for each prompt token), C = sum_i x_i x_i^T. Modules that get
the same tensor (the projections of one attention) share one C. C is accumulated in float64, for as many
modules at a time as fit into `BYTES`; every such group is one pass over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BYTES = 2**31
"""Memory for covariances at a time; one of width 4096 needs 128 MiB."""


def energetic_directions(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    forward: Callable[[Mapping[str, Tensor]], Any],
    tolerance: float,
    seen: Callable[[str, Tensor, Tensor], None] | None = None,
) -> dict[str, Tensor]:
    """Return for each module the eigenvectors of C that hold all but `tolerance` of its energy, [d, m].

    Args:
        modules: by name; the first argument of their forward is the input.
        batches: prompts, `input_ids` and `attention_mask` of shape [K, L]; padding is left out of C.
        forward: runs `model` on a batch.
        tolerance: as for `split`.
        seen: called as `seen(name, C, directions)` for each module; C is not kept after that.
    """
    found: dict[str, Tensor] = {}
    same = _sharing(modules, batches[0], forward)
    for group in _groups(same, BYTES):
        sums = _covariances({name: modules[name] for name in group}, batches, forward)
        for leader, total in sums.items():
            basis = split(total, tolerance)
            for name in (name for name, first in same.items() if first[0] == leader):
                found[name] = basis
                if seen is not None:
                    seen(name, total, basis)
    return {name: found[name] for name in modules}


def split(covariance: Tensor, tolerance: float) -> Tensor:
    """Return the eigenvectors of C [d, d] outside its null space, float32 of shape [d, m].

    The null space is spanned by the eigenvectors with the smallest eigenvalues, as many as together hold at
    most the share `tolerance` of the trace. Eigenvalues that are zero within rounding always belong to it.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    share = values.cumsum(0) / values.sum().clamp(min=torch.finfo(values.dtype).tiny)
    zero = values <= values[-1] * len(values) * torch.finfo(torch.float32).eps ** 2
    null = (share <= tolerance) | zero
    return vectors[:, ~null].float()


def _sharing(
    modules: Mapping[str, nn.Module], batch: Mapping[str, Tensor], forward: Callable[..., Any]
) -> dict[str, tuple[str, int]]:
    """Return for each module the first one with the same input tensor, and the width of the input."""
    same: dict[str, tuple[str, int]] = {}
    last: list[Any] = [None, ""]

    def seen(name: str, x: Tensor) -> None:
        if x is not last[0]:
            last[:] = [x, name]
        same[name] = (last[1], x.shape[-1])

    with _watched(modules, seen), torch.no_grad():
        forward(batch)
    return same


def _groups(same: Mapping[str, tuple[str, int]], limit: int) -> Iterator[list[str]]:
    group: list[str] = []
    used = 0
    for name, (first, width) in same.items():
        if name != first:
            continue
        if group and used + 8 * width**2 > limit:
            yield group
            group, used = [], 0
        group.append(name)
        used += 8 * width**2
    if group:
        yield group


@torch.no_grad()
def _covariances(
    modules: Mapping[str, nn.Module], batches: Sequence[Mapping[str, Tensor]], forward: Callable[..., Any]
) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = {}
    for batch in batches:
        real = batch["attention_mask"].bool()

        def add(name: str, x: Tensor, real: Tensor = real) -> None:
            rows = x[real].double()
            sums[name] = sums[name].addmm_(rows.mT, rows) if name in sums else rows.mT @ rows

        with _watched(modules, add):
            forward(batch)
    return sums


@contextmanager
def _watched(modules: Mapping[str, nn.Module], seen: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `seen(name, input)` at each forward of the modules inside the block."""

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args: seen(name, args[0])

    hooks = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()
