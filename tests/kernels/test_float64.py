"""float64 in any operand makes the call float64, to its last digits."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from tests.kernels.cases import BOUND, exact, factors, relative_error

ALGORITHMS = ["gram", "stream", "dense", "spectral"]
FIELDS = ["lora_A", "lora_B", "left", "right", "row_energy", "col_energy"]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


def name_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


def options_of(algorithm, backend):
    return {"backend": backend} | ({} if algorithm == "spectral" else {"algorithm": algorithm})


def check(a, b, past, scaling, algorithm, backend, bound=BOUND[torch.float64]):
    """Values in float64, and gradients added to float64."""
    options, name = options_of(algorithm, backend), name_of(algorithm)
    wanted = exact(a, b, past, scaling, name)
    value = getattr(ek, f"{name}_penalty")(a, b, past, scaling, **options)
    assert value.dtype == torch.float64 and relative_error(value, wanted[0]) < bound
    grads = torch.zeros_like(a, dtype=torch.float64), torch.zeros_like(b, dtype=torch.float64)
    add = getattr(ek, f"add_{name}_grad_")
    values = add([a], [b], [past], [scaling], [grads[0]], [grads[1]], weight=1.0, **options)
    for found, want in zip((values[0], *grads), wanted, strict=True):
        assert found.dtype == torch.float64 and relative_error(found, want) < bound


@pytest.mark.parametrize("wide", FIELDS)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@BACKENDS
def test_one_float64_operand(backend, algorithm, wide):
    a, b, past = factors(30, 40, 4, 6, energy=True)
    a, b = (t.double() if wide == name else t for name, t in (("lora_A", a), ("lora_B", b)))
    past = ek.LowRank(*(t.double() if wide == name else t for name, t in zip(past._fields, past, strict=True)))
    check(a, b, past, 0.7, algorithm, backend)


@pytest.mark.parametrize("algorithm", ["stream", "dense"])
@BACKENDS
def test_float64_factors_of_a_float32_matrix(backend, algorithm):
    a, b, past = factors(30, 40, 4, 6)
    check(a.double(), b.double(), past.left @ past.right, 0.7, algorithm, backend)


@BACKENDS
def test_spectral_decomposes_a_matrix_in_float64(backend):
    """Of full rank: where singular values vanish, the penalty's derivative in the past does not exist."""
    gen = torch.Generator().manual_seed(0)
    a, b, past = (torch.randn(*s, generator=gen) for s in ((3, 12), (12, 3), (12, 12)))
    past += 5 * torch.eye(12)
    check(a.double(), b.double(), past, 0.7, "spectral", backend)
    check(a, b, past.double(), 0.7, "spectral", backend)
    value = ek.spectral_penalty(a, b, past, 0.7, backend=backend)
    assert value.dtype == torch.float32
    assert relative_error(value, exact(a, b, past, 0.7, "spectral")[0]) < BOUND[torch.float32]


@pytest.mark.parametrize("out, k", [(0, 3), (4, 0)])
def test_an_empty_float64_operand_counts_too(out, k):
    """What a compiler is told agrees with what is computed."""
    past = ek.LowRank(torch.zeros(out, k), torch.zeros(k, 5), torch.zeros(out).double(), torch.zeros(5))
    compiled = torch.compile(ek.hadamard_penalty, fullgraph=True, backend="aot_eager")
    for penalty in (ek.hadamard_penalty, compiled):
        value = penalty(torch.ones(2, 5), torch.ones(out, 2), past)
        assert value.dtype == torch.float64 and value == 0


def test_a_matrix_that_cannot_be_decomposed_is_named():
    past = torch.ones(5, 4)
    past[1, 2] = float("nan")
    with pytest.raises(ValueError, match="past must be finite to be decomposed"):
        ek.spectral_penalty(torch.ones(2, 4), torch.ones(5, 2), past)
    with pytest.raises(ValueError, match=r"past must have shape \(5, 4\), found \(4, 5\)"):
        ek.spectral_penalty(torch.ones(2, 4), torch.ones(5, 2), past.T)
