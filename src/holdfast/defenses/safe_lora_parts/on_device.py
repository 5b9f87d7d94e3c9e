"""V of a module on a torch device, for the products with V; everything else stays in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from holdfast.defenses.safe_lora_parts.projection import Direction, Matrix, Workspace
from holdfast.defenses.safe_lora_parts.updates import Pair, WeightPair
from holdfast.errors import RecipeError, first_line
from holdfast.weights.reader import Tensor


def on_device(pair: Pair, workspace: Workspace, device: str) -> Direction:
    """Return V on `device`; an alignment adapter's V stays on the CPU, where its products are cheap.

    Raises:
        RecipeError: torch has no such device.
    """
    return OnDevice(pair, workspace, device) if isinstance(pair, WeightPair) else pair.direction(workspace)


class OnDevice:
    """`Difference` with the whole of V in the memory of a device."""

    def __init__(self, pair: WeightPair, workspace: Workspace, device: str):
        import torch

        self.dtype = getattr(torch, str(workspace.dtype))
        try:
            place = torch.device(device)
            self.v = self._load(pair.aligned, workspace, place)
            self.v -= self._load(pair.base, workspace, place)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"Cannot use the device '{device}': {first_line(error)}") from None
        if pair.transposed:
            self.v = self.v.T
        self.shape = (self.v.shape[0], self.v.shape[1])

    def transpose_times(self, x: Matrix) -> tuple[Matrix, float]:
        """V^T x, and ||V||_F squared."""
        return self._numpy(self.v.T @ self._tensor(x)), float(self.v.double().square().sum())

    def times(self, y: Matrix) -> Matrix:
        """V y."""
        return self._numpy(self.v @ self._tensor(y))

    def gram(self) -> NDArray[np.float64]:
        """V V^T or V^T V, whichever is smaller (V V^T for a square V)."""
        wide = self.v.double()
        return self._numpy(wide @ wide.T if self.shape[0] <= self.shape[1] else wide.T @ wide)

    def _load(self, tensor: Tensor, workspace: Workspace, device: Any) -> Any:
        import torch

        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
        raw = torch.from_numpy(tensor.raw(out=workspace.bytes("whole", tensor.nbytes)))
        return raw.view(kinds[tensor.dtype]).to(device).to(self.dtype, copy=True).reshape(tensor.shape)

    def _tensor(self, x: Matrix) -> Any:
        import torch

        return torch.from_numpy(np.ascontiguousarray(x)).to(self.v.device)

    def _numpy(self, x: Any) -> Any:
        return x.cpu().numpy()
