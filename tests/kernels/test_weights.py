"""A weight given as a tensor: whatever real dtype it has, the gradient is that number times ∂P, rounded once."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella_kernels.layer import weight_on
from tests.kernels.cases import BOUND, exact, factors, relative_error

ALGORITHMS = ["gram", "stream", "dense", "spectral"]
DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
]


def add_(algorithm, backend, case, grads, weight, scaling=0.7):
    a, b, past = case
    add = ek.add_spectral_grad_ if algorithm == "spectral" else ek.add_hadamard_grad_
    options = {"backend": backend} | ({} if algorithm == "spectral" else {"algorithm": algorithm})
    return add([a], [b], [past], [scaling], [grads[0]], [grads[1]], weight=weight, **options)


def name_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_any_real_dtype(backend, algorithm, dtype, weight_dtype):
    weight = torch.tensor(3.3, dtype=torch.float64).to(weight_dtype)
    case = factors(30, 40, 4, 5, dtype=dtype)
    _, want_a, want_b = exact(*case, 0.7, name_of(algorithm))
    for _ in range(2):
        grads = torch.zeros(4, 40, dtype=dtype), torch.zeros(30, 4, dtype=dtype)
        add_(algorithm, backend, case, grads, weight)
        for grad, want in zip(grads, (want_a, want_b), strict=True):
            assert relative_error(grad, weight.double() * want) < BOUND[dtype]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_half_weight_does_not_overflow(backend, algorithm):
    case = factors(30, 40, 4, 5)
    grads = torch.zeros(4, 40), torch.zeros(30, 4)
    add_(algorithm, backend, case, grads, torch.tensor(6e4, dtype=torch.float16), scaling=2.0)
    _, want_a, want_b = exact(*case, 2.0, name_of(algorithm))
    for grad, want in zip(grads, (want_a, want_b), strict=True):
        assert relative_error(grad, float(torch.tensor(6e4).half()) * want) < BOUND[torch.float32]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_weight_that_lies_in_a_gradient_is_read_before_it_changes(backend, algorithm):
    cases = [factors(30, 40, 4, 5, seed=i) for i in range(2)]
    grads_A, grads_B = [torch.ones(4, 40) for _ in cases], [torch.ones(30, 4) for _ in cases]
    weight = grads_A[0].data[0, 0]
    add = ek.add_spectral_grad_ if algorithm == "spectral" else ek.add_hadamard_grad_
    options = {"backend": backend} | ({} if algorithm == "spectral" else {"algorithm": algorithm})
    As, Bs, pasts = ([case[i] for case in cases] for i in range(3))
    add(As, Bs, pasts, [1.0, 1.0], grads_A, grads_B, weight=weight, **options)
    for i, case in enumerate(cases):
        _, want_a, want_b = exact(*case, 1.0, name_of(algorithm))
        assert relative_error(grads_A[i].double() - 1, want_a) < BOUND[torch.float32]
        assert relative_error(grads_B[i].double() - 1, want_b) < BOUND[torch.float32]


def test_what_the_algorithms_are_handed():
    cpu, other = torch.device("cpu"), torch.device("meta")
    plain = torch.tensor(2.5)
    assert weight_on(cpu, plain) is plain, "the usual weight is read where it is"
    assert weight_on(cpu, True) == 1.0 and isinstance(weight_on(cpu, 3), float)
    assert weight_on(other, torch.tensor(7)) == 7.0 and isinstance(weight_on(other, torch.tensor(7)), float)
    assert weight_on(cpu, torch.tensor(2.5, requires_grad=True).bfloat16()).dtype == torch.float64
