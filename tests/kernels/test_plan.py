"""A repeated call is recognised by its signature, never wrongly, and nothing is done per layer again."""

from __future__ import annotations

import gc
import inspect
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ella_kernels as ek
from ella_kernels import functional, ops, plan, recognition
from ella_kernels.recognition import MAX_CALLS, Memory
from ella_kernels.triton_backend import gram, kernels
from tests.kernels.cases import BOUND, exact, factors, opcodes, relative_error

OUT, IN, R, K = 9, 12, 4, 3


@pytest.fixture(autouse=True)
def forgotten():
    functional._MEMORY.clear()
    ops._MEMORY.clear()


@pytest.fixture
def checked(monkeypatch):
    """One entry per call that went through the checks."""
    calls, plain = [], plan.checked_layers
    monkeypatch.setattr(plan, "checked_layers", lambda *args: calls.append(1) or plain(*args))
    return calls


class Group:
    """Operands of an in-place call on a few layers, the first with energies and the last without a past."""

    def __init__(self, n=3, backend="triton", algorithm="gram", dtype=torch.float32):
        cases = [factors(OUT, IN, R, K, seed=i, energy=i == 0, dtype=dtype) for i in range(n)]
        self.As, self.Bs = ([torch.nn.Parameter(case[i]) for case in cases] for i in (0, 1))
        self.pasts, self.scalings = [case[2] for case in cases], [1.0 + i / 2 for i in range(n)]
        if n > 2:
            self.pasts[-1] = None
        self.grads_A, self.grads_B = ([torch.zeros_like(t.data) for t in ts] for ts in (self.As, self.Bs))
        self.options = {"backend": backend, "algorithm": algorithm, "weight": 1.0}

    def call(self, **options):
        operands = (self.As, self.Bs, self.pasts, self.scalings, self.grads_A, self.grads_B)
        return ek.add_hadamard_grad_(*operands, **self.options | options)

    def results(self, **options):
        for grad in (*self.grads_A, *self.grads_B):
            grad.zero_()
        return self.call(**options), *(g.clone() for g in (*self.grads_A, *self.grads_B))

    def check(self, **options):
        n = len(self.As)
        values, *grads = self.results(**options)
        for i, (a, b, past) in enumerate(zip(self.As, self.Bs, self.pasts, strict=True)):
            if past is None:
                assert values[i] == 0 and not grads[i].any() and not grads[n + i].any()
                continue
            wanted = exact(a, b, past, self.scalings[i])
            for found, want in zip((values[i], grads[i], grads[n + i]), wanted, strict=True):
                assert relative_error(found, want) < BOUND[torch.float32]


BACKENDS = pytest.mark.parametrize("backend", ["triton", "torch"])


@BACKENDS
def test_a_repeated_call_is_not_checked_again_and_gives_the_same(backend, checked):
    group = Group(backend=backend)
    first = group.results()
    for _ in range(2):
        assert all(torch.equal(x, y) for x, y in zip(first, group.results(), strict=True))
    assert len(checked) == 1
    group.check()
    # Tables hold addresses: new values at the same place are seen.
    with torch.no_grad():
        group.As[0].mul_(1.5), group.pasts[0].left.mul_(-2), group.pasts[0].row_energy.add_(1)
    group.check()
    assert len(checked) == 1


@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense", "spectral"])
def test_both_roads_give_the_same_bits(algorithm, monkeypatch, checked):
    group = Group(algorithm=algorithm)
    if algorithm == "spectral":
        del group.options["algorithm"]
        monkeypatch.setattr(ek, "add_hadamard_grad_", ek.add_spectral_grad_)
    group.results()
    short = group.results(weight=torch.tensor(0.5))
    assert len(checked) == 1
    with monkeypatch.context() as patch:
        patch.setattr(plan, "signature", lambda *args: None)
        by_op = group.results(weight=torch.tensor(0.5))
    assert all(torch.equal(x, y) for x, y in zip(short, by_op, strict=True))


