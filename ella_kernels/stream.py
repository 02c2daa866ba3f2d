"""Algorithms "stream" and "dense": tiles of ``B·A`` against tiles of the past, in plain torch.

The past is a tile source. "stream" rebuilds each tile from the factors, ``L·R``; "dense" reads it from a stored matrix.
One pass gives the value and both gradients; nothing of more than a tile is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .grouped import Layer, deliver

__all__ = ["hadamard_stream"]

# Elements of one tile. Four fp32 tiles of 2**17 stay in cache together; the matmuls are still large enough.
_TILE = 2**17


def _tiles(out: int, in_: int) -> Iterator[tuple[slice, slice]]:
    limit = min(_TILE, max(1, out * in_ // 4))
    cols = min(in_, 4096, limit)
    rows = max(1, limit // cols)
    for i in range(0, out, rows):
        for j in range(0, in_, cols):
            yield slice(i, min(i + rows, out)), slice(j, min(j + cols, in_))


def hadamard_stream(layers: Sequence[Layer], weight: Tensor | float = 1.0) -> list[Tensor]:
    """Hadamard penalty of each layer by tiles; arguments, results and gradients as ``gram.hadamard_gram``.

    A layer whose ``right`` is None has its past stored in ``left``; it is only read, tile by tile.
    """
    return [_layer(layer, weight) for layer in layers]


def _layer(layer: Layer, weight: Tensor | float) -> Tensor:
    dtype, s = layer.dtype, layer.scaling
    a, b = layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    left, right = layer.left, layer.right
    if right is not None:
        left, right = left.to(dtype), right.to(dtype)
        if layer.algorithm == "dense":
            left, right = left @ right, None
    row_energy = col_energy = None
    if layer.row_energy is not None:
        row_energy, col_energy = layer.row_energy.to(dtype), layer.col_energy.to(dtype)
        total = row_energy.sum()
        row_energy = row_energy * torch.where(total == 0, total, 1 / total)

    value = torch.zeros((), dtype=torch.float64, device=a.device)
    with_grad = layer.grad_A is not None
    if with_grad:
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    for i, j in _tiles(b.shape[0], a.shape[1]):
        delta = b[i] @ a[:, j]
        past = left[i, j].to(dtype) if right is None else left[i] @ right[:, j]
        squared = past * past if right is None else past.square_()
        if row_energy is not None:
            squared.addcmul_(row_energy[i, None], col_energy[None, j])
        h = squared.mul_(delta)  # ΔW ⊙ W ⊙ W
        value += torch.dot(h.flatten(), delta.flatten())
        if with_grad:
            grad_b[i].addmm_(h, a[:, j].mT)
            grad_a[:, j].addmm_(b[i].mT, h)
    if with_grad:
        factor = (2 * s**2) * (weight.double() if isinstance(weight, Tensor) else weight)
        deliver([layer.grad_B], [grad_b * factor])
        deliver([layer.grad_A], [grad_a * factor])
    return (value * s**2).to(dtype)
