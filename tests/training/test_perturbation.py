"""Gradients of activations and perturbed activations on a plain model, without a trainer."""

from __future__ import annotations

import pytest
import torch

import two_passes
from holdfast.training.layers import mixers
from holdfast.training.perturbation import (
    activation_gradients,
    perturbed,
    same_random_numbers,
    squared_gradient_norms,
)

BATCH = two_passes.COLLATE(two_passes.HARMFUL[:3])


def made(checkpointing=False, dropout=0.0):
    net = two_passes.model(dropout=dropout)
    if checkpointing:
        net.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    return net.train()


def pass_1(net):
    return activation_gradients(mixers(net), lambda: two_passes.cross_entropy(net, BATCH))


def pass_2(net, gradients, scale):
    with perturbed(mixers(net), gradients, scale):
        loss = two_passes.cross_entropy(net, BATCH)
        loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in net.parameters() if p.requires_grad)]


def test_the_gradients_are_those_of_a_whole_backward():
    net = made()
    loss, found = pass_1(net)
    assert all(p.grad is None for p in net.parameters()), "no .grad is touched"
    torch.testing.assert_close(loss, two_passes.cross_entropy(net, BATCH).detach())
    expected = two_passes.output_gradients(net, BATCH)
    assert [found[i].shape for i in range(two_passes.LAYERS)] == [g.shape for g in expected]
    for i, g in enumerate(expected):
        torch.testing.assert_close(found[i], g)


def test_the_gradients_do_not_need_anything_that_trains():
    net = made()
    _, expected = pass_1(net)
    net.requires_grad_(False)
    _, found = pass_1(net)
    assert all(torch.equal(found[i], expected[i]) for i in expected)


def test_some_modules_only():
    """Gradients pass through the other modules; a module that is never called has none."""
    net = made()
    _, every = pass_1(net)
    chosen = [mixers(net)[1], torch.nn.Linear(2, 2), mixers(net)[3]]
    _, found = activation_gradients(chosen, lambda: two_passes.cross_entropy(net, BATCH))
    assert found.keys() == {0, 2}
    assert torch.equal(found[0], every[1])
    assert torch.equal(found[2], every[3])
    squares = squared_gradient_norms(chosen, lambda: two_passes.cross_entropy(net, BATCH))
    assert squares[1] == 0
    torch.testing.assert_close(squares[0], every[1].square().sum())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_norms_are_those_of_the_gradients(checkpointing):
    net = made(checkpointing)
    squares = squared_gradient_norms(mixers(net), lambda: two_passes.cross_entropy(net, BATCH))
    expected = [g.square().sum() for g in two_passes.output_gradients(made(), BATCH)]
    torch.testing.assert_close(squares, torch.stack(expected))


def test_checkpointing_changes_no_bit():
    """Gradients, the perturbed loss and the weights' gradients are equal; no hooks remain."""
    plain, checkpointed = made(), made(checkpointing=True)
    (_, expected), (_, found) = pass_1(plain), pass_1(checkpointed)
    assert all(torch.equal(found[i], expected[i]) for i in expected)
    pairs = zip(pass_2(plain, expected, 3.0), pass_2(checkpointed, found, 3.0), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(m._forward_hooks for m in mixers(plain) + mixers(checkpointed))


def test_control_a_perturbation_that_ends_before_backward_is_noticed():
    """With checkpointing, it gives other gradients without an error."""
    net = made(checkpointing=True)
    _, g = pass_1(net)
    right = pass_2(net, g, 3.0)
    net.zero_grad()
    with perturbed(mixers(net), g, 3.0):
        loss = two_passes.cross_entropy(net, BATCH)
    loss.backward()
    wrong = [p.grad for p in net.parameters() if p.requires_grad]
    assert torch.equal(loss, right[0])
    assert max(float((a - b).abs().max()) for a, b in zip(wrong, right[1:], strict=True)) > 1e-4


def test_the_perturbation_raises_the_loss():
    """By rho ||g|| to first order, which is the largest possible increase."""
    net = made()
    loss, g = pass_1(net)
    norm = float(torch.stack([x.square().sum() for x in g.values()]).sum().sqrt())
    rho = 1e-2
    with perturbed(mixers(net), g, rho / norm), torch.no_grad():
        change = two_passes.cross_entropy(net, BATCH) - loss
    assert float(change) == pytest.approx(rho * norm, rel=0.02)


def test_the_same_random_numbers():
    torch.manual_seed(5)
    with same_random_numbers(torch.device("cpu")):
        first = torch.rand(3)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    net = made().to(dtype)
    _, g = pass_1(net)
    assert {x.dtype for x in g.values()} == {dtype}
    with perturbed(mixers(net), g, 2.0):
        assert net(input_ids=BATCH["input_ids"]).logits.dtype == dtype
    assert (
        squared_gradient_norms(mixers(net), lambda: two_passes.cross_entropy(net, BATCH)).dtype
        == torch.float32
    )