def test_a_repeated_call_runs_no_python_per_layer(monkeypatch):
    class Nothing:
        def __getitem__(self, grid):
            return lambda *args, **kwargs: None

    for name in kernels().keys() & set(gram.__all__):
        monkeypatch.setattr(gram, name, Nothing())
    counts = {}
    for n in (3, 12):
        group = Group(n)
        counts[n] = opcodes(group.call, ek), opcodes(group.call, ek)
    assert counts[12][0] > 2 * counts[3][0], "the first call walks the layers"
    assert counts[12][1] == counts[3][1] > 0


def test_a_recognised_call_is_few_calls_from_its_launches(monkeypatch):
    """``add_gradient_`` of the regularizer is one more: five to a kernel."""
    group, plan_of_it, launched = Group(), ek.Plan(algorithm="gram", backend="triton"), []

    class Nothing:
        def __getitem__(self, grid):
            frame, names = inspect.currentframe().f_back, []
            while "ella_kernels" in frame.f_code.co_filename:
                names.append(frame.f_code.co_name)
                frame = frame.f_back
            launched.append(names[::-1])
            return lambda *args, **kwargs: None

    for name in kernels().keys() & set(gram.__all__):
        monkeypatch.setattr(gram, name, Nothing())
    for _ in range(2):
        launched.clear()
        plan_of_it.add_grad_(group.As, group.Bs, group.pasts, group.scalings, group.grads_A, group.grads_B, weight=1.0)
    assert len(launched) > 2 and all(names[0] == "add_grad_" and len(names) <= 4 for names in launched), launched


@BACKENDS
def test_the_weight_is_not_part_of_the_signature(backend, checked):
    group = Group(backend=backend)
    _, whole, *_ = group.results()
    _, half, *_ = group.results(weight=0.5)
    _, double, *_ = group.results(weight=torch.tensor(2.0))
    assert torch.equal(half, 0.5 * whole) and torch.equal(double, 2 * whole) and len(checked) == 1


def move(group):
    old = group.As[1].data
    group.As[1].data = old.clone()
    # The old memory holds something else now.
    old.fill_(float("nan"))


def swap_strides(group):
    group.As[1].data = group.As[1].data.as_strided((R, IN), (1, R))


def swap_shape(group):
    for tensors in (group.As, group.grads_A):
        tensors[1].data = tensors[1].data[: R - 1]
    for tensors in (group.Bs, group.grads_B):
        tensors[1].data = tensors[1].data[:, : R - 1]


def swap_dtype(group):
    # The same memory, read as twice as many numbers of half the size.
    half = group.As[1].data.view(torch.bfloat16)
    half.copy_(torch.randn(half.shape))
    group.As[1].data = half.as_strided((R, IN), (IN, 1))


def replace_past(group):
    group.pasts[1] = ek.LowRank(*(t.clone() if t is not None else None for t in group.pasts[1]))
    group.pasts[1].left.mul_(2)


def dense_past(group):
    group.pasts[1] = group.pasts[1].left @ group.pasts[1].right
    group.options["algorithm"] = "auto"


def drop_energies(group):
    group.pasts[0] = group.pasts[0]._replace(row_energy=None, col_energy=None)


def drop_past(group):
    group.pasts[1] = None


def swap_energies(group):
    group.pasts[0] = group.pasts[0]._replace(row_energy=group.pasts[0].row_energy.flip(0).contiguous())


def rescale(group):
    group.scalings[1] = 3.0


def move_gradients(group):
    group.grads_A[1] = torch.full((IN, R), 7.0).T


def reorder_gradients(group):
    group.grads_A[0], group.grads_A[1] = group.grads_A[1], group.grads_A[0]


def fewer_layers(group):
    for operands in (group.As, group.Bs, group.pasts, group.scalings, group.grads_A, group.grads_B):
        operands.pop()


def other_algorithm(group):
    group.options["algorithm"] = "stream"


def other_precision(group):
    group.options["precision"] = "ieee"


