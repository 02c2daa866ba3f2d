"""Recognising a repeated call: a training step hands over the same operands as the last one.

Checking a model's layers and finding their tables is Python per layer; the signature of a call is not. It holds all
that checks, choices and tables depend on, read by loops in C, so an equal one needs none of them again.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not, not_, sub
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .lowrank import LowRank
from .ops import is_transformed
from .prepared import Prepared

__all__ = ["Choice", "Signature", "find", "is_intercepted", "remember", "signature"]

# Enough for a model on several devices whose gradients an allocator places in a few alternating patterns.
_MAX_CALLS = 8
_TENSORS = frozenset({Tensor, nn.Parameter})
_PASTS = frozenset({LowRank, Tensor, nn.Parameter, type(None)})
_NUMBERS = frozenset({float, int})
_dtype, _requires_grad = attrgetter("dtype"), attrgetter("requires_grad")
# The last used first. Searched as a snapshot and replaced as a whole, so that threads need no lock.
_calls: list[tuple[tuple, Choice]] = []


class Signature(NamedTuple):
    """What a call is recognised by.

    Attributes:
        key: all that checks, choices and tables depend on; no tensor.
        grad_base: address of the first gradient. The others are relative to it in the key, as they are in the tables:
            gradients that share one allocation are found again wherever it is.
    """

    key: tuple
    grad_base: int


class Choice(NamedTuple):
    """What was decided about a call that passed the checks.

    Attributes:
        codes: the algorithm of each layer. backend: the resolved one.
        prepared: the launches, if they can run again as they are.
        grad_base: where the gradients were then.
    """

    codes: list[int]
    backend: str
    prepared: Prepared | None
    grad_base: int


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
    """The signature of an in-place call, which the weight is not part of; None where none can be given.

    That is an unusual call: tensor subclasses, tensors without memory of their own, wrong types, a past that requires
    grad, or a call that is being traced or captured.
    """
    if torch.compiler.is_compiling() or is_intercepted():
        return None
    if isinstance(weight, Tensor) and (type(weight) not in _TENSORS or weight.is_neg()):
        return None
    try:
        lengths = tuple(map(len, (lora_As, lora_Bs, pasts, scalings, grads_A, grads_B)))
        kinds = tuple(map(type, pasts))
        if not (_PASTS.issuperset(kinds) and _NUMBERS.issuperset(map(type, scalings))):
            return None
        is_factored = tuple(map(is_, kinds, repeat(LowRank)))
        entries = list(chain.from_iterable(compress(pasts, is_factored)))
        entries.extend(compress(pasts, map(not_, is_factored)))
        is_present = tuple(map(is_not, entries, repeat(None)))
        frozen = list(compress(entries, is_present))
        tensors = [*grads_A, *grads_B, *lora_As, *lora_Bs, *frozen]
        if not _TENSORS.issuperset(map(type, tensors)) or any(map(_requires_grad, frozen)):
            return None
        if not tensors or (tensors[0].is_cuda and torch.cuda.is_current_stream_capturing()):
            # Tables that a captured graph reads are kept for it on the other road.
            return None
        addresses = tuple(map(Tensor.data_ptr, tensors))
        if any(map(Tensor.is_neg, tensors)) or any(map(Tensor.is_inference, (*grads_A, *grads_B))):
            return None
        if 0 in addresses and any(compress(map(Tensor.numel, tensors), map(not_, addresses))):
            return None
        grad_base, n_grads = addresses[0], lengths[4] + lengths[5]
        if not set(addresses[:n_grads]).isdisjoint(filter(None, addresses[n_grads:])):
            # Gradients may move, and have moved onto what is read.
            return None
        # Tables serve the stream that they were copied on.
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream if tensors[0].is_cuda else None
        key = (
            lengths,
            stream,
            options,
            os.environ.get("TRITON_INTERPRET"),
            tuple(map(sub, addresses[:n_grads], repeat(grad_base))),
            addresses[n_grads:],
            tuple(scalings),
            kinds,
            is_present,
            tuple(map(_dtype, tensors)),
            tuple(map(Tensor.get_device, tensors)),
            tuple(map(Tensor.stride, tensors)),
            tuple(map(Tensor.size, tensors)),
        )
        return Signature(key, grad_base)
    except (TypeError, RuntimeError, AttributeError):
        # Not sequences, or tensors without storage or strides: the checks say what is wrong.
        return None


def find(found: Signature | None) -> Choice | None:
    """What was decided about the last call with this signature; None if it is not among the last few."""
    if found is None:
        return None
    calls = tuple(_calls)
    for call in calls:
        if call[0] == found.key:
            if call is not calls[0]:
                _calls[:] = (call, *(other for other in calls if other is not call))
            return call[1]
    return None


def remember(found: Signature, codes: list[int], backend: str, prepared: Prepared | None) -> None:
    """Keep what was decided for calls with this signature, in place of the one used least recently."""
    choice = Choice(codes, backend, prepared, found.grad_base)
    _calls[:] = ((found.key, choice), *_calls[: _MAX_CALLS - 1])


def is_intercepted() -> bool:
    """Whether a dispatch mode, a function transform or forward mode wants to see the operators of this call."""
    return torch._C._len_torch_dispatch_stack() > 0 or is_transformed()
