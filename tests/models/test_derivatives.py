"""Derivatives beyond an ordinary backward: of batches of gradients, and second ones."""

from __future__ import annotations

import pytest
import torch
from test_nn import close
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastbert.nn as fnn

SMALL = {
    "LayerNorm": (lambda k: k.LayerNorm(6), (4, 6)),
    "LayerNorm without bias": (lambda k: k.LayerNorm(6, bias=False), (4, 6)),
    "RMSNorm": (lambda k: k.RMSNorm(6), (4, 6)),
    "RMSNorm without weight": (lambda k: k.RMSNorm(6, elementwise_affine=False), (4, 6)),
    "GELU": (lambda k: k.GELU(), (4, 6)),
    "tanh GELU": (lambda k: k.GELU("tanh"), (4, 6)),
    "TransformerEncoderLayer": (
        lambda k: k.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True),
        (2, 3, 8),
    ),
}


@pytest.mark.parametrize("case", SMALL)
def test_batched_gradients(case: str) -> None:
    """torch's older vmap runs backward with is_grads_batched and in vectorized jacobians."""
    make, shape = SMALL[case]
    ours, theirs = make(fnn), make(nn)
    ours.load_state_dict(theirs.state_dict())
    x, found = torch.randn(shape, dtype=torch.float32), []
    for m in (ours, theirs):
        leaf = x.clone().requires_grad_()
        y = m(leaf)
        sources = [leaf, *m.parameters()]
        several = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
        found.append(torch.autograd.grad(y, sources, several, is_grads_batched=True))
    for a, b in zip(*found, strict=True):
        close(a, b)
    jacobians = [torch.autograd.functional.jacobian(m, x, vectorize=True) for m in (ours, theirs)]
    close(*jacobians)


@pytest.mark.parametrize("case", [c for c in SMALL if c != "TransformerEncoderLayer"])
def test_second_derivatives(case: str) -> None:
    make, shape = SMALL[case]
    ours, theirs = make(fnn), make(nn)
    x, found = torch.randn(shape), []
    for m in (ours, theirs):
        leaf = x.clone().requires_grad_()
        sources = [leaf, *m.parameters()]
        first = torch.autograd.grad(m(leaf).sin().sum(), sources, create_graph=True)
        loss = sum(g.square().sum() for g in first)
        second = torch.autograd.grad(loss, sources, allow_unused=True)
        found.append([*first, *(torch.zeros(1) if g is None else g for g in second)])
    for a, b in zip(*found, strict=True):
        close(a, b)
    products = [
        torch.autograd.functional.hvp(lambda t, m=m: m(t).sin().sum(), x, x.flip(0))[1]
        for m in (ours, theirs)
    ]
    close(*products)
    assert products[0].any()


@pytest.mark.parametrize("case", [c for c in SMALL if c != "TransformerEncoderLayer"])
def test_hooks_run_once_and_checkpointing_works(case: str) -> None:
    make, shape = SMALL[case]
    x, found = torch.randn(shape), []
    for m in (make(fnn), make(nn)):
        leaf, calls = x.clone().requires_grad_(), []
        for t in (leaf, *m.parameters()):
            t.register_hook(lambda g, calls=calls: calls.append(1) or g * 0.5)
        inner = leaf * 1.0
        inner.register_hook(lambda g, calls=calls: calls.append(1) or g * 0.5)
        y = checkpoint(m, inner, use_reentrant=False)
        y.sin().sum().backward(create_graph=True)
        found.append((calls, [leaf.grad, *(p.grad for p in m.parameters())]))
    (ours, a), (theirs, b) = found
    assert ours == theirs
    for g, h in zip(a, b, strict=True):
        close(g.detach(), h.detach())