CHANGES = [
    move, swap_strides, swap_shape, swap_dtype, replace_past, dense_past, drop_energies, drop_past, swap_energies,
    rescale, move_gradients, reorder_gradients, fewer_layers, other_algorithm, other_precision,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@BACKENDS
def test_any_change_of_the_operands_is_checked_and_seen(backend, change, checked):
    group = Group(backend=backend)
    group.call(), group.call()
    assert len(checked) == 1
    change(group)
    group.check()
    assert len(checked) == 2
    group.check()
    assert len(checked) == 2


def test_memory_that_is_used_again_for_another_tensor():
    """Freed and allocated at the same address, with other sizes: here two views of one buffer, one after the other."""
    memory = torch.zeros(4 * OUT * IN)
    for r, k in ((2, 3), (4, 3), (2, 6)):
        group = Group(2)
        a, b, past = factors(OUT, IN, r, k, seed=r + k)
        parts = [part.view(-1) for part in (a, b, *past[:2], torch.zeros(r * IN), torch.zeros(OUT * r))]
        memory[: sum(map(len, parts))] = torch.cat(parts)
        a, b, left, right, grad_a, grad_b = memory.split([*map(len, parts), len(memory) - sum(map(len, parts))])[:6]
        group.As, group.Bs, group.scalings = [a.view(r, IN)], [b.view(OUT, r)], [1.0]
        group.pasts = [ek.LowRank(left.view(OUT, k), right.view(k, IN))]
        group.grads_A, group.grads_B = [grad_a.view(r, IN)], [grad_b.view(OUT, r)]
        group.check(), group.check()


def grads_none(group):
    group.grads_A[1] = None


def requires_grad(group):
    group.pasts[1].left.requires_grad_()


def one_gradient_less(group):
    group.grads_B.pop()


def flat_gradient(group):
    group.grads_A[1].data = group.grads_A[1].data.view(-1)


def plain_tuple(group):
    group.pasts[1] = tuple(group.pasts[1])


def not_finite(group):
    group.scalings[1] = float("nan")


def scaling_tensor(group):
    group.scalings[1] = torch.tensor(group.scalings[1])


def integers(group):
    group.As[1] = group.As[1].data.view(torch.int32)


def weight_not_finite(group):
    group.options["weight"] = float("inf")


def weight_vector(group):
    group.options["weight"] = torch.ones(2)


def no_such_precision(group):
    group.options["precision"] = "half"


ERRORS = [
    (grads_none, TypeError, r"grads_A\[1\] must be a tensor, found NoneType"),
    (requires_grad, ValueError, "past of layer 1.left must not require grad"),
    (one_gradient_less, ValueError, "grads_B must have one entry per layer, found 2 for 3 layers"),
    (flat_gradient, ValueError, r"grads_A\[1\] must have shape \(4, 12\).*found \(48,\)"),
    (plain_tuple, TypeError, "past of layer 1 must be LowRank, a tensor or None, found tuple"),
    (not_finite, ValueError, "scaling of layer 1 must be finite, found nan"),
    (scaling_tensor, TypeError, "scaling of layer 1 must be a number, found Tensor"),
    (integers, TypeError, "lora_A of layer 1 must be float32.*found torch.int32"),
    (weight_not_finite, ValueError, "weight must be finite, found inf"),
    (weight_vector, ValueError, r"weight must be a number or a 0-dim tensor, found shape \(2,\)"),
    (no_such_precision, ValueError, "precision must be one of .*found 'half'"),
]


@pytest.mark.parametrize("spoil, error, message", ERRORS, ids=[spoil.__name__ for spoil, *_ in ERRORS])
@BACKENDS
def test_errors_are_the_same_after_a_repeated_call(backend, spoil, error, message):
    group = Group(backend=backend)
    group.call(), group.call()
    spoil(group)
    for _ in range(2):
        with pytest.raises(error, match=message):
            group.call()


def test_the_interpreter_switched_off_is_noticed(monkeypatch):
    group = Group()
    group.call(), group.call()
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="backend='triton' needs tensors on a CUDA or ROCm GPU"):
        group.call()


@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense"])
@BACKENDS
def test_no_tensor_of_the_caller_is_kept(backend, algorithm):
    group = Group(backend=backend, algorithm=algorithm)
    group.call(), group.call()
    assert len(functional._MEMORY) == 1
    tensors = [*group.As, *group.Bs, *group.grads_A, *group.grads_B, *(t for t in group.pasts[0] if t is not None)]
    kept = [weakref.ref(t) for t in tensors]
    del group, tensors
    gc.collect()
    assert not any(ref() is not None for ref in kept)


