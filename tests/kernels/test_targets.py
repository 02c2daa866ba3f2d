"""In-place calls are all or nothing: what cannot be added to is refused before anything is."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella_kernels import functional, targets
from tests.kernels.cases import BOUND, exact, factors, relative_error

OUT, IN, R, K, N = 9, 12, 3, 4, 2


@pytest.fixture(autouse=True)
def forgotten():
    functional._MEMORY.clear()


class Group:
    def __init__(self, out=OUT, in_=IN, r=R):
        cases = [factors(out, in_, r, K, seed=i, energy=i == 0) for i in range(N)]
        self.As, self.Bs, self.pasts = ([case[i] for case in cases] for i in range(3))
        self.grads_A, self.grads_B = ([torch.zeros_like(t) for t in ts] for ts in (self.As, self.Bs))

    def add(self, backend, name="hadamard"):
        operands = self.As, self.Bs, self.pasts, [1.0] * N, self.grads_A, self.grads_B
        return getattr(ek, f"add_{name}_grad_")(*operands, weight=1.0, backend=backend)

    def check(self, found_A=None, found_B=None):
        found = zip(found_A or self.grads_A, found_B or self.grads_B, strict=True)
        for (grad_a, grad_b), *case in zip(found, self.As, self.Bs, self.pasts, strict=True):
            _, want_a, want_b = exact(*case, 1.0)
            assert relative_error(grad_a, want_a) < BOUND[torch.float32]
            assert relative_error(grad_b, want_b) < BOUND[torch.float32]


def expanded(group):
    group.grads_A[1] = torch.zeros(1, 1).expand(R, IN)


def one_row(group):
    group.grads_A[1] = torch.zeros(1, IN).expand(R, IN)


def sliding(group):
    group.grads_B[1] = torch.zeros(OUT + R).as_strided((OUT, R), (1, 1))


def meeting(group):
    # Addresses 3i + 2j: (0, 0, 2, 3) meet at 6.
    group.grads_B[1] = torch.zeros(60).as_strided((OUT, R), (2, 4))


def negated(group):
    group.grads_B[1] = torch._neg_view(torch.zeros(OUT, R))


def inference(group):
    with torch.inference_mode():
        group.grads_A[1] = torch.zeros(R, IN)


def another_layers(group):
    group.grads_A[1] = group.grads_A[0]


def overlapping(group):
    memory = torch.zeros(R + 1, IN)
    group.grads_A = [memory[:R], memory[1:]]


def transposed(group):
    group.__init__(5, 5, 5)
    group.grads_A[1] = group.grads_A[0].T


def both_factors(group):
    group.__init__(5, 5, 5)
    group.grads_B[1] = group.grads_A[1]


def other_dtype(group):
    memory = torch.zeros(R, IN)
    group.grads_A = [memory, memory.view(torch.bfloat16)[:, IN:]]


def the_factor(group):
    group.grads_B[1] = group.Bs[1]


def part_of_the_past(group):
    memory = torch.randn(OUT, K + R)
    group.pasts[0] = ek.LowRank(memory[:, :K], group.pasts[1].right)
    group.grads_B[1] = memory[:, 2 : 2 + R]


def energies(group):
    memory = torch.rand(OUT * R)
    group.pasts[0] = group.pasts[0]._replace(row_energy=memory[:OUT])
    group.grads_B[1] = memory.view(OUT, R)


REFUSED = [
    (expanded, r"grads_A\[1\] must have an element of memory for each of its own, found strides \(0, 0\)"),
    (one_row, r"grads_A\[1\] must have an element of memory for each of its own, found strides \(0, 1\)"),
    (sliding, r"grads_B\[1\] must have an element of memory for each"),
    (meeting, r"grads_B\[1\] must have an element of memory for each"),
    (negated, r"grads_B\[1\] must not be a negated view"),
    (inference, r"grads_A\[1\] must not be an inference tensor"),
    (another_layers, r"grads_A\[0\] must have memory of its own, found some that grads_A\[1\] has too"),
    (overlapping, r"grads_A\[0\] must have memory of its own, found some that grads_A\[1\] has too"),
    (transposed, r"grads_A\[0\] must have memory of its own, found some that grads_A\[1\] has too"),
    (both_factors, r"grads_A\[1\] must have memory of its own, found some that grads_B\[1\] has too"),
    (other_dtype, r"grads_A\[0\] must have memory of its own, found some that grads_A\[1\] has too"),
    (the_factor, r"grads_B\[1\] must have memory of its own, found some that lora_Bs\[1\] has too"),
    (part_of_the_past, r"grads_B\[1\] must have memory of its own, found some that pasts\[0\] has too"),
    (energies, r"grads_B\[1\] must have memory of its own, found some that pasts\[0\] has too"),
]
BACKENDS = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.mark.parametrize("spoil, message", REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
@BACKENDS
def test_a_refused_call_adds_nothing(backend, spoil, message):
    group = Group()
    spoil(group)
    before = [g.clone() for g in (*group.grads_A, *group.grads_B)]
    for name in ("hadamard", "spectral"):
        with pytest.raises(ValueError, match=message):
            group.add(backend, name)
    assert all(torch.equal(x, y) for x, y in zip(before, (*group.grads_A, *group.grads_B), strict=True))


@BACKENDS
def test_a_gradient_that_moved_onto_what_is_read_is_noticed(backend):
    """The pattern of a repeated call, at the place of its own factors, and half over it."""
    group = Group()
    memory = torch.zeros(4, N * (R * IN + OUT * R))

    def place(row, further=0):
        parts = memory.flatten()[row * memory.shape[1] + further :][: memory.shape[1]].split([R * IN, OUT * R] * N)
        return [parts[2 * i].view(R, IN) for i in range(N)], [parts[2 * i + 1].view(OUT, R) for i in range(N)]

    old = group.As, group.Bs
    group.As, group.Bs = place(0)
    for new, given in zip((*group.As, *group.Bs), (*old[0], *old[1]), strict=True):
        new.copy_(given)
    group.grads_A, group.grads_B = place(1)
    group.add(backend)
    group.grads_A, group.grads_B = place(2)
    group.add(backend)
    group.check()
    for further in (0, IN):
        group.grads_A, group.grads_B = place(0, further)
        with pytest.raises(ValueError, match=r"must have memory of its own"):
            group.add(backend)
    assert all(map(torch.equal, (*group.As, *group.Bs), (*old[0], *old[1])))


@BACKENDS
def test_views_between_each_others_elements_are_apart(backend):
    """Columns of one matrix, as fused projections have, and every n-th column, as expert layers have."""
    group = Group()
    together, between = torch.zeros(OUT, N * R), torch.zeros(R, IN, N)
    group.grads_B = [together[:, :R], together[:, R:]]
    group.grads_A = [between[:, :, 0], between[:, :, 1]]
    group.add(backend)
    group.check()


@BACKENDS
def test_a_gradient_listed_again_for_its_factor_has_both(backend):
    group = Group()
    group.As[1], group.grads_A[1] = group.As[0], group.grads_A[0]
    group.add(backend)
    wanted = [exact(*case, 1.0) for case in zip(group.As, group.Bs, group.pasts, strict=True)]
    assert relative_error(group.grads_A[0], wanted[0][1] + wanted[1][1]) < BOUND[torch.float32]
    assert relative_error(group.grads_B[1], wanted[1][2]) < BOUND[torch.float32]


@BACKENDS
def test_inference_tensors_are_added_to_in_inference_mode(backend):
    group = Group()
    with torch.inference_mode():
        for _ in range(2):
            group.grads_A, group.grads_B = ([torch.zeros_like(t) for t in ts] for ts in (group.As, group.Bs))
            group.add(backend)
    group.check()


def test_an_expanded_target_is_refused_by_a_compiled_call():
    group = Group()
    add = torch.compile(lambda: group.add("torch"), fullgraph=True, backend="aot_eager")
    group.grads_A[1] = torch.zeros(1, 1).expand(R, IN)
    with pytest.raises(Exception, match=r"grads_A\[1\] must have an element of memory"):
        add()
    assert not group.grads_B[1].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 4])
@pytest.mark.parametrize("cols", [1, 2, 3, 5])
def test_elements_at_one_place_are_found(rows, cols):
    for per_row in range(7):
        for per_col in range(7):
            matrix = torch.zeros(64).as_strided((rows, cols), (per_row, per_col))
            places = {i * per_row + j * per_col for i in range(rows) for j in range(cols)}
            assert targets._repeats_itself(matrix) == (len(places) < rows * cols), (per_row, per_col)
