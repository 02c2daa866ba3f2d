"""Values and gradients of the torch backend against float64 autograd through the materialising reference."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella_kernels.torch_backend.batching import WORK_BYTES
from tests.kernels.cases import BOUND, SHAPES, Allocations, exact, factors, relative_error, vanishing_overlap

ALGORITHMS = ["gram", "stream", "dense", "auto"]
WIDE_SIZES = [(512, 512, 8, 8), (384, 512, 8, 40), (1024, 640, 16, 16), (768, 768, 4, 64)]
KINDS = ["random", "correlated", "tiny", "outliers", "disjoint"]


def run(a, b, past, scaling, name="hadamard", **options):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = getattr(ek, f"{name}_penalty")(a, b, past, scaling, **options)
    return value.detach(), *torch.autograd.grad(value, (a, b))


def check(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        assert relative_error(got, want) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", [False, True], ids=["exact", "energy"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_hadamard_matches_reference(shape, algorithm, energy, dtype):
    a, b, past = factors(*shape, dtype=dtype, energy=energy)
    found = run(a, b, past, 1.7, algorithm=algorithm)
    assert found[0].dtype == dtype and found[0].ndim == 0
    check(found, exact(a, b, past, 1.7), BOUND[dtype])


# In the second shape the outlier channels of factors and past miss each other, and gram's terms cancel 4e5-fold.
@pytest.mark.parametrize("shape", [(256, 384, 8, 8), (96, 130, 8, 8), (40, 56, 3, 5)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["gram", "stream"])
def test_hadamard_is_accurate_on_hard_data(algorithm, kind, shape):
    a, b, past = factors(*shape, kind=kind)
    check(run(a, b, past, 2.0, algorithm=algorithm), exact(a, b, past, 2.0), BOUND[torch.float32])


@pytest.mark.parametrize("algorithm", ["gram", "stream"])
def test_near_cancelling_overlap(algorithm):
    """Training that drives the overlap to zero makes the gram form cancel (docs/math.md, "Precision")."""
    a, b, past = vanishing_overlap()
    expected = exact(a, b, past, 1.0)
    check(run(a, b, past, 1.0, algorithm=algorithm), expected, BOUND[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_spectral_matches_reference(shape, dtype):
    a, b, past = factors(*shape, dtype=dtype)
    check(run(a, b, past, 0.3, "spectral"), exact(a, b, past, 0.3, "spectral"), BOUND[dtype])


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_dense_past_equals_its_factors(name):
    a, b, past = factors(48, 80, 4, 6, dtype=torch.float64)
    even = ek.truncate(past.left, past.right, 6)
    dense = past.left @ past.right
    check(run(a, b, dense, 1.3, name), exact(a, b, even, 1.3, name), 1e-10)
    check(exact(a, b, dense, 1.3, name), exact(a, b, even, 1.3, name), 1e-10)


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_closed_form_reference_is_the_autograd_gradient(name):
    a, b, past = factors(30, 44, 3, 5, dtype=torch.float64, energy=True)
    grads = getattr(ek.reference, f"{name}_grad")(a, b, past, 1.9)
    check(grads, exact(a, b, past, 1.9, name)[1:], 1e-12)


def test_spectral_is_the_projected_norm():
    """‖(WWᵀ)^¼ ΔW (WᵀW)^¼‖² by matrix functions equals the factor form: docs/math.md."""
    a, b, past = factors(12, 9, 3, 4, dtype=torch.float64)
    w = past.left @ past.right

    def quarter(m):
        values, vectors = torch.linalg.eigh(m)
        return vectors * values.clamp(min=0) ** 0.25 @ vectors.T

    expected = (quarter(w @ w.T) @ (b @ a) @ quarter(w.T @ w)).square().sum()
    found = ek.spectral_penalty(a, b, ek.truncate(past.left, past.right, 4))
    assert relative_error(found, expected) < 1e-6  # eigenvalues near zero carry sqrt(eps) into the fourth root


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_factors_are_computed_in_fp32(algorithm, dtype):
    a, b, past = factors(96, 64, 8, 8, dtype=torch.float32)
    a, b = (0.01 * a).to(dtype), (0.01 * b).to(dtype)
    value, grad_a, grad_b = run(a, b, past, 1.0, algorithm=algorithm)
    want, want_a, want_b = exact(a, b, past, 1.0)
    assert value.dtype == torch.float32 and grad_a.dtype == dtype
    assert relative_error(value, want) < BOUND[torch.float32]
    eps = torch.finfo(dtype).eps
    assert relative_error(grad_a, want_a) < eps and relative_error(grad_b, want_b) < eps


def test_fp16_gradients_do_not_underflow_under_a_large_weight():
    a, b, past = factors(64, 64, 4, 4)
    a, b = (1e-2 * a).half().requires_grad_(), (1e-2 * b).half().requires_grad_()
    past = ek.LowRank(1e-2 * past.left, 1e-2 * past.right)
    grad = torch.autograd.grad(1e8 * ek.hadamard_penalty(a, b, past), a)[0]
    want = 1e8 * exact(a, b, past, 1.0)[1]
    assert want.abs().max() / 1e8 < 6e-8, "the bare gradient must be below fp16's smallest number"
    assert relative_error(grad, want) < torch.finfo(torch.float16).eps


def test_one_cancelling_layer_in_a_group_is_delivered_once():
    """Layers done again in float64 and their neighbours of the same batch both end in the right gradients."""
    cases = [factors(96, 130, 8, 8, kind=kind) for kind in ("random", "outliers", "correlated")]
    As, Bs, pasts = ([c[i] for c in cases] for i in range(3))
    grads_A, grads_B = [torch.full_like(a, 1e-3) for a in As], [torch.full_like(b, 1e-3) for b in Bs]
    values = ek.add_hadamard_grad_(As, Bs, pasts, [1.0] * 3, grads_A, grads_B, weight=1.0, algorithm="gram")
    for i, case in enumerate(cases):
        found = values[i], grads_A[i].double() - 1e-3, grads_B[i].double() - 1e-3
        check(found, exact(*case, 1.0), BOUND[torch.float32])


def test_any_strides_are_read_in_place():
    a, b, past = factors(40, 56, 3, 5)
    expected = exact(a, b, past, 1.0)
    wide = torch.randn(7, 112)
    wide[1:7:2, ::2] = a
    past = ek.LowRank(past.left.T.contiguous().T, past.right.T.contiguous().T)
    check(run(wide[1:7:2, ::2], b.T.contiguous().T, past, 1.0), expected, BOUND[torch.float32])


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_grouped_mixes_shapes_ranks_dtypes_and_pasts(name):
    cases = [factors(*shape, seed=i) for i, shape in enumerate(SHAPES + SHAPES[:3])]
    cases[1] = tuple(factors(*SHAPES[1], seed=1, energy=True))
    cases[2] = (cases[2][0].bfloat16(), cases[2][1].bfloat16(), cases[2][2])
    cases.append((*cases[0][:2], None))
    if name == "hadamard":
        cases.append((*cases[3][:2], cases[3][2].left @ cases[3][2].right))
    As, Bs = ([c[i].detach().requires_grad_() for c in cases] for i in (0, 1))
    pasts, scalings = [c[2] for c in cases], [0.5 + i / 7 for i in range(len(cases))]
    values = getattr(ek, f"{name}_penalty_grouped")(As, Bs, pasts, scalings)
    weights = torch.linspace(1, 2, len(cases))
    grads = torch.autograd.grad((weights * values).sum(), [*As, *Bs])
    for i, (a, b, past) in enumerate(cases):
        if past is None:
            assert values[i] == 0 and not grads[i].any() and not grads[len(cases) + i].any()
            continue
        want = exact(a, b, past, scalings[i], name)
        assert relative_error(values[i], want[0]) < BOUND[torch.float32]
        bound = 8e-3 if a.dtype == torch.bfloat16 else BOUND[torch.float32]
        assert relative_error(grads[i], weights[i] * want[1]) < bound
        assert relative_error(grads[len(cases) + i], weights[i] * want[2]) < bound


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
def test_in_place_form_adds_to_existing_gradients(name, as_tensor):
    cases = [factors(*shape, seed=i) for i, shape in enumerate(SHAPES)]
    cases[4] = (cases[4][0].bfloat16(), cases[4][1].bfloat16(), cases[4][2])
    As, Bs, pasts = ([c[i] for c in cases] for i in range(3))
    grads_A, grads_B = [torch.full_like(a, 0.5) for a in As], [torch.full_like(b.T, -0.25).T for b in Bs]
    scalings = [2.0] * len(cases)
    weight = torch.tensor(30.0) if as_tensor else 30.0
    values = getattr(ek, f"add_{name}_grad_")(As, Bs, pasts, scalings, grads_A, grads_B, weight=weight)
    for i, (a, b, past) in enumerate(cases):
        value, grad_a, grad_b = exact(a, b, past, 2.0, name)
        assert relative_error(values[i], value) < BOUND[torch.float32]
        bound = 8e-3 if a.dtype == torch.bfloat16 else BOUND[torch.float32]
        assert relative_error(grads_A[i].double() - 0.5, 30 * grad_a) < bound
        assert relative_error(grads_B[i].double() + 0.25, 30 * grad_b) < bound


@pytest.mark.parametrize("out, in_, r, k", [(0, 5, 2, 3), (5, 0, 2, 3), (4, 5, 0, 3), (4, 5, 2, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_empty_operands_are_legal(name, out, in_, r, k):
    past = ek.LowRank(torch.randn(out, k), torch.randn(k, in_))
    value, grad_a, grad_b = run(torch.randn(r, in_), torch.randn(out, r), past, 1.0, name)
    assert value == 0 and grad_a.shape == (r, in_) and grad_b.shape == (out, r)
    assert not grad_a.any() and not grad_b.any()


def test_empty_group():
    assert ek.hadamard_penalty_grouped([], [], [], []).shape == (0,)
    assert ek.add_hadamard_grad_([], [], [], [], [], [], weight=1.0).shape == (0,)


def test_energy_only_past():
    a, b, past = factors(40, 56, 3, 5, dtype=torch.float64)
    bare = ek.truncate(past.left, past.right, 0)
    assert bare.left.shape == (40, 0)
    check(run(a, b, bare, 1.5), exact(a, b, bare, 1.5), 1e-12)


def test_zero_energies_add_nothing():
    a, b, past = factors(40, 56, 3, 5)
    zero = ek.LowRank(past.left, past.right, torch.zeros(40), torch.zeros(56))
    for algorithm in ("gram", "stream"):
        check(run(a, b, zero, 1.0, algorithm=algorithm), exact(a, b, past, 1.0), BOUND[torch.float32])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
def test_non_finite_factors_reach_the_value(algorithm, bad):
    a, b, past = factors(40, 56, 3, 5)
    a[1, 7] = bad
    assert not torch.isfinite(ek.hadamard_penalty(a, b, past, algorithm=algorithm))
    assert not torch.isfinite(ek.spectral_penalty(a, b, past))


@pytest.mark.parametrize("algorithm", ["gram", "stream"])
@pytest.mark.parametrize(
    "out, in_, r, k", [(512, 512, 8, 8), (384, 512, 8, 40), (1024, 640, 16, 16), (768, 768, 4, 64)]
)
def test_nothing_weight_sized_is_allocated_for_wide_layers(out, in_, r, k, algorithm):
    found = Allocations(adding(out, in_, r, k, algorithm))
    assert 0 < found.largest < 4 * out * in_
    assert found.peak < WORK_BYTES


@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
@pytest.mark.parametrize("out, in_, r, k, n", [(64, 64, 8, 8, 300), (384, 384, 8, 8, 24), (300, 100, 16, 20, 40)])
def test_work_memory_of_many_narrow_layers_is_bounded_in_bytes(out, in_, r, k, n, algorithm):
    found = Allocations(adding(out, in_, r, k, algorithm, n))
    assert 0 < found.peak < WORK_BYTES


def adding(out, in_, r, k, algorithm, n=6):
    """A call of the in-place form on ``n`` layers that exist before it."""
    cases = [factors(out, in_, r, k, seed=seed % 6, energy=seed % 6 == 1) for seed in range(6)]
    As, Bs, pasts = ([cases[i % 6][j] for i in range(n)] for j in range(3))
    if algorithm == "dense":
        pasts = [past.left @ past.right for past in pasts]
    grads = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
    return lambda: ek.add_hadamard_grad_(As, Bs, pasts, [1.0] * n, *grads, weight=1.0, algorithm=algorithm)


@pytest.mark.parametrize("energy", [False, True], ids=["exact", "energy"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
def test_batches_of_small_layers_match_the_reference(algorithm, dtype, energy):
    """Seventy layers are more than one batch in some of these; each has its own scaling and its own gradients."""
    n, wide = 70, torch.float64 if dtype == torch.float64 else torch.float32
    cases = [factors(48, 40, 4, 5, seed=i, dtype=wide, energy=energy) for i in range(n)]
    As, Bs = ([(0.1 * case[i]).to(dtype) for case in cases] for i in range(2))
    pasts = [case[2] for case in cases]
    if algorithm == "dense":
        pasts = [ek.reference.past_squared(past).sqrt() for past in pasts]
    scalings = [0.5 + i / 50 for i in range(n)]
    grads_A, grads_B = ([torch.zeros_like(t, dtype=wide) for t in ts] for ts in (As, Bs))
    values = ek.add_hadamard_grad_(As, Bs, pasts, scalings, grads_A, grads_B, weight=3.0, algorithm=algorithm)
    alone = ek.hadamard_penalty_grouped(As, Bs, pasts, scalings, algorithm=algorithm)
    for i in range(n):
        value, grad_a, grad_b = exact(As[i], Bs[i], pasts[i], scalings[i])
        check((values[i], alone[i], grads_A[i], grads_B[i]), (value, value, 3 * grad_a, 3 * grad_b), BOUND[wide])


def test_second_order_is_refused_by_name():
    a, b, past = factors(40, 56, 3, 5)
    a.requires_grad_()
    (grad,) = torch.autograd.grad(ek.hadamard_penalty(a, b, past), a, create_graph=True)
    with pytest.raises(RuntimeError, match="second-order"):
        grad.sum().backward()


def test_gradient_may_be_used_twice():
    a, b, past = factors(40, 56, 3, 5)
    a.requires_grad_()
    value = ek.hadamard_penalty(a, b, past)
    (first,) = torch.autograd.grad(value, a, retain_graph=True)
    (second,) = torch.autograd.grad(3 * value, a)
    assert torch.allclose(3 * first, second, rtol=1e-6, atol=0)
    assert relative_error(first, exact(a, b, past, 1.0)[1]) < BOUND[torch.float32]


def test_gradcheck():
    a, b, past = factors(7, 6, 2, 3, dtype=torch.float64, energy=True)
    for algorithm in ("gram", "stream"):
        assert torch.autograd.gradcheck(
            lambda a, b, algorithm=algorithm: ek.hadamard_penalty(a, b, past, 0.7, algorithm=algorithm),
            (a.requires_grad_(), b.requires_grad_()),
        )
