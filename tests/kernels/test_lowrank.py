"""Truncation: the best approximation, ordered, evenly split, with exact energies of what was dropped."""

from __future__ import annotations

import doctest
import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ella_kernels as ek
from tests.kernels.cases import relative_error


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(0, 14), st.integers(0, 2**16))
def test_truncation_is_the_svd(out, in_, k, rank, seed):
    gen = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(*s, generator=gen, dtype=torch.float64) for s in ((out, k), (k, in_)))
    past = ek.truncate(left, right, rank)
    w = left @ right
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    kept = min(rank, out, in_, k)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert past.left.shape == (out, kept) and past.right.shape == (kept, in_)
    assert torch.dist(past.left @ past.right, best) <= 1e-10 * w.norm()
    for factor, dim in ((past.left, 0), (past.right, 1)):
        assert torch.dist(factor.square().sum(dim), s[:kept]) <= 1e-10 * s.norm()
    dropped = w - best
    if past.row_energy is None:
        assert dropped.norm() <= 1e-10 * w.norm()
    else:
        assert torch.dist(past.row_energy, dropped.square().sum(1)) <= 1e-10 * w.norm() ** 2
        assert torch.dist(past.col_energy, dropped.square().sum(0)) <= 1e-10 * w.norm() ** 2


def test_energies_correct_the_truncated_penalty():
    """15 random tasks of rank 8 (docs/math.md): 8 of 120 components alone see a third of it, with energies all."""
    gen = torch.Generator().manual_seed(0)
    left, right = torch.randn(512, 120, generator=gen), torch.randn(120, 384, generator=gen)
    a, b = torch.randn(8, 384, generator=gen), torch.randn(512, 8, generator=gen)
    exact = ek.hadamard_penalty(a, b, ek.LowRank(left, right))
    for rank in (0, 8, 16, 32):
        past = ek.truncate(left, right, rank)
        assert ek.hadamard_penalty(a, b, ek.LowRank(past.left, past.right)) < 0.9 * exact
        assert abs(ek.hadamard_penalty(a, b, past) / exact - 1) < 0.03


def deficient(kind, dtype):
    """Factors of eight components whose product has three."""
    gen = torch.Generator().manual_seed(0)
    left, right, mix = (torch.randn(*s, generator=gen, dtype=dtype) for s in ((40, 3), (3, 56), (3, 8)))
    if kind == "repeated":
        return torch.cat([left, left, left[:, :2]], 1), torch.cat([right, right, right[:2]])
    if kind == "zero":
        return torch.cat([left, torch.zeros(40, 5, dtype=dtype)], 1), torch.cat([right, right, right])[:8]
    if kind == "sizes":
        sizes = torch.tensor([1e9, 1.0, 1e-5], dtype=dtype)
        return torch.cat([left, left * sizes, left[:, :2]], 1), torch.cat([right, right, right[:2]])
    return left.double() @ mix.double(), mix.double().mT @ right.double()


@pytest.mark.parametrize("scale", [1.0, 2.0**-60, 2.0**60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["repeated", "zero", "sizes", "mixed"])
def test_rounding_is_not_stored_as_energies(kind, dtype, scale):
    left, right = deficient(kind, dtype)
    left *= scale
    past = ek.truncate(left, right, 3)
    assert past.left.shape == (40, 3) and past.left.dtype == left.dtype
    assert not past.row_energy.any() and not past.col_energy.any()
    assert relative_error(past.left.double() @ past.right.double(), left.double() @ right.double()) < 1e-6
    # Nor as components, where more are kept than there are.
    more = ek.truncate(left, right, 6)
    assert not more.left[:, 3:].any() and not more.right[3:].any()
    # One fewer, and what is dropped is exact.
    u, s, vh = torch.linalg.svd(left.double() @ right.double(), full_matrices=False)
    fewer = ek.truncate(left.double(), right.double(), 2)
    assert relative_error(fewer.row_energy, (u[:, 2] * s[2]).square()) < 1e-5
    assert relative_error(fewer.col_energy, (vh[2] * s[2]).square()) < 1e-5


def test_very_large_and_very_small_factors():
    gen = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 4, generator=gen).double(), torch.randn(4, 56, generator=gen).double()
    plain, scaled = ek.truncate(left, right, 2), ek.truncate(left * 2.0**600, right * 2.0**-600, 2)
    assert all(relative_error(found, want) < 1e-12 for found, want in zip(scaled, plain, strict=True))
    with pytest.raises(ValueError, match=r"left @ right must be finite in float64"):
        ek.truncate(left * 2.0**600, right * 2.0**600, 2)


def test_small_components_are_not_taken_for_rounding():
    gen = torch.Generator().manual_seed(0)
    left, right = torch.randn(40, 4, generator=gen), torch.randn(4, 56, generator=gen)
    left[:, 2:] *= 1e-10
    past = ek.truncate(left, right, 2)
    rest = ek.truncate(left[:, 2:], right[2:], 0)
    # The components are not orthogonal: of the two directions that are left, a part lies in the others.
    assert 0 < past.row_energy.sum() < rest.row_energy.sum()


def test_truncation_widens_half_factors_and_keeps_float64():
    left, right = torch.randn(20, 6), torch.randn(6, 30)
    assert ek.truncate(left.bfloat16(), right.bfloat16(), 3).left.dtype == torch.float32
    assert ek.truncate(left.double(), right, 3).row_energy.dtype == torch.float64
    full = ek.truncate(left, right, 6)
    assert full.row_energy is None and relative_error(full.left @ full.right, left @ right) < 1e-6


@pytest.mark.parametrize(
    "module", ["ella_kernels", "ella_kernels.functional", "ella_kernels.lowrank", "ella_kernels.dispatch"]
)
def test_docstring_examples_run(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted > 0 and result.failed == 0
