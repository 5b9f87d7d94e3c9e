"""Parameters that are split over several processes: FSDP2 (DTensor) and DeepSpeed ZeRO-3 (`ds_id`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from holdfast.training.private import WRAPPERS


def finite(parameters: Iterable[Tensor]) -> bool:
    """Whether this process's part of all `parameters` contains neither NaN nor infinity."""
    return all(bool(torch.isfinite(_local(p.detach())).all()) for p in parameters)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else getattr(tensor, "ds_tensor", tensor)


def trainable_numel(model: nn.Module) -> int:
    """Return how many numbers an optimizer step may change, over all processes."""
    return sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)


def gather_trainable(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return the whole trainable parameters by name: on the CPU if `keep`, otherwise nothing.

    Every process calls this. The parameters are gathered one at a time in the memory of each process.
    """
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with _whole(parameter) as tensor:
                if keep:
                    for wrapper in WRAPPERS:
                        name = name.replace(wrapper, "")
                    found[name] = tensor.detach().cpu().clone()
    return found


@contextlib.contextmanager
def _whole(parameter: Any) -> Any:
    if hasattr(parameter, "full_tensor"):
        yield parameter.full_tensor()
    elif hasattr(parameter, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter


def drop_gathered(model: nn.Module) -> None:
    """Shard the weights again: FSDP2 keeps its outermost module whole after a forward without backward."""
    for module in model.modules():
        drop = getattr(module, "reshard", None)
        if callable(drop):
            drop()


def complete_state(optimizer: Any) -> None:
    """Set the state of parameters that have had no gradient yet to zeros, the initial values of Adam.

    Torch fails to load a sharded optimizer if the checkpoint lacks the state of a parameter.
    """
    some = next(iter(optimizer.state), None)
    if some is None:
        return
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        if parameter not in optimizer.state:
            optimizer.state[parameter] = {
                name: torch.zeros_like(parameter.detach() if value.shape == some.shape else value)
                for name, value in optimizer.state[some].items()
            }
