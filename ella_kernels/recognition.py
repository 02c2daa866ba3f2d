"""Recognising a call that was made before, by where its operands are: nothing is checked, chosen or built again.

A training step hands over the same few hundred tensors every time, or gradients in a new allocation of the old pattern.
All that checks, choices and tables depend on is read by loops in C, once per call, and compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, not_, sub
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .lowrank import LowRank
from .tracing import is_traced

__all__ = ["MAX_CALLS", "Memory", "Signature", "forget", "layout", "signature"]

# Enough for a model on several devices whose gradients an allocator places in a few alternating patterns.
MAX_CALLS = 8
_TENSORS = frozenset({Tensor, nn.Parameter})
_PASTS = frozenset({LowRank, Tensor, nn.Parameter, type(None)})
_NUMBERS = frozenset({float, int})
_dtype, _requires_grad = attrgetter("dtype"), attrgetter("requires_grad")


# Part of every key.
_generation = [0]


def forget() -> None:
    """Recognise no call made so far: what calls are made of has changed, as rows of the tile table have."""
    _generation[0] += 1


class Signature(NamedTuple):
    """What a call is recognised by.

    Attributes:
        key: all that checks, choices and tables depend on; no tensor.
        grad_base: address of the first gradient. The others are relative to it in the key, as they are in the tables:
            gradients that share one allocation are found again wherever it is.
        device: of the operands.
    """

    key: tuple
    grad_base: int
    device: torch.device


class _Call(NamedTuple):
    """A call that was made: ``stream`` is that on which its tables were copied, 0 where there is none."""

    key: tuple
    grad_base: int
    stream: int
    made: Any


class Memory:
    """What was made for the last few calls, the last used first.

    Tables are copied to a GPU on the stream that is current and serve that stream only: another one could read them too
    early. A CUDA graph being captured takes what its warm-up made, on whatever stream, which is then kept for good.
    What is made during a capture is filled by replays only: it is kept for that graph, and nobody else finds it.
    """

    def __init__(self) -> None:
        # Searched as a snapshot and replaced as a whole, so that threads need no lock.
        self._calls: list[_Call] = []
        self._of_graphs: list[_Call] = []

    def __len__(self) -> int:
        return len(self._calls)

    def find(self, found: Signature | None) -> tuple[Any, int]:
        """What was made for calls with this signature, and the bytes its gradients lie further; ``(None, 0)``."""
        if found is None:
            return None, 0
        calls, stream = tuple(self._calls), _stream(found.device)
        is_captured = _is_capturing(found.device)
        for call in calls:
            if call.key == found.key and (is_captured or call.stream == stream):
                if is_captured:
                    self._of_graphs.append(call)
                elif call is not calls[0]:
                    self._calls[:] = (call, *(other for other in calls if other is not call))
                return call.made, found.grad_base - call.grad_base
        return None, 0

    def add(self, found: Signature, made: Any) -> None:
        """Keep what was made for calls with this signature, in place of the one used least recently."""
        call = _Call(found.key, found.grad_base, _stream(found.device), made)
        if _is_capturing(found.device):
            self._of_graphs.append(call)
        else:
            self._calls[:] = (call, *self._calls[: MAX_CALLS - 1])

    def clear(self) -> None:
        """Forget all but what graphs read."""
        self._calls[:] = []


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def layout(grads: Sequence[Tensor], read: Sequence[Tensor], *others: object) -> Signature:
    """The signature of dense tensors with memory of their own: where and what they are, and ``others``."""
    return _signature(grads, read, _addresses(grads), _addresses(read), others)


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple(map(Tensor.data_ptr, tensors))


def _signature(
    grads: Sequence[Tensor], read: Sequence[Tensor], targets: tuple[int, ...], sources: tuple[int, ...], others: tuple
) -> Signature:
    grad_base, tensors = targets[0] if targets else 0, [*grads, *read]
    key = (
        *others,
        _generation[0],
        os.environ.get("TRITON_INTERPRET"),
        tuple(map(sub, targets, repeat(grad_base))),
        sources,
        tuple(map(_dtype, tensors)),
        tuple(map(Tensor.get_device, tensors)),
        tuple(map(Tensor.stride, tensors)),
        tuple(map(Tensor.size, tensors)),
    )
    return Signature(key, grad_base, tensors[0].device)


def signature(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[LowRank | Tensor | None],
    scalings: Sequence[float],
    grads_A: Sequence[Tensor],
    grads_B: Sequence[Tensor],
    weight: float | Tensor,
    options: tuple[str, ...],
) -> Signature | None:
    """The signature of an unchecked in-place call, which the weight is not part of; None where none can be given.

    That is an unusual call: tensor subclasses, tensors without memory of their own, wrong types, a past that requires
    grad, or a call that is being traced.
    """
    if is_traced() or (isinstance(weight, Tensor) and (type(weight) not in _TENSORS or weight.is_neg())):
        return None
    try:
        kinds = tuple(map(type, pasts))
        if not (_PASTS.issuperset(kinds) and _NUMBERS.issuperset(map(type, scalings))):
            return None
        entries = list(_entries(pasts, kinds))
        is_present = tuple(map(is_not, entries, repeat(None)))
        frozen = list(compress(entries, is_present))
        grads, read = [*grads_A, *grads_B], [*lora_As, *lora_Bs, *frozen]
        if not grads or not _TENSORS.issuperset(map(type, chain(grads, read))) or any(map(_requires_grad, frozen)):
            return None
        if any(map(Tensor.is_neg, chain(grads, read))) or any(map(Tensor.is_inference, grads)):
            return None
        targets, sources = _addresses(grads), _addresses(read)
        if 0 in targets or 0 in sources:
            tensors = [*grads, *read]
            if any(compress(map(Tensor.numel, tensors), map(not_, map(Tensor.data_ptr, tensors)))):
                return None
        lengths = tuple(map(len, (lora_As, lora_Bs, pasts, scalings, grads_A, grads_B)))
        return _signature(grads, read, targets, sources, (lengths, options, tuple(scalings), kinds, is_present))
    except (TypeError, RuntimeError, AttributeError):
        # Not sequences, or tensors without storage or strides: the checks say what is wrong.
        return None


def _entries(pasts: Sequence, kinds: Sequence[type]) -> Iterable:
    """All parts of all pasts: of those that are factored first."""
    is_factored = tuple(map(is_, kinds, repeat(LowRank)))
    return chain(chain.from_iterable(compress(pasts, is_factored)), compress(pasts, map(not_, is_factored)))
