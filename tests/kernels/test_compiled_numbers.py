"""``torch.compile(fullgraph=True)`` with numbers that change from step to step: right, and compiled twice at most."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import ella_kernels as ek
from tests.kernels.cases import BOUND, exact, factors, relative_error

# More than torch compiles one function for; none is special to it, as 0 and 1 are.
STEPS = [0.25 + 0.5 * i for i in range(12)]
ALGORITHMS = ["gram", "stream", "spectral"]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def name_of(algorithm):
    return "spectral" if algorithm == "spectral" else "hadamard"


def options_of(algorithm):
    return {} if algorithm == "spectral" else {"algorithm": algorithm}


def cases(dtype=torch.float32):
    return [factors(24, 20, 3, 5, seed=i, dtype=dtype) for i in range(2)]


def check(found, wanted, bound):
    for got, want in zip(found, wanted, strict=True):
        assert relative_error(got, want) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_scaling_and_lambda_that_change(algorithm, dtype):
    (a, b, past), _ = cases(dtype)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss(a, b, scaling, ella_lambda):
        return ella_lambda * getattr(ek, f"{name_of(algorithm)}_penalty")(a, b, past, scaling, **options_of(algorithm))

    a.requires_grad_(), b.requires_grad_()
    for step in STEPS:
        value = loss(a, b, step, 10 * step)
        found = value.detach(), *torch.autograd.grad(value, (a, b))
        wanted = [10 * step * want for want in exact(a, b, past, step, name_of(algorithm))]
        assert value.dtype == dtype
        check(found, wanted, BOUND[dtype])
    assert counter.frame_count <= 3


def test_scalings_of_a_group_of_which_one_changes():
    counter = CompileCounterWithBackend("aot_eager")
    layers = cases()
    As, Bs, pasts = ([layer[i] for layer in layers] for i in range(3))

    @torch.compile(fullgraph=True, backend=counter)
    def values(scaling):
        return ek.hadamard_penalty_grouped(As, Bs, pasts, [2.0, scaling])

    for step in (1, 2, *STEPS, 3):
        wanted = [exact(*layer, s)[0] for layer, s in zip(layers, (2.0, step), strict=True)]
        check(values(step), wanted, BOUND[torch.float32])
    # Integers, and then floats too.
    assert counter.frame_count <= 5


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("what", ["weight", "scaling", "both"])
@pytest.mark.parametrize("name", ["hadamard", "spectral"])
def test_the_in_place_form(name, what, backend):
    counter = CompileCounterWithBackend(backend)
    layers = cases()
    As, Bs, pasts = ([layer[i] for layer in layers] for i in range(3))

    @torch.compile(fullgraph=True, backend=counter)
    def seed(grads_A, grads_B, scaling, weight):
        return getattr(ek, f"add_{name}_grad_")(As, Bs, pasts, [scaling, 2.0], grads_A, grads_B, weight=weight)

    for step in STEPS:
        scaling, weight = (step if what != "weight" else 0.5), (10 * step if what != "scaling" else 3.0)
        grads_A = [torch.full_like(As[0], 0.5), torch.full_like(As[1], 0.5).bfloat16()]
        grads_B = [torch.full_like(b, -0.25) for b in Bs]
        values = seed(grads_A, grads_B, scaling, weight)
        for i, (layer, s) in enumerate(zip(layers, (scaling, 2.0), strict=True)):
            value, grad_a, grad_b = exact(*layer, s, name)
            assert relative_error(values[i], value) < BOUND[torch.float32]
            bound = 8e-3 if i else BOUND[torch.float32]
            assert relative_error(grads_A[i].double() - 0.5, weight * grad_a) < bound
            assert relative_error(grads_B[i].double() + 0.25, weight * grad_b) < BOUND[torch.float32]
    assert counter.frame_count <= 3


def test_a_number_that_never_changes_stays_in_the_op():
    """Its gradients are added by the kernels then, not by operators of the graph."""
    (a, b, past), _ = cases()
    graphs = []
    seed = torch.compile(
        lambda grad_a, grad_b: ek.add_hadamard_grad_([a], [b], [past], [0.5], [grad_a], [grad_b], weight=2.0),
        fullgraph=True,
        backend=lambda graph, _: graphs.append(graph) or graph,
    )
    seed(torch.zeros_like(a), torch.zeros_like(b))
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert any("add_penalty_grad_" in name for name in called) and not any("foreach" in name for name in called)


def test_bad_numbers_are_named_while_compiling():
    (a, b, past), _ = cases()
    loss = torch.compile(lambda scaling: ek.hadamard_penalty(a, b, past, scaling), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="scaling must be a number, found str"):
        loss("x")
