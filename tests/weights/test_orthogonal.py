"""The orthogonal merge of adapters against dense arithmetic, and where it belongs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from commands import holdfast_command as command
from commands import refused
from holdfast.errors import ModelError, RecipeError
from holdfast.weights.chains import write_below
from holdfast.weights.combine import combine
from holdfast.weights.orthogonal import column_basis
from pairs import SEVEN, TWO, llama, save_adapter
from repairs import updates


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """The user's adapter on two kinds of modules, and a refusal adapter on seven."""
    folder = tmp_path_factory.mktemp("adapters")
    user = save_adapter(folder / "user", r=3, lora_alpha=5, target_modules=TWO)
    return user, save_adapter(folder / "refusal", std=0.3, r=4, lora_alpha=3, target_modules=SEVEN)


@pytest.mark.parametrize(("share", "weights"), [(1.0, None), (0.3, (0.5, 0.25))])
def test_by_dense_arithmetic(adapters, tmp_path, share, weights):
    """W = w_1 dW_1 + w_2 (I - a Q Q^T) dW_2, with Q from a QR decomposition of B_1."""
    user, refusal = (updates(path, llama) for path in adapters)
    made = combine(adapters, tmp_path / "out", weights=weights, orthogonal=share)
    found = updates(tmp_path / "out", llama)
    assert found.keys() == refusal.keys()
    first, second = weights or (1.0, 1.0)
    overlaps = []
    for name, delta in refusal.items():
        expected = second * delta
        if name in user:
            q = torch.linalg.qr(torch.linalg.svd(user[name])[0][:, :3])[0]
            inside = q @ q.T @ delta
            expected = first * user[name] + second * (delta - share * inside)
            overlaps.append(float(inside.square().sum() / delta.square().sum()))
        assert (found[name] - expected).abs().max() < 1e-6, name
    assert made.overlap == pytest.approx(np.mean(overlaps))
    assert (made.rank, made.modules) == (7, 21)


def test_what_is_orthogonal_already_is_added_unchanged(adapters, tmp_path):
    """The merge of a merge's own refusal part equals the plain sum."""
    user, refusal = adapters
    alone = save_adapter(tmp_path / "alone", std=0.3, r=4, lora_alpha=3, target_modules=SEVEN)
    factors, mine = (
        load_file(alone / "adapter_model.safetensors"),
        load_file(user / "adapter_model.safetensors"),
    )
    for name, b in factors.items():
        if "lora_B" in name and name in mine:
            q = torch.linalg.qr(mine[name].double())[0]
            factors[name] = (b.double() - q @ (q.T @ b.double())).float()
    save_file(factors, alone / "adapter_model.safetensors", {"format": "pt"})
    made = combine([user, alone], tmp_path / "out", orthogonal=1.0)
    combine([user, alone], tmp_path / "plain")
    ours, plain = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "plain"))
    assert made.overlap < 1e-12
    assert all((ours[name] - value).abs().max() < 1e-6 for name, value in plain.items())
    assert combine(adapters, tmp_path / "apart", orthogonal=1.0).overlap > 0.01
    assert refusal.exists()


def test_a_basis_has_no_directions_of_its_own():
    """B of rank 1 with two columns has one direction, and a B of zeros has none."""
    u = np.arange(1.0, 6)[:, None]
    basis = column_basis(np.concatenate([u, 2 * u], axis=1))
    assert basis.shape == (5, 1)
    assert np.allclose(np.abs(basis[:, 0]), u[:, 0] / np.linalg.norm(u))
    assert column_basis(np.zeros((5, 2))).shape == (5, 0)
    with pytest.raises(ModelError, match="not finite"):
        column_basis(np.full((5, 2), np.nan))


def test_the_result_belongs_on_the_adapters_below(adapters, tmp_path):
    aligned = save_adapter(tmp_path / "aligned", r=2, target_modules=TWO)
    siblings = [save_adapter(tmp_path / name, r=2, target_modules=TWO) for name in ("a", "b")]
    for folder in siblings:
        write_below(folder, [aligned])
    combine(siblings, tmp_path / "out", orthogonal=1.0)
    record = json.loads((tmp_path / "out" / "holdfast_adapter.json").read_text())
    assert record == json.loads((siblings[0] / "holdfast_adapter.json").read_text())
    combine([aligned, tmp_path / "out"], tmp_path / "whole")
    with pytest.raises(ModelError, match="not trained on top of the same adapters"):
        combine([siblings[0], adapters[1]], tmp_path / "other", orthogonal=1.0)
    assert not (tmp_path / "other").exists()


def test_the_command(adapters, tmp_path):
    user, refusal = map(str, adapters)
    merged = ["combine", user, refusal, "--orthogonal", "--weights", "0.5,0.25", "--share", "0.3"]
    assert command(*merged, "--out", tmp_path / "out").returncode == 0
    combine(adapters, tmp_path / "python", weights=[0.5, 0.25], orthogonal=0.3)
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "python"))
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    for wrong, words in (
        (["--share", "0.5"], "--orthogonal"),
        (["--weights", "a,b"], "0.5,0.5"),
    ):
        refused(command("combine", user, refusal, *wrong, "--out", tmp_path / "none"), words)
    assert not (tmp_path / "none").exists()


def test_numbers_that_cannot_be_used(adapters, tmp_path):
    for options, words in (
        ({"orthogonal": -0.1}, "from 0 to 1"),
        ({"orthogonal": float("nan")}, "from 0 to 1"),
        ({"weights": [1.0]}, "one weight for each of 2"),
        ({"weights": [1.0, float("inf")]}, "finite"),
    ):
        with pytest.raises(RecipeError, match=words):
            combine(adapters, tmp_path / "out", **options)
