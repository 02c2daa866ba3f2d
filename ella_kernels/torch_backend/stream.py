"""Algorithms "stream" and "dense": tiles of ``B·A`` against tiles of the past, in plain torch.

The past is a tile source. "stream" rebuilds each tile from the factors, ``L·R``; "dense" reads it from a stored matrix.
One pass gives the value and both gradients (docs/math.md); nothing of more than a tile is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer import Layer
from .batching import deliver, shares, stack
from .powers import operand_units, over

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


class _Operands(NamedTuple):
    """What tiles are made of, and the powers of two it was divided by.

    Attributes:
        right: None where ``left`` is the past: its tiles are still to be divided by ``tile_unit``.
        shares, cols: energies, or None.
        unit_past: of the past; its square is that of the energies' product.
    """

    a: Tensor
    b: Tensor
    left: Tensor
    right: Tensor | None
    shares: Tensor | None
    cols: Tensor | None
    unit_a: Tensor | float = 1.0
    unit_b: Tensor | float = 1.0
    unit_past: Tensor | float = 1.0
    tile_unit: Tensor | float = 1.0


def _layer(layer: Layer, weight: Tensor | float) -> Tensor:
    dtype, s = layer.dtype, layer.scaling
    given = _operands(layer)
    a, b, left, right = given[:4]
    value = torch.zeros((), dtype=torch.float64, device=a.device)
    with_grad = layer.grad_A is not None
    if with_grad:
        grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    for i, j in _tiles(b.shape[0], a.shape[1]):
        delta = b[i] @ a[:, j]
        past = left[i, j].to(dtype) / given.tile_unit if right is None else left[i] @ right[:, j]
        squared = past.square_()
        if given.shares is not None:
            squared.addcmul_(given.shares[i, None], given.cols[None, j])
        h = squared.mul_(delta)  # ΔW ⊙ W ⊙ W
        value += torch.dot(h.flatten(), delta.flatten())
        if with_grad:
            grad_b[i].addmm_(h, a[:, j].mT)
            grad_a[:, j].addmm_(b[i].mT, h)
    unit = given.unit_a * given.unit_b * given.unit_past * s
    if with_grad:
        scale = 2 * unit * given.unit_past * s * weight
        deliver([layer.grad_B], [grad_b.double() * (given.unit_a * scale)])
        deliver([layer.grad_A], [grad_a.double() * (given.unit_b * scale)])
    return (value * unit * unit).to(dtype)


def _operands(layer: Layer) -> _Operands:
    dtype, is_stored = layer.dtype, layer.right is None
    past = [layer.left[None]] if is_stored else [layer.left.to(dtype)[None], layer.right.to(dtype)[None]]
    matrices = [layer.lora_A.to(dtype)[None], layer.lora_B.to(dtype)[None], *past]
    energies = [] if layer.row_energy is None else [shares([layer.row_energy]), stack([layer.col_energy])]
    units = operand_units(matrices, energies)
    own: tuple[Tensor | float, ...] = ()
    if units is not None:
        unit_a, unit_b, *units_past = (unit[0] for unit in units[: len(matrices)])
        unit_past = unit_left = units_past[0]
        if not is_stored:
            unit_past = unit_past * units_past[1]
        if energies:
            # Squares and energies are added up: the larger ones decide.
            unit_energy = (units[-2] * units[-1])[0]
            common = torch.maximum(unit_past, unit_energy)
            energies = [
                over(t, unit.square() * (common / unit_energy), dtype)
                for t, unit in zip(energies, units[-2:], strict=True)
            ]
            unit_left, unit_past = unit_left * (common / unit_past), common
        matrices[:2] = [over(matrices[0], unit_a, dtype), over(matrices[1], unit_b, dtype)]
        if not is_stored:
            matrices[2:] = [over(matrices[2], unit_left, dtype), over(matrices[3], units_past[1], dtype)]
        own = unit_a, unit_b, unit_past, unit_past if is_stored else 1.0
    a, b, left, *right = (t[0] for t in matrices)
    if layer.algorithm == "dense" and not is_stored:
        left, right = left @ right[0], []
    rows, cols = (t[0].to(dtype) for t in energies) if energies else (None, None)
    return _Operands(a, b, left, right[0] if right else None, rows, cols, *own)
