"""Many layers as one problem: batches of layers of one shape, their work memory, and gradients to their targets."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layer import Layer

__all__ = ["WIDE", "WORK_BYTES", "Workspace", "deliver", "is_wide", "run_batches", "shares", "stack"]

# What the work tensors of one batch take together, for every algorithm and whatever the layers: large enough that the
# operations, not their launching, take the time; small enough to stay in a shared cache.
WORK_BYTES = 12 * 2**20
# Layers this wide, in either direction, are worked off in tensors of fewer elements than the weight.
WIDE = 512


def run_batches(
    layers: Sequence[Layer], per_batch: Callable[[Layer], int], batch: Callable[[list[Layer]], Tensor]
) -> list[Tensor]:
    """Values of ``layers`` from ``batch``, called on up to ``per_batch(layer)`` layers that may be stacked."""
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        key = (layer.sizes, layer.dtype, layer.right is None, layer.row_energy is None, layer.grad_A is None)
        groups.setdefault(key, []).append(index)
    values: dict[int, Tensor] = {}
    for indices in groups.values():
        size = max(1, per_batch(layers[indices[0]]))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            values.update(zip(chosen, batch([layers[i] for i in chosen]).unbind(), strict=True))
    return [values[i] for i in range(len(layers))]


class Workspace:
    """Named buffers kept for one call: fresh pages for every product would cost more than the product."""

    def __init__(self) -> None:
        self._buffers: dict[tuple, Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Uninitialised view of ``shape``; valid until the name is taken again."""
        size, key = math.prod(shape), (name, like.dtype)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = like.new_empty(size)
        return self._buffers[key][:size].view(shape)

    def stack(self, name: str, tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
        """:func:`stack` into the buffer ``name``; a single tensor that fits is viewed, not copied."""
        if len(tensors) == 1 or any(tensor.dtype != dtype for tensor in tensors):
            return stack(tensors, dtype)
        return torch.stack(tensors, out=self.take(name, tensors[0], len(tensors), *tensors[0].shape))


def stack(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """``(n, …)`` in ``dtype``, contiguous; a single tensor that fits is viewed, not copied."""
    if len(tensors) == 1:
        return tensors[0].to(dtype).contiguous().unsqueeze(0)
    return torch.stack([t.to(dtype) for t in tensors])


def is_wide(layer: Layer) -> bool:
    """Whether no work tensor may have as many elements as the layer's weight; of narrow layers, bytes alone count."""
    out, in_, *_ = layer.sizes
    return max(out, in_) >= WIDE


def shares(energies: Sequence[Tensor]) -> Tensor:
    """Row energies ``ρ`` over their sum ``τ``, ``(n, out)`` float64; all zero where nothing was dropped.

    Whatever the size of the energies, these are at most 1, where ``1/τ`` may have no number.
    """
    rows = stack(energies)
    total = rows.sum(1, keepdim=True)
    return torch.where(total == 0, 0, rows / total)


def deliver(targets: Sequence[Tensor], grads: Tensor) -> None:
    """Add gradients ``(n, …)``, float32 or float64, to a target each; the sum is formed in float32 or a wider dtype."""
    if not any(target.dtype == torch.float64 for target in targets):
        # Once for all: adding what is of another dtype converts it piece by piece.
        grads = grads.float()
    if len(set(map(Tensor.data_ptr, targets))) == len(targets):
        torch._foreach_add_(list(targets), list(grads.unbind()))
        return
    for target, grad in zip(targets, grads.unbind(), strict=True):
        target.add_(grad)
