"""Work memory by shapes alone against every allocation of the real launches."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from bench.measure import peak_bytes
from bench.plan_check import as_a_first_call
from ella_kernels.workspace import Size, work_bytes


def tensors(size):
    a, b, left, right = (
        torch.randn(shape) for shape in ((size.r, size.in_), (size.out, size.r), (size.out, size.k), (size.k, size.in_))
    )
    energies = (torch.rand(size.out), torch.rand(size.in_)) if size.energy else (None, None)
    return a, b, ek.LowRank(left, right, *energies)


def peak(sizes, penalty, **options):
    made = [tensors(size) for size in sizes]
    a, b, pasts = (list(column) for column in zip(*made, strict=True))
    grads = [[torch.zeros_like(t) for t in factors] for factors in (a, b)]
    add_ = ek.add_spectral_grad_ if penalty == "spectral" else ek.add_hadamard_grad_
    with as_a_first_call():
        found = peak_bytes(lambda: add_(a, b, pasts, [1.0] * len(a), *grads, weight=1.0, backend="triton", **options))
    return found - 4 * len(sizes)  # the values


CASES = {
    "gram": [Size(40, 56, 3, 5), Size(24, 130, 3, 5)],
    "gram with energies": [Size(40, 56, 4, 4, True)] * 3,
    "stream": [Size(24, 40, 4, 40), Size(700, 24, 4, 40)],
    "two classes": [Size(64, 40, 3, 5), Size(64, 64, 4, 3, True)],
}


@pytest.mark.parametrize("name", CASES)
def test_a_first_call_holds_what_was_counted(name):
    sizes, algorithm = CASES[name], "stream" if name == "stream" else "gram"
    found, counted = peak(sizes, "hadamard", algorithm=algorithm), work_bytes(sizes, "cpu", algorithm=algorithm)
    assert counted > 1000 and abs(found - counted) <= 0.01 * counted


def test_the_spectral_penalty():
    sizes = [Size(40, 56, 3, 5), Size(24, 130, 3, 5)]
    found, counted = peak(sizes, "spectral"), work_bytes(sizes, "cpu", "spectral")
    assert counted > 1000 and abs(found - counted) <= 0.01 * counted
