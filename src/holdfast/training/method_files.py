"""A method's tensors in a checkpoint: one safetensors file of whole tensors, also if they are sharded.

Reading it runs no code, unlike `torch.distributed.checkpoint`, whose `.metadata` file is a pickle.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from holdfast.errors import ModelError, first_line


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, main: bool) -> None:
    """Write whole tensors into `path`. All processes call this, and the `main` one writes."""
    whole = {}
    for name, tensor in tensors.items():
        full = _full(tensor.detach())
        if main:
            # A copy of each: safetensors refuses tensors that share memory.
            whole[name] = full.to("cpu", copy=True).contiguous()
    if main:
        save_file(whole, path)


def read_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Fill `tensors` in place; a sharded one takes its own part. All processes call this.

    Raises:
        ModelError: the file is missing or damaged, or contains other tensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name) for name in file.keys() if name in tensors}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"The method's state in the checkpoint cannot be read: {path} ({first_line(error)}). "
            "Resume from another checkpoint."
        ) from None
    for name, tensor in tensors.items():
        saved = found.get(name)
        if saved is None or saved.shape != tensor.shape or saved.dtype != tensor.dtype:
            has = "nothing" if saved is None else f"{saved.dtype} of shape {list(saved.shape)}"
            raise ModelError(
                f"{path} has {has} for {name}, expected {tensor.dtype} of shape {list(tensor.shape)}. "
                "Resume from another checkpoint."
            )
    with torch.no_grad():
        for name, tensor in tensors.items():
            _fill(tensor, found.pop(name))


def _full(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _fill(tensor: Any, whole: Tensor) -> None:
    if not hasattr(tensor, "full_tensor"):
        tensor.copy_(whole)
        return
    from torch.distributed.tensor import distribute_tensor

    # Every process has the whole tensor, so nothing is sent.
    whole = whole.to(tensor.device)
    shard: Any = distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
    tensor.to_local().copy_(shard.to_local())
