"""The shrinkage operator and the interference bound as theorems on random matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ella_kernels as ek
from ella import interference, interference_bound, shrink, shrink_spectral
from tests.kernels.cases import relative_error

SIZES = st.integers(1, 12)
STRENGTHS = st.floats(1e-3, 1e3)


def matrices(seed, *shapes):
    gen = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in shapes]


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, STRENGTHS, st.floats(0, 2), st.integers(0, 2**16))
def test_shrink_is_the_minimiser(out, in_, lam, eps, seed):
    g, w = matrices(seed, (out, in_), (out, in_))
    d = shrink(g, w, lam, eps).requires_grad_()
    objective = 0.5 * (d - g).square().sum() + lam / 2 * ((w.abs() + eps) * d).square().sum()
    (gradient,) = torch.autograd.grad(objective, d)
    assert gradient.norm() <= 1e-10 * g.norm() * (1 + lam * (w.abs() + eps).max() ** 2)


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, STRENGTHS, st.floats(1e-3, 2), st.integers(0, 2**16))
def test_interference_stays_below_its_bound(out, in_, lam, eps, seed):
    g, w = matrices(seed, (out, in_), (out, in_))
    # The worst case wants exactly what the past wrote.
    for wanted in (g, w, w.sign()):
        assert interference(shrink(wanted, w, lam, eps), w) <= interference_bound(wanted, w, lam, eps) * (1 + 1e-12)


def test_the_bound_is_not_vacuous():
    """One coordinate with λE² = 1 meets the bound exactly."""
    g, w = torch.tensor([[3.0]]), torch.tensor([[2.0]])
    assert torch.isclose(interference(shrink(g, w, 0.25), w), interference_bound(g, w, 0.25, 0.0))


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 10), st.integers(2, 10), st.integers(1, 6), STRENGTHS, st.integers(0, 2**16))
def test_spectral_shrinkage_is_the_minimiser(out, in_, k, lam, seed):
    """Of ½‖D - G‖² + (λ/2)·P with the package's own spectral penalty and its closed-form gradient."""
    g, left, right = matrices(seed, (out, in_), (out, k), (k, in_))
    d = shrink_spectral(g, left, right, lam)
    even = ek.truncate(left, right, k)
    h = even.left @ (even.left.T @ d @ even.right.T) @ even.right
    assert (d - g + lam * h).norm() <= 1e-8 * g.norm() * (1 + lam * torch.linalg.matrix_norm(left @ right, 2) ** 2)


def test_limits():
    g, w = matrices(0, (5, 4), (5, 4))
    assert torch.equal(shrink(g, w, 0.0), g)
    assert torch.equal(shrink(g, torch.zeros_like(w), 1e6), g)
    assert shrink(g, w, 1e12).norm() < 1e-6 * g.norm()
    left, right = matrices(1, (5, 2), (2, 4))
    assert relative_error(shrink_spectral(g, left, right, 0.0), g) < 1e-12
    assert relative_error(shrink_spectral(g, 0 * left, right, 1e6), g) < 1e-12


def test_bad_input_is_named():
    g = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"past must have the gradient's shape \(2, 3\), found \(3, 2\)"):
        shrink(g, torch.ones(3, 2), 1.0)
    with pytest.raises(ValueError, match="ella_lambda must be finite and at least 0, found -1"):
        shrink(g, g, -1.0)
    with pytest.raises(ValueError, match="eps must be finite"):
        interference_bound(g, g, 1.0, float("inf"))
    with pytest.raises(ValueError, match="ella_lambda must be above 0"):
        interference_bound(g, g, 0.0, 1.0)
