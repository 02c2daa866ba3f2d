"""The ways to compute the penalty that are compared, with one declared baseline: dense eager autograd.

A provider says what it must hold between steps, what a call needs on top, how many operations and bytes its algorithm
costs, and why it cannot run where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

import ella_kernels as ek
from ella_kernels.dispatch import select_algorithm

from .shapes import Size

__all__ = [
    "BASELINE",
    "MODES",
    "PROVIDERS",
    "Cost",
    "Group",
    "Prepared",
    "Provider",
    "make_group",
    "prepare",
    "provider",
]

MODES = ("forward", "backward", "both", "in-place")
SCALING = 2.0
WEIGHT = 0.5


@dataclass
class Group:
    """Operands of one call: parallel lists over layers. Factors are leaves that require grad."""

    sizes: tuple[Size, ...]
    lora_As: list[Tensor]
    lora_Bs: list[Tensor]
    pasts: list[ek.LowRank]
    scalings: list[float]

    @property
    def leaves(self) -> list[Tensor]:
        return [*self.lora_As, *self.lora_Bs]


def make_group(sizes: Sequence[Size], device: str = "cpu", seed: int = 0) -> Group:
    """Random fp32 operands. Entry sizes are those of training: ``ΔW`` and ``W_past`` near 1e-3 and 1e-2."""
    gen = torch.Generator(device).manual_seed(seed)

    def randn(*shape, scale=1.0):
        return torch.randn(*shape, generator=gen, device=device).mul_(scale)

    def past(size: Size) -> ek.LowRank:
        left, right = randn(size.out, size.k, scale=0.1), randn(size.k, size.in_, scale=0.1)
        if not size.energy:
            return ek.LowRank(left, right)
        # Row and column energies as a truncation leaves them: positive, with one common sum.
        rows, cols = randn(size.out).square_(), randn(size.in_).square_()
        return ek.LowRank(left, right, rows, cols.mul_(rows.sum() / cols.sum()))

    return Group(
        tuple(sizes),
        [randn(s.r, s.in_, scale=s.in_**-0.5).requires_grad_() for s in sizes],
        [randn(s.out, s.r, scale=0.02).requires_grad_() for s in sizes],
        [past(s) for s in sizes],
        [SCALING] * len(sizes),
    )


class Cost(NamedTuple):
    """What an algorithm must do: floating-point operations, and bytes moved to and from memory."""

    flops: float
    bytes: float

    def __add__(self, other: Cost) -> Cost:  # type: ignore[override]
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


@dataclass(frozen=True)
class Provider:
    """One way to compute the penalty.

    Attributes:
        name: row label. note: one line of what it is.
        hold: past of one layer in the form kept between steps.
        penalties: ``(group, held) → (n,)`` values, differentiable in the leaves.
        cost: ``(size, with_grad) → Cost`` of one layer.
        held_bytes: bytes of one layer's past on the device between steps.
        work_bytes: bytes one call allocates for the whole group, estimated; used to skip what cannot fit.
        plan: makes the plan of the in-place calls on one group, as a regularizer has one for its model; None to
            accumulate through autograd.
        refuses: device → reason, or None if it runs there.
        penalty: "hadamard" or "spectral", which is a different number.
        one_backward: whether a graph can be differentiated only once, so that backward alone has no repeated timing.
    """

    name: str
    note: str
    hold: Callable[[ek.LowRank], object]
    penalties: Callable[[Group, list], Tensor]
    cost: Callable[[Size, bool], Cost]
    held_bytes: Callable[[Size], int]
    work_bytes: Callable[[Sequence[Size]], int]
    plan: Callable[[], ek.Plan] | None = None
    refuses: Callable[[str], str | None] = lambda device: None
    penalty: str = "hadamard"
    one_backward: bool = False

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours ")


def dense_form(past: ek.LowRank) -> Tensor:
    """``(out, in)`` matrix whose square is what the penalty knows of the past; plain ``W_past`` without energies."""
    if past.row_energy is None:
        return past.left @ past.right
    return ek.reference.past_squared(past).sqrt()


def published(a: Tensor, b: Tensor, past: Tensor, scaling: float) -> Tensor:
    """``‖ΔW ⊙ W_past‖_F²`` as published code writes it: two dense matrices per layer and autograd."""
    return (scaling * (b @ a) * past).square().sum()


@cache
def compiled():
    return torch.compile(published, dynamic=True)


def _stacked(function) -> Callable[[Group, list], Tensor]:
    def penalties(group: Group, held: list) -> Tensor:
        return torch.stack(
            [
                function()(a, b, past, s)
                for a, b, past, s in zip(group.lora_As, group.lora_Bs, held, group.scalings, strict=True)
            ]
        )

    return penalties


def _from_host(a: Tensor, b: Tensor, past: Tensor, scaling: float) -> Tensor:
    return published(a, b, past.to(a.device, non_blocking=True), scaling)


def _rebuilt(a: Tensor, b: Tensor, past: ek.LowRank, scaling: float) -> Tensor:
    return published(a, b, dense_form(past), scaling)


# Passes over an (out, in) matrix in eager autograd. Forward: write B·A; read and write for s·; read two, write one for
# ⊙; read and write for the square; read for the sum. Backward: read and write 2x; read and write ·grad; read two, write
# one for ⊙; read and write for s·; read for each of two products.
_EAGER_PASSES = (9, 20)
# The least a compiler can do while B·A and the gradient products stay library calls: write B·A, read it and W_past;
# then read both again, write H, read it twice.
_COMPILED_PASSES = (3, 8)


def _dense_cost(passes: tuple[int, int], rebuilt: bool = False) -> Callable[[Size, bool], Cost]:
    def cost(s: Size, with_grad: bool) -> Cost:
        flops = s.weight * (2 * s.r * (3 if with_grad else 1) + (8 if with_grad else 4) + (2 * s.k if rebuilt else 0))
        return Cost(flops, 4.0 * s.weight * (passes[with_grad] + rebuilt))

    return cost


def _dense_held(s: Size) -> int:
    return 4 * s.weight


def factor_bytes(s: Size) -> int:
    """Bytes of a low-rank past, fp32: ``(out + in)(k [+ 1])`` numbers."""
    return 4 * (s.out + s.in_) * (s.k + s.energy)


def _dense_work(sizes: Sequence[Size]) -> int:
    # Autograd keeps one product per layer until backward, and three more are alive at the widest layer.
    return 4 * (sum(s.weight for s in sizes) + 4 * max(s.weight for s in sizes))


def _rebuilt_work(sizes: Sequence[Size]) -> int:
    return _dense_work(sizes) + 4 * sum(s.weight for s in sizes)


def _factor_work(sizes: Sequence[Size]) -> int:
    return 4 * sum(2 * (s.out + s.in_) * s.r for s in sizes) + 2**26


def _traffic(s: Size) -> float:
    """Every factor read twice (value, then gradient) and the gradients read and written: what no form can avoid."""
    return 4.0 * (s.out + s.in_) * (2 * (s.r + s.k + s.energy) + 2 * s.r)


def _gram_cost(s: Size, with_grad: bool) -> Cost:
    pairs, past_pairs = s.r * (s.r + 1) / 2, s.k * (s.k + 1) / 2 + s.energy
    once = (s.out + s.in_) * (2 * pairs * past_pairs + pairs + past_pairs)
    return Cost((2 if with_grad else 1) * once, _traffic(s) if with_grad else 4.0 * (s.out + s.in_) * (s.r + s.k))


def _stream_cost(s: Size, with_grad: bool) -> Cost:
    flops = s.weight * (2 * s.r * (3 if with_grad else 1) + 2 * s.k + 4)
    return Cost(flops, _traffic(s) if with_grad else 4.0 * (s.out + s.in_) * (s.r + s.k))


def _tiles_cost(s: Size, with_grad: bool) -> Cost:
    return Cost(s.weight * (2 * s.r * (3 if with_grad else 1) + 4), 4.0 * s.weight)


def _spectral_cost(s: Size, with_grad: bool) -> Cost:
    return Cost((s.out + s.in_) * 2 * s.r * s.k * (2 if with_grad else 1), _traffic(s))


def _auto_cost(s: Size, with_grad: bool) -> Cost:
    chosen = select_algorithm(s.out, s.in_, s.r, s.k)
    return (_gram_cost if chosen == "gram" else _stream_cost)(s, with_grad)


def _no_triton(device: str) -> str | None:
    if device != "cuda":
        return "needs a GPU; the Triton interpreter checks results and says nothing about speed"
    from ella_kernels.dispatch import triton_available

    return None if triton_available() else "this version has no Triton kernels"


def _host_only(device: str) -> str | None:
    return None if device == "cuda" else "W_past already is in host memory: the same as dense eager"


def _no_compiler(device: str) -> str | None:
    from shutil import which

    return None if device == "cuda" or which("g++") or which("c++") else "torch.compile needs a C++ compiler"


def _ours(algorithm: str, backend: str) -> Provider:
    spectral = algorithm == "spectral"
    stored = algorithm == "dense"
    options: dict = {"backend": backend}
    if not spectral:
        options["algorithm"] = algorithm
    value = ek.spectral_penalty_grouped if spectral else ek.hadamard_penalty_grouped

    def penalties(group: Group, held: list) -> Tensor:
        return value(group.lora_As, group.lora_Bs, held, group.scalings, **options)

    def plan() -> ek.Plan:
        return ek.Plan("spectral" if spectral else "hadamard", **options)

    costs = {"gram": _gram_cost, "stream": _stream_cost, "dense": _tiles_cost, "spectral": _spectral_cost}
    notes = {
        "auto": "what a user gets: the cheapest exact algorithm by sizes",
        "gram": "pair products of the factors",
        "stream": "tiles of B·A against tiles of L·R",
        "dense": "tiles of B·A against a stored W_past",
        "spectral": "the projected norm: another penalty, cheaper",
    }
    return Provider(
        f"ours {algorithm}, {backend}",
        notes[algorithm],
        hold=dense_form if stored else (lambda past: past),
        penalties=penalties,
        cost=costs.get(algorithm, _auto_cost),
        held_bytes=_dense_held if stored else factor_bytes,
        work_bytes=_factor_work,
        plan=plan,
        refuses=_no_triton if backend == "triton" else (lambda device: None),
        penalty="spectral" if spectral else "hadamard",
    )


def _dense(name: str, note: str, function, passes: tuple[int, int] = _EAGER_PASSES, **changes) -> Provider:
    fields = {
        "hold": dense_form,
        "penalties": _stacked(function),
        "cost": _dense_cost(passes),
        "held_bytes": _dense_held,
        "work_bytes": _dense_work,
    }
    return Provider(name, note, **(fields | changes))


BASELINE = "dense eager"

PROVIDERS: dict[str, Provider] = {
    entry.name: entry
    for entry in (
        _dense(BASELINE, "the published form: B·A and W_past dense, autograd; the baseline", lambda: published),
        _dense(
            "dense on host",
            "W_past in pinned host memory, copied each step",
            lambda: _from_host,
            hold=lambda past: dense_form(past).cpu().pin_memory(),
            held_bytes=lambda size: 0,
            work_bytes=_rebuilt_work,
            refuses=_host_only,
        ),
        _dense(
            "dense compiled",
            "the published form under torch.compile, W_past stored dense",
            compiled,
            _COMPILED_PASSES,
            refuses=_no_compiler,
            one_backward=True,
        ),
        _dense(
            "dense rebuilt",
            "W_past rebuilt from its factors every step, then the published form",
            lambda: _rebuilt,
            hold=lambda past: past,
            cost=_dense_cost(_EAGER_PASSES, rebuilt=True),
            held_bytes=factor_bytes,
            work_bytes=_rebuilt_work,
        ),
        *(
            _ours(algorithm, backend)
            for backend in ("torch", "triton")
            for algorithm in ("gram", "stream", "dense", "spectral", "auto")
        ),
    )
}


def provider(name: str) -> Provider:
    """The provider called ``name``; ValueError lists the known ones."""
    if name not in PROVIDERS:
        raise ValueError(f"no provider {name!r}; known: {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


class Prepared(NamedTuple):
    """One provider on one operand set in one mode: call it to time it, ``result`` to check it."""

    call: Callable[[], object]
    result: Callable[[], tuple[Tensor | None, Sequence[Tensor], Sequence[Tensor]]]


def prepare(provider: Provider, group: Group, mode: str) -> Prepared:
    """Build what is held between steps and the call that is timed.

    Args:
        mode: "forward" value without gradients; "backward" the gradients of an existing graph; "both" value and
            gradients through autograd; "in-place" gradients added to existing ones, as a training step uses them.

    Returns:
        :class:`Prepared`; ``result()`` gives values, gradients of A and of B (empty where the mode has none).
    """
    held = [provider.hold(past) for past in group.pasts]
    n = len(group.lora_As)

    def both():
        values = provider.penalties(group, held)
        return values.detach(), torch.autograd.grad(values.sum(), group.leaves)

    def split(values, grads):
        return values, grads[:n], grads[n:]

    if mode == "both":
        return Prepared(both, lambda: split(*both()))
    if mode == "forward":

        def forward():
            with torch.no_grad():
                return provider.penalties(group, held)

        return Prepared(forward, lambda: (forward(), (), ()))
    if mode == "backward":
        total = provider.penalties(group, held).sum()

        def backward():
            return torch.autograd.grad(total, group.leaves, retain_graph=True)

        return Prepared(backward, lambda: split(None, backward()))
    if mode != "in-place":
        raise ValueError(f"mode must be one of {MODES}, found {mode!r}")
    return _in_place(provider, group, held, split)


def _in_place(provider: Provider, group: Group, held: list, split) -> Prepared:
    n = len(group.lora_As)
    grads = [torch.zeros_like(leaf) for leaf in group.leaves]
    plan = None if provider.plan is None else provider.plan()

    def add():
        if plan is not None:
            operands = group.lora_As, group.lora_Bs, held, group.scalings, grads[:n], grads[n:]
            return plan.add_grad_(*operands, weight=WEIGHT)
        for leaf, grad in zip(group.leaves, grads, strict=True):
            leaf.grad = grad
        values = provider.penalties(group, held)
        (WEIGHT * values.sum()).backward()
        return values.detach()

    def result():
        for grad in grads:
            grad.zero_()
        values = add()
        return split(values, [grad / WEIGHT for grad in grads])

    return Prepared(add, result)
