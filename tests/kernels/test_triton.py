"""The Triton kernels under the interpreter, on CPU tensors: the same code a GPU runs, against float64 references."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch

import ella_kernels as ek
from ella_kernels import checks, dispatch, ops
from ella_kernels.prepared import Prepared
from ella_kernels.triton_backend import gram, kernels, schedule
from tests.kernels.cases import (
    BOUND,
    SHAPES,
    Allocations,
    cast,
    exact,
    factors,
    relative_error,
    vanishing_overlap,
)

ALGORITHMS = ["gram", "stream", "dense", "spectral"]


def penalty_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


def options_of(algorithm):
    return {"backend": "triton"} | ({} if algorithm == "spectral" else {"algorithm": algorithm})


def run(a, b, past, scaling, algorithm):
    a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
    value = getattr(ek, f"{penalty_of(algorithm)}_penalty")(a, b, past, scaling, **options_of(algorithm))
    return value.detach(), *torch.autograd.grad(value, (a, b))


def add_(As, Bs, pasts, scalings, grads_A, grads_B, algorithm, weight=1.0):
    add = getattr(ek, f"add_{penalty_of(algorithm)}_grad_")
    return add(As, Bs, pasts, scalings, grads_A, grads_B, weight=weight, **options_of(algorithm))


def check(found, expected, bound):
    for got, want in zip(found, expected, strict=True):
        assert relative_error(got, want) < bound


def unzip(cases):
    return ([case[i] for case in cases] for i in range(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("energy", [False, True], ids=["exact", "energy"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_matches_reference(algorithm, shape, energy, dtype):
    a, b, past = factors(*shape, dtype=dtype, energy=energy)
    found = run(a, b, past, 1.7, algorithm)
    assert found[0].dtype == dtype and found[0].ndim == 0
    check(found, exact(a, b, past, 1.7, penalty_of(algorithm)), BOUND[dtype])


@pytest.mark.parametrize("kind", ["correlated", "tiny", "outliers", "disjoint"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_is_accurate_on_hard_data(algorithm, kind):
    a, b, past = factors(256, 384, 8, 8, kind=kind)
    check(run(a, b, past, 2.0, algorithm), exact(a, b, past, 2.0, penalty_of(algorithm)), BOUND[torch.float32])


@pytest.mark.parametrize("kind", ["correlated", "tiny", "outliers", "disjoint", "vanishing"])
@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
def test_ieee_is_exact_to_fp32_even_where_terms_cancel(algorithm, kind):
    """Outlier channels that miss each other make gram cancel 4e5-fold, a vanishing overlap a thousandfold."""
    a, b, past = vanishing_overlap() if kind == "vanishing" else factors(96, 130, 8, 8, kind=kind)
    expected = exact(a, b, past, 2.0)
    if algorithm == "dense":
        past = (past.left.double() @ past.right.double()).float()
        expected = exact(a, b, past, 2.0)
    grads = torch.zeros_like(a), torch.zeros_like(b)
    options = options_of(algorithm) | {"precision": "ieee"}
    value = ek.add_hadamard_grad_([a], [b], [past], [2.0], [grads[0]], [grads[1]], weight=1.0, **options)
    check((value[0], *grads), expected, BOUND[torch.float32])


@pytest.mark.parametrize("r, k", [(8, 8), (5, 20)], ids=str)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_products_written_out_are_near_fp32(algorithm, r, k, monkeypatch):
    """What "auto" is on tensor cores, on ragged tiles and energies; hard data is in test_precision.py."""
    from ella_kernels.triton_backend import launch, spectral

    for module in (launch, spectral):
        monkeypatch.setattr(module, "dot_precision", lambda *_: "tf32x3")
    a, b, past = factors(75, 53, r, k, seed=2, energy=algorithm != "spectral" and k == 20)
    # Three bf16 products leave out 2⁻¹⁶ of Σ|L||R|, three tf32 ones 2⁻²⁰.
    bound = 1e-4 if algorithm == "stream" else 1e-5
    check(run(a, b, past, 0.5, algorithm), exact(a, b, past, 0.5, name=penalty_of(algorithm)), bound)


@pytest.mark.parametrize("r, k", [(1, 40), (20, 2), (66, 1), (5, 24)])
def test_gram_takes_any_rank(r, k):
    a, b, past = factors(9, 18, r, k, dtype=torch.float64, energy=k > 1)
    check(run(a, b, past, 1.0, "gram"), exact(a, b, past, 1.0), BOUND[torch.float64])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_operands_are_computed_in_fp32(algorithm, dtype):
    a, b, past = factors(48, 64, 8, 8)
    a, b, past = (0.01 * a).to(dtype), (0.01 * b).to(dtype), cast(past, dtype)
    value, grad_a, grad_b = run(a, b, past, 1.0, algorithm)
    want, want_a, want_b = exact(a, b, past, 1.0, penalty_of(algorithm))
    assert value.dtype == torch.float32 and grad_a.dtype == dtype
    assert relative_error(value, want) < BOUND[torch.float32]
    eps = torch.finfo(dtype).eps
    assert relative_error(grad_a, want_a) < eps and relative_error(grad_b, want_b) < eps


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_half_factors_of_a_float64_past(algorithm):
    a, b, past = factors(24, 20, 3, 5, energy=True)
    a, b, past = a.bfloat16(), b.half(), cast(past, torch.float64)
    value, *_ = run(a, b, past, 1.0, algorithm)
    assert value.dtype == torch.float64
    check([value], exact(a, b, past, 1.0, penalty_of(algorithm))[:1], BOUND[torch.float64])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_any_strides_are_read_in_place(algorithm):
    a, b, past = factors(40, 56, 3, 5, energy=algorithm != "spectral")
    expected = exact(a, b, past, 1.0, penalty_of(algorithm))
    wide = torch.randn(7, 112)
    wide[1:7:2, ::2] = a
    a, b = wide[1:7:2, ::2], b.T.contiguous().T
    transposed = ek.LowRank(past.left.T.contiguous().T, past.right.T.contiguous().T, *past[2:])
    if past.row_energy is not None:
        spread = torch.randn(40, 3)
        spread[:, 1] = past.row_energy
        transposed = transposed._replace(row_energy=spread[:, 1])
    grad_a, grad_b = torch.zeros(112, 7)[::2, 1:7:2].T, torch.zeros(3, 40).T
    value = add_([a], [b], [transposed], [1.0], [grad_a], [grad_b], algorithm)
    check((value[0], grad_a, grad_b), expected, BOUND[torch.float32])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_expanded_factor_has_stride_zero(algorithm):
    a, _, past = factors(40, 56, 3, 5, dtype=torch.float64)
    b = torch.randn(1, 3, dtype=torch.float64).expand(40, 3)
    check(run(a, b, past, 1.0, algorithm), exact(a, b, past, 1.0, penalty_of(algorithm)), BOUND[torch.float64])


def mixed(algorithm):
    cases = [factors(*shape, seed=i) for i, shape in enumerate(SHAPES[:6] + SHAPES[:2])]
    cases[1] = tuple(factors(*SHAPES[1], seed=1, energy=True))
    cases[2] = (cases[2][0].bfloat16(), cases[2][1].bfloat16(), cases[2][2])
    # Factors and pasts of different dtypes: the sides of a layer are launched apart.
    cases[3] = ((0.01 * cases[3][0]).half(), 0.01 * cases[3][1], cases[3][2]._replace(left=cases[3][2].left.bfloat16()))
    cases.append((*cases[0][:2], None))
    cases.append((*cases[0][:2], ek.LowRank(torch.zeros(40, 0), torch.zeros(0, 56))))
    if algorithm == "dense":
        cases.append((*cases[2][:2], cases[2][2].left @ cases[2][2].right))
    return cases


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_grouped_mixes_shapes_ranks_dtypes_and_pasts(algorithm):
    cases = mixed(algorithm)
    name = penalty_of(algorithm)
    As, Bs = ([c[i].detach().requires_grad_() for c in cases] for i in (0, 1))
    pasts, scalings = [c[2] for c in cases], [0.5 + i / 7 for i in range(len(cases))]
    values = getattr(ek, f"{name}_penalty_grouped")(As, Bs, pasts, scalings, **options_of(algorithm))
    weights = torch.linspace(1, 2, len(cases))
    grads = torch.autograd.grad((weights * values).sum(), [*As, *Bs])
    for i, (a, b, past) in enumerate(cases):
        if past is None or (isinstance(past, ek.LowRank) and past.left.shape[1] == 0):
            assert values[i] == 0 and not grads[i].any() and not grads[len(cases) + i].any()
            continue
        want = exact(a, b, past, scalings[i], name)
        assert relative_error(values[i], want[0]) < BOUND[torch.float32]
        for grad, factor, wanted in ((grads[i], a, want[1]), (grads[len(cases) + i], b, want[2])):
            bound = BOUND[torch.float32] if factor.dtype == torch.float32 else torch.finfo(factor.dtype).eps
            assert relative_error(grad, weights[i] * wanted) < bound


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_in_place_form_adds_to_existing_gradients(algorithm, as_tensor, grad_dtype):
    cases = [factors(*shape, seed=i) for i, shape in enumerate(SHAPES[:6])]
    As, Bs, pasts = unzip(cases)
    wanted = [exact(a, b, past, 2.0, penalty_of(algorithm)) for a, b, past in cases]
    # Weighted gradients near 1, so that their sum with the old ones is within fp16.
    grads_A = [torch.full_like(a, 0.5).to(grad_dtype) for a in As]
    grads_B = [torch.full_like(b.T, -0.25).to(grad_dtype).T for b in Bs]
    weight = torch.tensor(1e-5, dtype=torch.float64) if as_tensor else 1e-5
    values = add_(As, Bs, pasts, [2.0] * 6, grads_A, grads_B, algorithm, weight)
    bound = BOUND[torch.float32] if grad_dtype == torch.float32 else torch.finfo(grad_dtype).eps
    for i, (value, grad_a, grad_b) in enumerate(wanted):
        assert relative_error(values[i], value) < BOUND[torch.float32]
        assert relative_error(grads_A[i], 0.5 + 1e-5 * grad_a) < bound
        assert relative_error(grads_B[i], -0.25 + 1e-5 * grad_b) < bound


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_layer_listed_twice_gets_both_gradients(algorithm):
    a, b, past = factors(40, 56, 3, 5)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    add_([a, a], [b, b], [past, past], [1.0, 2.0], [grad_a, grad_a], [grad_b, grad_b], algorithm)
    _, want_a, want_b = exact(a, b, past, 5**0.5, penalty_of(algorithm))
    check((grad_a, grad_b), (want_a, want_b), BOUND[torch.float32])


@pytest.mark.parametrize("out, in_, r, k", [(0, 5, 2, 3), (5, 0, 2, 3), (4, 5, 0, 3), (4, 5, 2, 0), (0, 0, 0, 0)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_empty_operands_are_legal(algorithm, out, in_, r, k):
    past = ek.LowRank(torch.randn(out, k), torch.randn(k, in_))
    value, grad_a, grad_b = run(torch.randn(r, in_), torch.randn(out, r), past, 1.0, algorithm)
    assert value == 0 and grad_a.shape == (r, in_) and grad_b.shape == (out, r)
    assert not grad_a.any() and not grad_b.any()


@pytest.mark.parametrize("algorithm", [a for a in ALGORITHMS if a in ("gram", "stream")])
def test_energy_only_and_zero_energies(algorithm):
    a, b, past = factors(40, 56, 3, 5, dtype=torch.float64)
    bare = ek.truncate(past.left, past.right, 0)
    check(run(a, b, bare, 1.5, algorithm), exact(a, b, bare, 1.5), BOUND[torch.float64])
    zero = past._replace(row_energy=torch.zeros(40).double(), col_energy=torch.zeros(56).double())
    check(run(a, b, zero, 1.5, algorithm), exact(a, b, past, 1.5), BOUND[torch.float64])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_non_finite_factors_reach_the_value(algorithm, bad):
    a, b, past = factors(40, 56, 3, 5)
    a[1, 7] = bad
    assert not torch.isfinite(run(a, b, past, 1.0, algorithm)[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_bitwise_the_same_again_and_in_any_order(algorithm):
    cases = [factors(130 + 7 * i, 90 + 40 * i, 4, 6, seed=i, energy=algorithm != "spectral") for i in range(4)]

    def results(order):
        As, Bs, pasts = unzip([cases[i] for i in order])
        grads_A, grads_B = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
        values = add_(As, Bs, pasts, [1.0 + i for i in order], grads_A, grads_B, algorithm)
        return {i: (values[j], grads_A[j], grads_B[j]) for j, i in enumerate(order)}

    first = results([0, 1, 2, 3])
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        again = results(order)
        for i, found in first.items():
            assert all(torch.equal(x, y) for x, y in zip(found, again[i], strict=True))


def count_launches(monkeypatch, module):
    """Names of the kernels of ``module`` in the order of their launches from now on."""
    launched = []

    class Counting:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.append(self.name)
            return self.kernel[grid]

    for name, kernel in kernels().items():
        if hasattr(module, name):
            monkeypatch.setattr(module, name, Counting(name, kernel))
    return launched


def test_a_model_is_three_launches(monkeypatch):
    launched = count_launches(monkeypatch, gram)
    As, Bs, pasts = unzip([factors(40 + 8 * i, 64 - 5 * i, 4, 6, seed=i, energy=True) for i in range(5)])
    grads = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
    add_(As, Bs, pasts, [1.0] * 5, *grads, "gram", torch.tensor(2.0))
    assert launched == ["gram_fwd_kernel_blocks", "gram_fwd_kernel_reduce", "gram_bwd_kernel_factors"]


def test_gram_work_memory_is_bounded_by_batches(monkeypatch):
    monkeypatch.setattr(schedule, "WORK_BYTES", 40_000)
    launched = count_launches(monkeypatch, gram)
    cases = [factors(300, 200 + 10 * i, 8, 8, seed=i) for i in range(5)]
    As, Bs, pasts = unzip(cases)
    grads_A, grads_B = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
    values = add_(As, Bs, pasts, [1.0] * 5, grads_A, grads_B, "gram")
    assert 3 < len(launched) <= 9
    for i, (a, b, past) in enumerate(cases):
        check((values[i], grads_A[i], grads_B[i]), exact(a, b, past, 1.0), BOUND[torch.float32])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_nothing_weight_sized_is_allocated(algorithm):
    a, b, past = factors(384, 512, 8, 8)
    dense = past.left @ past.right if algorithm == "dense" else past
    grads = [torch.zeros_like(a)], [torch.zeros_like(b)]
    found = Allocations(lambda: add_([a], [b], [dense], [1.0], *grads, algorithm))
    assert 0 < found.largest < a.element_size() * a.shape[1] * b.shape[0]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradcheck_of_the_kernels(algorithm):
    a, b, past = factors(4, 3, 2, 3, dtype=torch.float64, energy=algorithm != "spectral")
    penalty = getattr(ek, f"{penalty_of(algorithm)}_penalty")
    assert torch.autograd.gradcheck(
        lambda a, b: penalty(a, b, past, 0.7, **options_of(algorithm)), (a.requires_grad_(), b.requires_grad_())
    )


def test_value_without_gradients(monkeypatch):
    a, b, past = factors(40, 56, 3, 5)
    with torch.no_grad():
        value = ek.hadamard_penalty(a, b, past, 2.0, algorithm="gram", backend="triton")
    assert relative_error(value, exact(a, b, past, 2.0)[0]) < BOUND[torch.float32]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_opcheck(algorithm):
    cases = [factors(24, 20, 3, 5, seed=1), factors(17, 33, 4, 6, seed=2), factors(24, 20, 3, 5, seed=3)]
    As, Bs, pasts = unzip(cases)
    for t in (*As, *Bs):
        t.requires_grad_()
    operands = ops._lists(checks.checked_layers(As, Bs, pasts, [1.0] * 3, algorithm))
    torch.library.opcheck(ops.penalty, (*operands, True, "triton", "auto"))
    grads = [torch.zeros_like(t) for t in As], [torch.zeros_like(t) for t in Bs]
    operands = ops._lists(
        checks.checked_layers([a.detach() for a in As], [b.detach() for b in Bs], pasts, [1.0] * 3, algorithm)
    )
    torch.library.opcheck(ops.add_penalty_grad_, (*operands, *grads, None, 2.0, "triton", "auto"))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_full_graph_compilation(algorithm):
    a, b, past = factors(24, 20, 3, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(a, b):
        name = penalty_of(algorithm)
        return 3 * getattr(ek, f"{name}_penalty")(a * 2, b, past, 0.5, **options_of(algorithm))

    value, grad_a, grad_b = exact(2 * a, b, past, 0.5, penalty_of(algorithm))
    found = loss(a.requires_grad_(), b.requires_grad_())
    found.backward()
    check((found.detach(), a.grad, b.grad), (3 * value, 6 * grad_a, 3 * grad_b), BOUND[torch.float32])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_agrees_with_the_torch_backend_on_random_groups(algorithm):
    rng = random.Random(0)
    sizes = [(rng.randint(1, 90), rng.randint(1, 90), rng.randint(1, 9), rng.randint(1, 12)) for _ in range(12)]
    As, Bs, pasts = unzip([factors(*s, seed=i, dtype=torch.float64, energy=i % 2 == 0) for i, s in enumerate(sizes)])
    penalty = getattr(ek, f"{penalty_of(algorithm)}_penalty_grouped")
    found = penalty(As, Bs, pasts, [1.0] * 12, **options_of(algorithm))
    expected = penalty(As, Bs, pasts, [1.0] * 12, **options_of(algorithm) | {"backend": "torch"})
    check(found, expected, BOUND[torch.float64])


def test_ranks_beyond_the_kernels_are_refused_or_fall_back():
    a, b, past = factors(8, 9, 64, 64)
    with pytest.raises(ValueError, match=r"layer 0: the Triton gram kernel takes up to .* use backend='auto'"):
        ek.hadamard_penalty(a, b, past, algorithm="gram", backend="triton")
    # What "auto" resolves to on a GPU: kernels where there are any, torch for the rest, in one call.
    small = factors(40, 56, 3, 5)
    operands = ops._lists(checks.checked_layers([a, small[0]], [b, small[1]], [past, small[2]], [1.0, 1.0], "gram"))
    dispatch.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="computing it with torch"):
        values, grads_A, _ = ops.penalty(*operands, True, "auto", "auto")
    for i, case in enumerate(((a, b, past), small)):
        value, grad_a, _ = exact(*case, 1.0)
        check((values[i], grads_A[i]), (value, grad_a), BOUND[torch.float32])


def test_a_weight_on_another_device_is_read_there():
    given = []

    class Launches:
        def launch(self, weight, values, grad_base):
            given.append(weight)

    launches = [(Launches(), 0)]
    device = torch.device("meta")
    Prepared(1, torch.float32, device, False, launches, lambda like: nullcontext(), {}, []).run(torch.tensor(2.5))
    assert given == [2.5] and isinstance(given[0], float)


def test_gpu_tensors_are_refused_under_the_interpreter():
    from ella_kernels.triton_backend.launch import check_device

    class OnGpu:
        device = torch.device("cuda", 0)

    with pytest.raises(ValueError, match="cannot run on device 'cuda:0' under TRITON_INTERPRET=1"):
        check_device(OnGpu)


@pytest.mark.parametrize("r, k", [(65, 5), (3, 70), (130, 33)])
def test_stream_walks_blocks_of_components(r, k):
    a, b, past = factors(9, 18, r, k, dtype=torch.float64)
    check(run(a, b, past, 1.0, "stream"), exact(a, b, past, 1.0), BOUND[torch.float64])
    dense = past.left @ past.right
    check(run(a, b, dense.T.contiguous().T, 1.0, "dense"), exact(a, b, past, 1.0), BOUND[torch.float64])
