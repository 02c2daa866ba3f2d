"""Many layers as one problem: batches of layers of one shape, and gradients on their way to their targets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layer import Layer

__all__ = ["deliver", "run_batches", "shares", "stack"]


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


def stack(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """``(n, …)`` in ``dtype``, contiguous; a single tensor that fits is viewed, not copied."""
    if len(tensors) == 1:
        return tensors[0].to(dtype).contiguous().unsqueeze(0)
    return torch.stack([t.to(dtype) for t in tensors])


def shares(energies: Sequence[Tensor]) -> Tensor:
    """Row energies ``ρ`` over their sum ``τ``, ``(n, out)`` float64; all zero where nothing was dropped.

    Whatever the size of the energies, these are at most 1, where ``1/τ`` may have no number.
    """
    rows = stack(energies)
    total = rows.sum(1, keepdim=True)
    return torch.where(total == 0, 0, rows / total)


def deliver(targets: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add each gradient, float32 or float64, to its target; the sum is formed in the wider dtype and rounded once."""
    if len(set(map(Tensor.data_ptr, targets))) == len(targets):
        torch._foreach_add_(list(targets), list(grads))
        return
    for target, grad in zip(targets, grads, strict=True):
        target.add_(grad)