def test_only_the_last_few_calls_are_remembered(checked):
    groups = [Group(1, backend="torch") for _ in range(MAX_CALLS + 1)]
    for group in groups:
        group.call()
        groups[0].call()
    assert len(functional._MEMORY) == MAX_CALLS and len(checked) == len(groups)
    groups[1].call()
    assert len(checked) == len(groups) + 1, "the one used least recently was dropped"


def test_alternating_gradients_are_both_remembered(checked):
    group = Group(1)
    other = [torch.zeros_like(g) for g in group.grads_A]
    for _ in range(3):
        group.check()
        group.grads_A, other = other, group.grads_A
    assert len(checked) == 2


@BACKENDS
def test_gradients_in_one_allocation_are_found_wherever_it_is(backend, checked):
    """As a flat buffer that is made anew in every step is."""
    group = Group(backend=backend)
    sizes = [grad.numel() for grad in (*group.grads_A, *group.grads_B)]

    def place():
        views = [
            part.view_as(grad)
            for part, grad in zip(torch.zeros(sum(sizes)).split(sizes), (*group.grads_A, *group.grads_B), strict=True)
        ]
        group.grads_A, group.grads_B = views[:3], views[3:]

    place()
    group.check()
    for _ in range(2):
        old = [*group.grads_A, *group.grads_B]
        place()
        torch._foreach_zero_(old)
        group.check()
        assert not any(grad.any() for grad in old)
    assert len(checked) == 1


@BACKENDS
def test_autograd_is_told_that_the_gradients_changed(backend):
    group = Group(2, backend=backend)
    for _ in range(3):
        before = [g._version for g in (*group.grads_A, *group.grads_B)]
        group.call()
        assert all(g._version > v for g, v in zip((*group.grads_A, *group.grads_B), before, strict=True))


class Subclass(torch.Tensor):
    pass


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


def test_unusual_tensors_take_the_registered_op(checked):
    group = Group(2)
    group.check()
    group.As[0] = group.As[0].data.as_subclass(Subclass)
    for _ in range(2):
        group.check()
    assert len(checked) == 3


def test_a_dispatch_mode_sees_the_op_of_a_repeated_call(checked):
    group = Group(2)
    group.call(), group.call()
    with Operators() as operators:
        group.call()
    assert operators.seen[-1] == "ella_kernels::add_penalty_grad_" and len(checked) == 2


def test_inside_a_function_transform_the_op_is_called(checked):
    group = Group(2)
    group.call(), group.call()
    torch.func.vmap(lambda x: (group.call(), x)[1])(torch.ones(2))
    assert len(checked) == 2


def test_a_negated_view_is_not_taken_for_what_it_views():
    group = Group(1)
    complex_b = torch.complex(torch.zeros(OUT, R), group.Bs[0].data)
    group.grads_B = [torch.complex(torch.zeros(OUT, R), torch.zeros(OUT, R)).imag]
    grads = []
    for b in (complex_b.imag, complex_b.imag, complex_b.conj().imag):
        group.Bs = [b]
        group.check()
        grads.append(group.grads_B[0].clone())
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], -grads[0])


def test_operands_that_must_be_converted_are_converted_again(checked):
    """float64 beside half operands, and algorithm="dense" on factors: the kernels read copies, made in every call."""
    group = Group(1, algorithm="dense")
    group.check()
    group.pasts[0].left.mul_(2)
    group.check()
    half = Group(1, algorithm="stream")
    half.As = [half.As[0].data.bfloat16()]
    half.pasts = [ek.LowRank(*(None if t is None else t.double() for t in half.pasts[0]))]
    half.check()
    half.As[0].mul_(2)
    half.check()
    assert len(checked) == 2


def test_a_past_of_energies_alone_is_remembered(checked):
    """Its factors are empty and have no address."""
    group = Group(1)
    left, right = torch.randn(OUT, 0), torch.randn(0, IN)
    group.pasts = [ek.LowRank(left, right, torch.rand(OUT), torch.rand(IN))]
    group.check(), group.check()
    assert len(checked) == 1


