"""The caller's autocast changes nothing: every call switches it off for itself, and leaves it on for the caller."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from tests.kernels.cases import BOUND, exact, factors, relative_error

ALGORITHMS = ["gram", "stream", "dense", "spectral"]
# A past that is a matrix, one that is cut down, and layers of two shapes in one call.
SHAPES = [(30, 40, 4, 5), (30, 40, 4, 5), (24, 24, 3, 6)]


def penalty_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


def layers(algorithm, backend):
    cases = [factors(*shape, seed=i, energy=i == 1 and algorithm != "spectral") for i, shape in enumerate(SHAPES)]
    As, Bs, pasts = ([case[i] for case in cases] for i in range(3))
    options = {"backend": backend} | ({} if algorithm == "spectral" else {"algorithm": algorithm})
    return As, Bs, pasts, [0.5, 1.0, 2.0], options


def check(values, grads, operands, name):
    As, Bs, pasts, scalings = operands
    for i, case in enumerate(zip(As, Bs, pasts, scalings, strict=True)):
        wanted = exact(*case, name)
        for found, want in zip((values[i], grads[i], grads[len(As) + i]), wanted, strict=True):
            assert found.dtype == torch.float32 and relative_error(found, want) < BOUND[torch.float32]


everywhere = pytest.mark.parametrize("backend", ["torch", "triton"])
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@both_dtypes
@every_algorithm
@everywhere
def test_value_and_gradient(backend, algorithm, dtype):
    *operands, options = layers(algorithm, backend)
    for t in (*operands[0], *operands[1]):
        t.requires_grad_()
    with torch.autocast("cpu", dtype):
        values = getattr(ek, f"{penalty_of(algorithm)}_penalty_grouped")(*operands, **options)
        grads = torch.autograd.grad(values.sum(), [*operands[0], *operands[1]])
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype, "the caller's own products stay his"
    check(values.detach(), grads, operands, penalty_of(algorithm))


@every_algorithm
@everywhere
def test_value_only(backend, algorithm):
    *operands, options = layers(algorithm, backend)
    with torch.autocast("cpu", torch.bfloat16):
        values = getattr(ek, f"{penalty_of(algorithm)}_penalty_grouped")(*operands, **options)
    for value, *case in zip(values, *operands, strict=True):
        assert relative_error(value, exact(*case, penalty_of(algorithm))[0]) < BOUND[torch.float32]


@every_algorithm
@everywhere
def test_in_place(backend, algorithm):
    """The first call is checked and prepared inside autocast, the second only run."""
    *operands, options = layers(algorithm, backend)
    for _ in range(2):
        grads = [torch.zeros_like(t) for t in operands[0]], [torch.zeros_like(t) for t in operands[1]]
        with torch.autocast("cpu", torch.bfloat16):
            add = getattr(ek, f"add_{penalty_of(algorithm)}_grad_")
            values = add(*operands, *grads, weight=torch.tensor(1.0), **options)
        check(values, [*grads[0], *grads[1]], operands, penalty_of(algorithm))


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_a_dense_past(name):
    a, b, past = factors(24, 20, 3, 5)
    dense = past.left @ past.right
    with torch.autocast("cpu", torch.bfloat16):
        value = getattr(ek, f"{name}_penalty")(a, b, dense, 0.5)
    assert relative_error(value, exact(a, b, dense, 0.5, name)[0]) < BOUND[torch.float32]


def test_truncation_and_reference():
    a, b, past = factors(24, 20, 3, 5)
    plain = ek.truncate(past.left, past.right, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(torch.equal(x, y) for x, y in zip(plain, ek.truncate(past.left, past.right, 2), strict=True))
        found = [getattr(ek.reference, f"{name}_penalty")(a, b, plain, 0.5) for name in ("hadamard", "spectral")]
        found += [*ek.reference.hadamard_grad(a, b, plain, 0.5), *ek.reference.spectral_grad(a, b, plain, 0.5)]
    hadamard, spectral = exact(a, b, plain, 0.5), exact(a, b, plain, 0.5, "spectral")
    for value, want in zip(found, (hadamard[0], spectral[0], *hadamard[1:], *spectral[1:]), strict=True):
        assert relative_error(value, want) < BOUND[torch.float32]


def test_compiled():
    a, b, past = factors(24, 20, 3, 5)
    loss = torch.compile(lambda a, b: ek.spectral_penalty(a, b, past, 0.5), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(a.requires_grad_(), b.requires_grad_())
    found = value.detach(), *torch.autograd.grad(value, (a, b))
    for got, want in zip(found, exact(a, b, past, 0.5, "spectral"), strict=True):
        assert relative_error(got, want) < BOUND[torch.float32]
