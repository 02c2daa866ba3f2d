"""The choice of algorithm and backend is a pure function that can be read off."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella_kernels import dispatch


@pytest.mark.parametrize(
    "out, in_, r, k, expected",
    [
        (4096, 4096, 8, 8, "gram"),
        (1024, 1024, 8, 8, "gram"),
        (1024, 4096, 8, 16, "gram"),
        (4096, 14336, 16, 16, "gram"),
        (4096, 4096, 64, 64, "stream"),
        (1024, 1024, 8, 128, "stream"),
        (64, 64, 16, 16, "stream"),
        (1024, 1024, 8, None, "dense"),
    ],
)
def test_cpu_choice_follows_the_measured_crossovers(out, in_, r, k, expected):
    assert ek.select_algorithm(out, in_, r, k, "cpu") == expected


def test_choice_is_monotonic_in_the_past_rank():
    """Once stream wins, a larger past never brings gram back."""
    for r in (4, 8, 16, 32):
        choices = [ek.select_algorithm(2048, 2048, r, k) for k in range(0, 400, 4)]
        assert choices == sorted(choices), (r, choices)  # "gram" < "stream"
        assert choices[0] == "gram" and choices[-1] == "stream"


def test_an_unlisted_device_has_a_default():
    assert ek.select_algorithm(4096, 4096, 8, 8, "xpu") == "gram"


def test_auto_backend_is_torch_off_gpu():
    assert dispatch.select_backend("auto", "cpu") == "torch"
    assert dispatch.select_backend("auto", "mps") == "torch"
    assert dispatch.select_backend("torch", "cuda") == "torch"


def test_auto_and_explicit_algorithms_agree():
    a, b = torch.randn(8, 96), torch.randn(64, 8)
    past = ek.LowRank(torch.randn(64, 8), torch.randn(8, 96))
    chosen = ek.select_algorithm(64, 96, 8, 8, "cpu")
    assert torch.equal(ek.hadamard_penalty(a, b, past), ek.hadamard_penalty(a, b, past, algorithm=chosen))