def test_a_plan_of_ones_own_is_not_driven_out_by_other_calls(checked):
    group = Group(1)
    own = ek.Plan(algorithm="gram", backend="triton")
    operands = (group.As, group.Bs, group.pasts, group.scalings, group.grads_A, group.grads_B)
    first = own.add_grad_(*operands, weight=1.0)
    others = [Group(1, backend="torch") for _ in range(MAX_CALLS + 1)]
    for other in others:
        other.call()
    assert torch.equal(own.add_grad_(*operands, weight=1.0), first) and len(checked) == 1 + len(others)


@pytest.mark.parametrize("options", [{"penalty": "other"}, {"algorithm": "best"}, {"backend": "c"}, {"precision": "x"}])
def test_a_plan_refuses_options_when_it_is_made(options):
    with pytest.raises(
        ValueError, match=f"{next(iter(options))} must be one of .*found '{next(iter(options.values()))}'"
    ):
        ek.Plan(**options)


@pytest.mark.parametrize("algorithm", ["gram", "stream", "dense", "spectral"])
def test_tables_of_the_op_are_reused_until_a_tensor_moves(algorithm, monkeypatch):
    """Autograd's road: gradients are new tensors in every call, often in the places of the last ones."""
    built, plain = [], ops.prepare
    monkeypatch.setattr(ops, "prepare", lambda *args: built.append(1) or plain(*args))
    a, b, past = factors(OUT, IN, R, K)
    past = past.left @ past.right if algorithm == "dense" else past
    penalty = "spectral" if algorithm == "spectral" else "hadamard"

    def error():
        options = {"backend": "triton"} | ({} if algorithm == "spectral" else {"algorithm": algorithm})
        value = getattr(ek, f"{penalty}_penalty")(a, b, past, 1.0, **options)
        return relative_error(value, exact(a, b, past, 1.0, penalty)[0])

    assert error() < BOUND[torch.float32] and len(built) == 1
    a.mul_(1.5), past[0].mul_(-2)
    assert error() < BOUND[torch.float32] and len(built) == 1
    old, a = a, a.clone()
    old.fill_(float("nan"))
    assert error() < BOUND[torch.float32] and len(built) == 2


def signature_of(tensor):
    return recognition.layout([], [tensor])


@pytest.fixture
def gpu(monkeypatch):
    """A stream and a capture as a GPU would report them."""
    state = {"stream": 1, "capturing": False}
    monkeypatch.setattr(recognition, "_stream", lambda device: state["stream"])
    monkeypatch.setattr(recognition, "_is_capturing", lambda device: state["capturing"])
    return state


def test_a_table_serves_the_stream_it_was_copied_on(gpu):
    memory, found = Memory(), signature_of(torch.zeros(1))
    memory.add(found, "first")
    gpu["stream"] = 2
    assert memory.find(found) == (None, 0)
    memory.add(found, "second")
    assert memory.find(found)[0] == "second"
    # A warm-up may run on any stream; whoever captures has waited for it.
    gpu |= {"stream": 3, "capturing": True}
    assert memory.find(found)[0] == "second"


def test_what_a_graph_reads_is_kept_and_what_a_capture_built_is_not_shared(gpu):
    memory, tensor = Memory(), torch.zeros(1)
    gpu["capturing"] = True
    built = Kept()
    memory.add(signature_of(tensor), built)
    # Filled by replays of that graph only: neither a plain call nor another graph may read it.
    assert memory.find(signature_of(tensor)) == (None, 0)
    gpu["capturing"] = False
    assert memory.find(signature_of(tensor)) == (None, 0)
    warm, dropped = Kept(), Kept()
    others = torch.zeros(2, 3 * MAX_CALLS)
    memory.add(signature_of(others[0, 0]), warm)
    memory.add(signature_of(others[0, 1]), dropped)
    gpu["capturing"] = True
    assert memory.find(signature_of(others[0, 0]))[0] is warm
    gpu["capturing"] = False
    for i in range(2, 3 * MAX_CALLS):
        memory.add(signature_of(others[0, i]), None)
    memory.clear()
    alive = [weakref.ref(kept) for kept in (built, warm, dropped)]
    del built, warm, dropped
    gc.collect()
    assert [ref() is not None for ref in alive] == [True, True, False]


class Kept:
    """Something that can be referred to weakly."""
