"""V in blocks from disk against V as one matrix: products, norm and Gram matrix, in every layout and dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from holdfast.defenses.safe_lora_parts.projection import Difference, Workspace
from holdfast.weights.reader import WeightFile

ROWS, COLUMNS = 20, 12
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp32": (torch.float32, torch.float32),
    "mixed": (torch.bfloat16, torch.float16),
}


@pytest.fixture(params=DTYPES)
def tensors(request, tmp_path):
    """Two weights as they are stored, and their difference."""
    torch.manual_seed(4)
    values = [torch.randn(ROWS, COLUMNS).to(dtype) for dtype in DTYPES[request.param]]
    for name, value in zip(("aligned", "base"), values, strict=True):
        save_file({"w": value}, tmp_path / f"{name}.safetensors")
    stored = [WeightFile(tmp_path / f"{name}.safetensors").tensors["w"] for name in ("aligned", "base")]
    return stored, (values[0].double() - values[1].double()).numpy()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("block", [1, 3 * COLUMNS, 2**19], ids=["a row", "three rows", "all"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_blocks_give_what_the_whole_gives(tensors, transposed, block, dtype):
    """Twenty rows are no multiple of three, so that the last block is a short one.

    V^T x may have its rows in another order, in which `times` takes them; so may V^T V.
    """
    (aligned, base), stored = tensors
    v = stored.T if transposed else stored
    made = Difference(aligned, base, transposed, Workspace(dtype, block))
    assert made.shape == v.shape
    x = np.random.default_rng(0).standard_normal((v.shape[0], 3)).astype(dtype)
    product, square = made.transpose_times(x)
    rows, expected = (sorted(map(tuple, np.round(m.astype(float), 3))) for m in (product, v.T @ x))
    np.testing.assert_allclose(rows, expected, atol=2e-3)
    assert square == pytest.approx(np.sum(v**2), rel=1e-6)
    np.testing.assert_allclose(made.times(product), v @ (v.T @ x), rtol=1e-5, atol=1e-4)
    small = v @ v.T if v.shape[0] <= v.shape[1] else v.T @ v
    np.testing.assert_allclose(
        np.linalg.eigvalsh(made.gram()), np.linalg.eigvalsh(small), rtol=1e-6, atol=1e-5
    )
