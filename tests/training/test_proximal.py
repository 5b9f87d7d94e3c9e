"""The three penalties and their gradients, by hand and by autograd, and which modules delta_w sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from holdfast.training.proximal import L2, DeltaW, Factors, Weighted, add_gradient


def drawn(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


SHAPES = [(5, 2), (2, 7), (3, 2), (2, 4)]
"""B, A, B, A of two modules."""
FISHER = [t.abs() for t in drawn(*SHAPES, seed=3)]


def products(weights):
    return [3.0 * weights[0] @ weights[1], 0.5 * weights[2] @ weights[3]]


TERMS = {
    "l2": (L2(), lambda w, a: sum(((x - y) ** 2).sum() for x, y in zip(w, a, strict=True)) / 2),
    "fisher": (
        Weighted(FISHER),
        lambda w, a: sum((f * (x - y) ** 2).sum() for f, x, y in zip(FISHER, w, a, strict=True)) / 2,
    ),
    "delta_w": (
        DeltaW([Factors(0, 1, 3.0), Factors(2, 3, 0.5)]),
        lambda w, a: sum(((x - y) ** 2).sum() for x, y in zip(products(w), products(a), strict=True)) / 2,
    ),
}


@pytest.mark.parametrize("name", TERMS)
def test_value_and_gradient_against_autograd(name):
    term, definition = TERMS[name]
    weights = [nn.Parameter(t) for t in drawn(*SHAPES, seed=1)]
    anchor = drawn(*SHAPES, seed=2)
    value = definition(weights, anchor)
    expected = torch.autograd.grad(value, weights)
    found = term.gradient(weights, anchor)
    assert float(term.value(weights, anchor)) == pytest.approx(value.item(), rel=1e-5)
    for f, e in zip(found, expected, strict=True):
        assert torch.allclose(f, e, rtol=1e-12, atol=1e-12)
        assert not f.requires_grad


@pytest.mark.parametrize("name", TERMS)
def test_nothing_at_the_anchor(name):
    term, _ = TERMS[name]
    weights = drawn(*SHAPES, seed=1)
    anchor = [w.clone() for w in weights]
    assert float(term.value(weights, anchor)) == 0
    assert all(not g.any() for g in term.gradient(weights, anchor))


def test_small_changes_of_large_factors_are_seen():
    """In float32, the difference of the two products would be only rounding error."""
    weights = [t.float() * 100 for t in drawn(*SHAPES, seed=1)]
    anchor = [w - 1e-4 * d.float() for w, d in zip(weights, drawn(*SHAPES, seed=4), strict=True)]
    exact = TERMS["delta_w"][1]([w.double() for w in weights], [a.double() for a in anchor])
    assert float(TERMS["delta_w"][0].value(weights, anchor)) == pytest.approx(float(exact), rel=1e-4)


def test_the_gradient_is_added_where_there_is_one():
    w, other = nn.Parameter(torch.tensor([1.0, -2.0])), nn.Parameter(torch.tensor([5.0]))
    w.grad = torch.tensor([0.5, 0.5])
    anchor = [torch.tensor([0.5, -2.0]), torch.tensor([0.0])]
    add_gradient([w, other], L2().gradient([w, other], anchor), 2.0)
    assert w.grad.tolist() == [1.5, 0.5]
    assert other.grad is None
