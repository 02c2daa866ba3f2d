"""Models of linear LoRA layers only, the usual case: a factor is a parameter, and a step reads all of them at once.

:class:`~ella.lora.AdaptedLayer` looks a factor up through several calls. Here the same dictionaries of PEFT and torch
modules are read by loops in C, in every step anew: parameters may be replaced at any time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from operator import attrgetter, is_, itemgetter

import torch
from torch import Tensor, nn

from .lora import AdaptedLayer

__all__ = ["ALIGNMENT", "LinearLayers", "gradients"]

_modules, _parameters, _weight = attrgetter("_modules"), attrgetter("_parameters"), itemgetter("weight")
_requires_grad, _grad, _device, _scaling = map(attrgetter, ("requires_grad", "grad", "device", "scaling"))
_PARAMETER = frozenset({nn.Parameter})
# Elements; at least 128 bytes in any dtype, so that vector loads of gradients stay aligned.
ALIGNMENT = 64


class LinearLayers:
    """The factors of ``layers``, if all of them hold them as linear maps; else nothing is ever found."""

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self._lora_modules = [layer.module for layer in layers] if all(layer.plain for layer in layers) else []

    def parameters(self, adapter: str) -> list[nn.Parameter] | None:
        """All ``A``, then all ``B`` of an adapter, in the layers' order; None where a layer lacks it."""
        try:
            return [*self._weights("lora_A", adapter), *self._weights("lora_B", adapter)] or None
        except (KeyError, AttributeError):
            return None

    def trainable(self, adapter: str) -> list[nn.Parameter] | None:
        """:meth:`parameters`, if none is of a subclass or frozen and all are on one device."""
        found = self.parameters(adapter)
        if found is None or not _PARAMETER.issuperset(map(type, found)) or not all(map(_requires_grad, found)):
            return None
        return found if len(set(map(_device, found))) == 1 else None

    def scalings(self, adapter: str) -> tuple[float, ...] | None:
        """``α/r`` of each layer as it is now; None where factors are not found either."""
        return tuple(map(itemgetter(adapter), map(_scaling, self._lora_modules))) or None

    def _weights(self, name: str, adapter: str) -> Iterator[nn.Parameter]:
        holders = map(itemgetter(name), map(_modules, self._lora_modules))
        return map(_weight, map(_parameters, map(itemgetter(adapter), map(_modules, holders))))


def gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """``.grad`` of each parameter, all of one device; where it is missing, zeros are made."""
    found = list(map(_grad, parameters))
    if any(map(is_, found, repeat(None))):
        _make_gradients([p for p, grad in zip(parameters, found, strict=True) if grad is None])
        found = list(map(_grad, parameters))
    return found


def _make_gradients(parameters: Sequence[nn.Parameter]) -> None:
    # One allocation and one launch per dtype, and places relative to each other that are the same in every step.
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_dtype.setdefault(parameter.dtype, []).append(parameter)
    for dtype, alike in by_dtype.items():
        sizes = [-(-p.numel() // ALIGNMENT) * ALIGNMENT for p in alike]
        flat = torch.zeros(sum(sizes), dtype=dtype, device=alike[0].device)
        for parameter, part in zip(alike, flat.split(sizes), strict=True):
            # `.data`: with a version of its own, as a gradient made by autograd has, not a view of the others'.
            parameter.grad = part[: parameter.numel()].view(parameter.shape).data
