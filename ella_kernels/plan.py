"""A plan of in-place calls: checked, chosen and built at the first, recognised and run at the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from .checks import (
    Past,
    check_options,
    check_weight,
    checked_layers,
    is_converted,
    one_of,
    resolve_backend,
    with_targets,
)
from .dispatch import ALGORITHMS
from .layer import Layer
from .prepared import Prepared, prepare
from .recognition import Memory, Signature, signature
from .targets import Room
from .tracing import are_constants, recorded

__all__ = ["Plan"]


class _Choice(NamedTuple):
    """What was decided about a call that passed the checks.

    Attributes:
        algorithms: of each layer. backend: the resolved one.
        prepared: the launches, if they can run again as they are.
        room: where gradients may lie.
    """

    algorithms: list[str]
    backend: str
    prepared: Prepared | None
    room: Room


class Plan:
    """The in-place calls of one place in a program, with what was built for them.

    ``add_hadamard_grad_`` and ``add_spectral_grad_`` share one plan. Whoever steps through a model of his own takes one
    for it, so that nobody else's calls drive out what was built for his.

    Args:
        penalty: "hadamard" or "spectral".
        algorithm, backend, precision: as :func:`ella_kernels.hadamard_penalty`; the spectral penalty has one algorithm.

    Raises:
        ValueError: no such option.

    >>> plan = Plan()
    >>> a, b, past = torch.ones(1, 3), torch.ones(2, 1), torch.ones(2, 3)
    >>> grad_a, grad_b = torch.zeros(1, 3), torch.zeros(2, 1)
    >>> plan.add_grad_([a], [b], [past], [1.0], [grad_a], [grad_b], weight=0.5)
    tensor([6.])
    """

    def __init__(
        self,
        penalty: str = "hadamard",
        *,
        algorithm: str = "auto",
        backend: str = "auto",
        precision: str = "auto",
        memory: Memory | None = None,
    ) -> None:
        one_of("penalty", penalty, ("hadamard", "spectral"))
        one_of("algorithm", algorithm, ALGORITHMS)
        check_options(backend, precision)
        self._options = ("spectral" if penalty == "spectral" else algorithm, backend, precision)
        self._memory = Memory() if memory is None else memory

    def add_grad_(
        self,
        lora_As: Sequence[Tensor],
        lora_Bs: Sequence[Tensor],
        pasts: Sequence[Past],
        scalings: Sequence[float],
        grads_A: Sequence[Tensor],
        grads_B: Sequence[Tensor],
        *,
        weight: float | Tensor,
    ) -> Tensor:
        """Arguments, results and errors as :func:`ella_kernels.add_hadamard_grad_`."""
        found = signature(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, self._options)
        choice, moved_by = self._memory.find(found)
        if choice is None or (moved_by and not choice.room.is_clear(found.grad_base)):
            with torch.no_grad():
                prepared = self._first_call(found, lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight)
            if isinstance(prepared, Tensor):
                return prepared
        else:
            check_weight(weight)
            prepared = choice.prepared
            if prepared is None:
                layers = map(_layer, lora_As, lora_Bs, pasts, scalings, choice.algorithms, grads_A, grads_B)
                prepared = prepare(list(layers), choice.backend, self._options[2])
        # As inside the registered op, whose way through the dispatcher takes longer than small layers do.
        with torch._C._AutoDispatchBelowAutograd():
            values = prepared.run(weight, moved_by)
        # Autograd saw nothing of it; around the registered op the dispatcher tells it.
        torch.autograd.graph.increment_version([*grads_A, *grads_B])
        return values

    def _first_call(
        self, found: Signature | None, lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight
    ) -> Prepared | Tensor:  # fmt: skip
        """All checks; what is to run, remembered, or the values of a call without a signature, by the registered op."""
        algorithm, backend, precision = self._options
        of_step = None
        if not are_constants(scalings):
            # An op's numbers are compiled into the graph, once for each: these are multiplied in outside it.
            scalings, of_step = [1.0] * len(scalings), scalings
        layers = with_targets(checked_layers(lora_As, lora_Bs, pasts, scalings, algorithm), grads_A, grads_B, weight)
        if not layers:
            return torch.zeros(0)
        backend = resolve_backend(backend, layers)
        device = layers[0].lora_A.device
        if not are_constants([weight]):
            (weight,) = recorded([weight], device)
        if of_step is not None:
            return _add_scaled(layers, recorded(of_step, device), weight, backend, precision)
        if found is None or is_converted(pasts, algorithm):
            return ops.add_grads_(layers, weight, backend, precision)
        prepared = prepare(layers, backend, precision)
        again = None if prepared.holds_operands else prepared
        read = [t for layer in layers for t in (layer.lora_A, layer.lora_B, *layer.past) if t is not None]
        room = Room.of([*grads_A, *grads_B], read)
        self._memory.add(found, _Choice([layer.algorithm for layer in layers], backend, again, room))
        return prepared


def _layer(lora_A, lora_B, past, scaling, algorithm, grad_A, grad_B) -> Layer:
    parts = past if past is not None and not isinstance(past, Tensor) else (past, None, None, None)
    return Layer(lora_A, lora_B, *parts, float(scaling), algorithm, grad_A, grad_B)


def _add_scaled(layers: list[Layer], scalings: Tensor, weight, backend: str, precision: str) -> Tensor:
    """In-place call with the layers' scalings as a tensor, which was left out of them."""
    values, grads_A, grads_B = ops.values_and_grads(layers, True, backend, precision)
    squares = scalings.square()
    factors = (squares * weight).unbind()
    targets = [*(layer.grad_A for layer in layers), *(layer.grad_B for layer in layers)]
    torch._foreach_add_(targets, torch._foreach_mul([*grads_A, *grads_B], [*factors, *factors]))
    return (values.double() * squares).to(values.dtype)
