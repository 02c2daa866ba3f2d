"""A penalty that is a number of fp32 comes out right whatever the sizes of what it is made of, and so do its gradients.

Powers of two on the operands change the exponents of a result and none of its digits: the references are float64.
"""

from __future__ import annotations

import math

import pytest
import torch

import ella_kernels as ek
from tests.kernels.cases import BOUND, exact, factors, relative_error

BACKENDS = ["torch", "triton"]
ALGORITHMS = ["gram", "stream", "dense", "spectral"]
SHAPES = [(40, 56, 3, 6), (33, 20, 8, 10)]
# Exponents of A, B, L and R; the penalty's is twice their sum.
EXPONENTS = [
    (40, -40, 0, 0),
    (0, 0, -40, 40),
    (40, 40, -40, -40),
    (-40, -40, 40, 40),
    (40, -40, 40, -40),
    (-60, 60, 60, -60),
    (100, -100, 0, 0),
    (-100, 100, 100, -100),
    (0, -60, 0, 0),
    (14, 14, 14, 14),
    (-14, -14, -14, -14),
]
# The Triton kernels divide nothing by powers of two: which exponents are safe is in docs/kernels.md. These are not.
BEYOND_TRITON = {
    "gram": [(-60, 60, 60, -60), (100, -100, 0, 0), (-100, 100, 100, -100), (40, -40, -40, 40)],
    "spectral": [(-60, 60, 60, -60), (-100, 100, 100, -100)],
}
# Exponents of roots of the energies.
ENERGIES = [-60, -70, -74, 40]
ENERGIES_BEYOND_TRITON = {"gram": [-70, -74]}


def name_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


def is_safe(backend, algorithm, exponents):
    return backend == "torch" or exponents not in BEYOND_TRITON.get(algorithm, [])


def options_of(algorithm, backend):
    return {"backend": backend} | ({} if algorithm == "spectral" else {"algorithm": algorithm})


def scaled(shape, exponents, energy=False, seed=0):
    """A layer in float32, each operand times its power of two."""
    a, b, past = factors(*shape, energy=energy, seed=seed, dtype=torch.float64)
    of_a, of_b, of_left, of_right = (2.0**e for e in exponents)
    both = (of_left * of_right) ** 2
    energies = [] if past.row_energy is None else [past.row_energy * both, past.col_energy * both]
    past = ek.LowRank(past.left * of_left, past.right * of_right, *energies)
    layer = (a * of_a).float(), (b * of_b).float(), ek.LowRank(*(None if t is None else t.float() for t in past))
    assert all(t.isfinite().all() and t.any() for t in (*layer[:2], *layer[2]) if t is not None)
    return layer


def added(layer, algorithm, backend, scaling=1.5, weight=1.0, **options):
    """Value and gradients of the in-place form."""
    a, b, past = layer
    grads = torch.zeros_like(a), torch.zeros_like(b)
    add = getattr(ek, f"add_{name_of(algorithm)}_grad_")
    options |= options_of(algorithm, backend)
    values = add([a], [b], [past], [scaling], [grads[0]], [grads[1]], weight=weight, **options)
    return values[0], *grads


def check(found, wanted, bound=BOUND[torch.float32]):
    """Where the wanted number is one of fp32, all of whose digits it has."""
    checked = 0
    for got, want in zip(found, wanted, strict=True):
        if 1e-35 < want.abs().max() < 1e38:
            assert relative_error(got, want) < bound
            checked += 1
    assert checked


# Without energies where those do not enter, or are no numbers of fp32.
CASES = [
    (backend, algorithm, energy, exponents)
    for backend in BACKENDS
    for algorithm in ALGORITHMS
    for energy in (False, True)
    for exponents in EXPONENTS
    if is_safe(backend, algorithm, exponents)
    and (not energy or (algorithm != "spectral" and abs(exponents[2] + exponents[3]) < 60))
]


@pytest.mark.parametrize("backend, algorithm, energy, exponents", CASES, ids=str)
def test_factors_of_any_size(backend, algorithm, energy, exponents):
    for shape in SHAPES:
        layer = scaled(shape, exponents, energy)
        check(added(layer, algorithm, backend), exact(*layer, 1.5, name_of(algorithm)))


