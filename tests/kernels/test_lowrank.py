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
    """15 random tasks of rank 8 (DESIGN 2.3): 8 of 120 components alone see a third of it, with energies all."""
    gen = torch.Generator().manual_seed(0)
    left, right = torch.randn(512, 120, generator=gen), torch.randn(120, 384, generator=gen)
    a, b = torch.randn(8, 384, generator=gen), torch.randn(512, 8, generator=gen)
    exact = ek.hadamard_penalty(a, b, ek.LowRank(left, right))
    for rank in (0, 8, 16, 32):
        past = ek.truncate(left, right, rank)
        assert ek.hadamard_penalty(a, b, ek.LowRank(past.left, past.right)) < 0.9 * exact
        assert abs(ek.hadamard_penalty(a, b, past) / exact - 1) < 0.03


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
