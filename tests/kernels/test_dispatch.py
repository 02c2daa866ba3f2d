"""The choice of algorithm and backend is a pure function that can be read off."""

from __future__ import annotations

import warnings

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
        (4096, 4096, 8, 32, "gram"),
        (4096, 4096, 8, 64, "stream"),
        (4096, 4096, 16, 32, "gram"),
        (1024, 1024, 8, 32, "stream"),
        (1024, 4096, 8, 32, "gram"),
        (4096, 4096, 64, 64, "stream"),
        (1024, 1024, 8, 128, "stream"),
        (64, 64, 16, 16, "stream"),
        (32, 32, 4, 4, "stream"),
        (256, 256, 8, 8, "stream"),
        (384, 384, 8, 8, "gram"),
        (384, 384, 8, 120, "stream"),
        (1024, 1024, 8, None, "dense"),
    ],
)
def test_cpu_choice_follows_the_measured_crossovers(out, in_, r, k, expected):
    assert ek.select_algorithm(out, in_, r, k, "cpu") == expected


@pytest.mark.parametrize("device", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_gpu_choice_follows_the_counted_operations(device):
    assert ek.select_algorithm(4096, 4096, 8, 8, device) == "gram"
    assert ek.select_algorithm(1024, 4096, 8, 16, device) == "gram"
    assert ek.select_algorithm(4096, 4096, 8, 120, device) == "stream"
    assert ek.select_algorithm(4096, 4096, 64, 64, device) == "stream"


def test_kernels_say_which_ranks_they_take():
    """All r·k ≤ 256 fit gram; stream takes what auto gives it up to its own limits."""
    for r in range(1, 257):
        assert dispatch.no_kernel("gram", r, 256 // r) is None
    assert "Gram elements" in dispatch.no_kernel("gram", 64, 64)
    assert dispatch.no_kernel("stream", 256, 512) is None and dispatch.no_kernel("dense", 256, 0) is None
    assert "r up to 256 and k up to 512" in dispatch.no_kernel("stream", 8, 513)
    assert "r up to 64" in dispatch.no_kernel("spectral", 65, 8)


def test_a_fallback_is_said_once():
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="found r = 65; computing it with torch"):
        dispatch.warn_once("found r = 65")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dispatch.warn_once("found r = 65")


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
