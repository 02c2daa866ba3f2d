"""Folding a finished task into the past: QR of the factors and a small SVD, against adding and decomposing matrices."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella.past import fold_factors

from .measure import GATE
from .rows import Row, measure_calls
from .shapes import Case, Size

SCALING = 2.0
BASELINE = "dense add"
# Seconds of a full SVD on two cores beyond which only `make bench-full` waits for it.
_SVD_WIDTH = 1024


def _case(size: Size, past_rank: int, *, short: bool = True) -> tuple[Case, int]:
    return Case(f"{size.out}x{size.in_}, k {size.k} + r {size.r}, past_rank {past_rank}", (size,), short), past_rank


_CASES = [
    _case(Size(1024, 1024, 8, 64), 128),
    _case(Size(1024, 1024, 8, 128), 128),
    _case(Size(4096, 4096, 16, 64), 128),
    _case(Size(4096, 4096, 8, 128), 128),
    _case(Size(14336, 4096, 16, 128), 128, short=False),
]


def tail_error(left, right, folded: ek.LowRank) -> float:
    """Distance of ``‖W - fold‖_F`` from the best possible (the dropped singular values), over ``‖W‖_F``; float64.

    Args:
        left, right: factors ``(out, m)``, ``(m, in)`` of the exact ``W``.
        folded: its truncation.
    """
    left, right = left.double(), right.double()
    kept = folded.right.shape[0]
    # Singular values without the QR and SVD under test: σ² are the eigenvalues of LᵀL·RRᵀ.
    squares = torch.linalg.eigvals((left.mT @ left) @ (right @ right.mT)).real.sort(descending=True).values
    best = squares[kept:].clamp(min=0).sum().sqrt()
    error_left = torch.cat([left, -folded.left.double()], 1)
    error_right = torch.cat([right, folded.right.double()])
    # ‖XY‖² from QR factors: from Gram matrices a small difference would drown in their rounding.
    distance = (torch.linalg.qr(error_left).R @ torch.linalg.qr(error_right.mT).R.mT).norm()
    return ((distance - best).abs() / squares.sum().sqrt()).item()


@pytest.mark.parametrize(("case", "past_rank"), [pytest.param(*pair, id=pair[0].name) for pair in _CASES])
def bench_fold(case, past_rank, limits, full, device, report_all):
    size = case.sizes[0]
    gen = torch.Generator(device).manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, device=device)

    past = ek.truncate(randn(size.out, size.k), randn(size.k, size.in_), size.k)
    a, b = randn(size.r, size.in_), randn(size.out, size.r)
    dense = past.left @ past.right
    left, right = torch.cat([past.left, SCALING * b], 1), torch.cat([past.right, a])

    def fold():
        return fold_factors(past, a, b, SCALING, past_rank)[0]

    def decompose():
        return ek.lowrank.split_evenly(
            *torch.linalg.svd(torch.addmm(dense, b, a, alpha=SCALING), full_matrices=False), past_rank, torch.float32
        )

    calls = {
        BASELINE: lambda: torch.addmm(dense, b, a, alpha=SCALING),
        "dense SVD": decompose,
        "ours fold": fold,
    }
    rows = {
        name: Row("fold", case.name, "", name, sizes=list(size[:4]), baseline=name == BASELINE, gate=GATE["ieee"])
        for name in calls
    }
    rows[BASELINE].held_bytes = 4 * size.weight
    rows["dense SVD"].held_bytes = rows["ours fold"].held_bytes = 4 * (size.out + size.in_) * past_rank
    exact = left.double() @ right.double()
    rows[BASELINE].error = ((calls[BASELINE]().double() - exact).norm() / exact.norm()).item()
    rows["ours fold"].error = tail_error(left, right, fold())
    if max(size.out, size.in_) > _SVD_WIDTH and not full:
        rows[
            "dense SVD"
        ].reason = f"a full SVD of {size.out}x{size.in_} takes a minute or more; make bench-full runs it"
    else:
        rows["dense SVD"].error = tail_error(left, right, decompose())
    del exact
    report_all(measure_calls(rows, calls, limits, device, baseline=BASELINE))