@pytest.mark.parametrize("exponents", [(-40, -40, 70, 0), (50, 50, -90, 0), (-100, 80, 0, 20)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stored_past_of_any_size(backend, exponents):
    a, b, past = scaled(SHAPES[0], exponents)
    layer = a, b, past.left @ past.right
    check(added(layer, "dense", backend), exact(*layer, 1.5))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_by_autograd(backend, algorithm):
    odd = (40, -40, -40, 40)
    a, b, past = scaled(SHAPES[0], odd if is_safe(backend, algorithm, odd) else (40, -40, 40, -40))
    value = getattr(ek, f"{name_of(algorithm)}_penalty")(
        a.requires_grad_(), b.requires_grad_(), past, 1.5, **options_of(algorithm, backend)
    )
    found = value.detach(), *torch.autograd.grad(value, (a, b))
    check(found, exact(a, b, past, 1.5, name_of(algorithm)))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_all_sizes_in_one_call(backend, algorithm):
    chosen = [(0, 0, 0, 0), *(each for each in EXPONENTS if is_safe(backend, algorithm, each))]
    layers = [scaled(SHAPES[i % 2], exponents, seed=i) for i, exponents in enumerate(chosen)]
    As, Bs, pasts = ([layer[i] for layer in layers] for i in range(3))
    grads_A, grads_B = ([torch.zeros_like(t) for t in ts] for ts in (As, Bs))
    add = getattr(ek, f"add_{name_of(algorithm)}_grad_")
    scalings = [0.5 + i / 20 for i in range(len(layers))]
    values = add(As, Bs, pasts, scalings, grads_A, grads_B, weight=1.0, **options_of(algorithm, backend))
    for i, (layer, scaling) in enumerate(zip(layers, scalings, strict=True)):
        check((values[i], grads_A[i], grads_B[i]), exact(*layer, scaling, name_of(algorithm)))


@pytest.mark.parametrize("scaling, weight", [(2.0**90, 1.0), (2.0**-90, 2.0**90), (1.0, 1e38), (2.0**60, 1e-30)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scalings_and_weights_of_any_size(backend, algorithm, scaling, weight):
    """2s²·weight is no number of fp32, or the gradient without it is none."""
    power = round(math.log2(scaling))
    layer = scaled(SHAPES[0], (-power // 2, -power // 2 - 20 if weight > 1e30 else -power // 2, 0, 0))
    value, grad_a, grad_b = exact(*layer, scaling, name_of(algorithm))
    for given in (weight, torch.tensor(weight, dtype=torch.float64)):
        found = added(layer, algorithm, backend, scaling, given)
        check(found, (value, weight * grad_a, weight * grad_b))


@pytest.mark.parametrize("k", [0, 5])
@pytest.mark.parametrize(
    "backend, algorithm, exponent",
    [
        (backend, algorithm, exponent)
        for backend in BACKENDS
        for algorithm in ("gram", "stream", "dense")
        for exponent in ENERGIES
        if backend == "torch" or exponent not in ENERGIES_BEYOND_TRITON.get(algorithm, [])
    ],
)
def test_energies_of_any_size(backend, algorithm, k, exponent):
    """The sum of the energies has no inverse in fp32, or no square; the factors are as large as the past is small."""
    a, b, past = scaled(SHAPES[0], (-exponent, 0, 0, 0), energy=True)
    energies = past.row_energy.double() * 4.0**exponent, past.col_energy.double() * 4.0**exponent
    left, right = past.left[:, :k] * 2.0**exponent, past.right[:k]
    layer = a, b, ek.LowRank(left, right, *(t.float() for t in energies))
    check(added(layer, algorithm, backend), exact(*layer, 1.5))
    # Beside factors of the past that are far larger, they are nothing, and nothing worse.
    layer = a * 2.0**exponent, b, layer[2]._replace(left=past.left, right=past.right)
    check(added(layer, algorithm, backend), exact(*layer, 1.5))


@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_energies_far_larger_than_the_past_beside_them(backend, algorithm):
    a, b, past = scaled(SHAPES[0], (0, 0, 0, 0), energy=True)
    layer = a, b, past._replace(left=past.left * 2.0**-80)
    check(added(layer, algorithm, backend), exact(*layer, 1.5))


def test_the_reference_takes_energies_of_any_size():
    a, b, past = scaled(SHAPES[0], (0, 0, 0, 0), energy=True)
    tiny = past._replace(row_energy=past.row_energy * 2.0**-140, col_energy=past.col_energy * 2.0**-140)
    value = ek.reference.hadamard_penalty(a, b, tiny)
    assert relative_error(value, exact(a, b, tiny, 1.0)[0]) < BOUND[torch.float32]
    assert torch.isfinite(ek.reference.past_squared(tiny)).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_operands_of_odd_sizes_are_not_hidden(backend, algorithm):
    for bad in (float("nan"), float("inf")):
        a, b, past = scaled(SHAPES[0], (60, -60, 0, 0))
        a[1, 7] = bad
        assert not torch.isfinite(added((a, b, past), algorithm, backend)[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_stay_zeros(backend, algorithm):
    """A fresh adapter's B, beside odd sizes."""
    a, b, past = scaled(SHAPES[0], (60, 0, 0, -60))
    value, grad_a, grad_b = added((a, torch.zeros_like(b), past), algorithm, backend)
    assert value == 0 and not grad_a.any() and not grad_b.any()
    value, grad_a, grad_b = added((a, b, past), algorithm, backend, weight=0.0)
    assert value > 0 and not grad_a.any() and not grad_b.any()
