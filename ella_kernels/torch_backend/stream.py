"""Algorithms "stream" and "dense": tiles of ``B·A`` against tiles of the past, in plain torch.

The past is a tile source. "stream" rebuilds each tile from the factors, ``L·R``; "dense" reads it from a stored matrix.
One pass gives the gradients, and from them the value (docs/math.md); nothing of more than a tile is kept. Of layers
under ``WIDE`` a tile is a whole layer, or several of one shape in batched products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer import Layer
from .batching import WORK_BYTES, Workspace, deliver, is_wide, run_batches, shares, stack
from .powers import operand_units, over

__all__ = ["hadamard_stream"]

# Of a tile; there are two, of B·A and of the past. Smaller ones cost more in launching than caches save.
_TILE_BYTES = 2**20


def _layers_per_batch(layer: Layer) -> int:
    out, in_, r, k = layer.sizes
    if is_wide(layer):
        return 1
    size = layer.dtype.itemsize
    # Stacked operands, the same again where they are of odd sizes, and the gradients, which are also float64.
    operands = (out + in_) * (size * (3 * r + 2 * k + 2) + 16 * r + 16)
    return min(_TILE_BYTES // (size * out * in_), (WORK_BYTES - 2 * _TILE_BYTES) // operands)


def _tiles(layer: Layer) -> Iterator[tuple[slice, slice]]:
    out, in_, *_ = layer.sizes
    limit = _TILE_BYTES // layer.dtype.itemsize
    if is_wide(layer):
        limit = min(limit, max(1, out * in_ // 2))
    cols = min(in_, 4096, limit)
    rows = max(1, limit // cols)
    for i in range(0, out, rows):
        for j in range(0, in_, cols):
            yield slice(i, min(i + rows, out)), slice(j, min(j + cols, in_))


def hadamard_stream(layers: Sequence[Layer], weight: Tensor | float = 1.0) -> list[Tensor]:
    """Hadamard penalty of each layer by tiles; arguments, results and gradients as ``gram.hadamard_gram``.

    A layer whose ``right`` is None has its past stored in ``left``; it is only read, tile by tile.

    Work memory: two tiles of 1 MiB, the gradients, and a copy of the operands where they are stacked, strided, of
    another dtype or of odd sizes. A batch of several layers stays within ``WORK_BYTES``.
    """
    work = Workspace()
    return run_batches(layers, _layers_per_batch, lambda group: _batch(group, weight, work))


class _Operands(NamedTuple):
    """What tiles are made of, stacked, and the powers of two they were divided by, ``(n,)`` float64 or None for 1.

    Attributes:
        a, b: ``(n, r, in)`` and ``(n, out, r)``.
        left, right: ``(n, out, k)`` and ``(n, k, in)``; ``right`` is None where ``left`` is the past, of any dtype: its
            tiles are still to be divided by ``unit_past``.
        shares, cols: energies ``(n, out)`` and ``(n, in)``, or None.
        unit_past: of the past; its square is that of the energies' product.
    """

    a: Tensor
    b: Tensor
    left: Tensor
    right: Tensor | None
    shares: Tensor | None
    cols: Tensor | None
    unit_a: Tensor | None = None
    unit_b: Tensor | None = None
    unit_past: Tensor | None = None

    def past_squared(self, i: slice, j: slice, out: Tensor) -> Tensor:
        """``W ⊙ W (+ ρκᵀ/τ)`` of a tile."""
        if self.right is not None:
            torch.bmm(self.left[:, i], self.right[:, :, j], out=out)
        else:
            out.copy_(self.left[:, i, j])
            if self.unit_past is not None:
                out.div_(self.unit_past[:, None, None])
        out.square_()
        if self.shares is not None and self.cols is not None:
            out.addcmul_(self.shares[:, i, None], self.cols[:, None, j])
        return out


def _batch(group: list[Layer], weight: Tensor | float, work: Workspace) -> Tensor:
    given = _operands(group, work)
    a, b = given.a, given.b
    n, r, in_ = a.shape
    out = b.shape[1]
    with_grad = group[0].grad_A is not None
    # The gradient of B lies as A does: products with tall results of r columns are half as fast.
    grad_a, grad_b = work.take("grad A", a, n, r, in_), work.take("grad B", a, n, r, out)
    for i, j in _tiles(group[0]):
        shape = n, i.stop - i.start, j.stop - j.start
        delta = torch.bmm(b[:, i], a[:, :, j], out=work.take("delta", a, *shape))
        h = given.past_squared(i, j, work.take("past", a, *shape)).mul_(delta)  # ΔW ⊙ W ⊙ W
        grad_b[:, :, i].baddbmm_(a[:, :, j], h.mT, beta=float(j.start > 0))
        if with_grad:
            grad_a[:, :, j].baddbmm_(b[:, i].mT, h, beta=float(i.start > 0))
    wide_b = grad_b.double()
    values = (wide_b * b.mT).sum((1, 2))  # ‖ΔW ⊙ W‖² = ⟨H·Aᵀ, B⟩
    unit = unit_past = torch.tensor([layer.scaling for layer in group], dtype=torch.float64).to(a.device)
    units = given.unit_a, given.unit_b
    if given.unit_a is not None and given.unit_b is not None and given.unit_past is not None:
        unit_past = unit * given.unit_past
        unit = unit_past * given.unit_a * given.unit_b
    if with_grad:
        scale = 2 * unit * unit_past * weight
        of_b, of_a = (scale if own is None else scale * own for own in units)
        wide_a = grad_a.double().mul_(of_a[:, None, None])
        wide_b = wide_b.mT.mul(of_b[:, None, None])
        deliver([layer.grad_B for layer in group], wide_b.contiguous())
        deliver([layer.grad_A for layer in group], wide_a)
    return (values * unit * unit).to(a.dtype)


def _operands(group: list[Layer], work: Workspace) -> _Operands:
    first, n = group[0], len(group)
    dtype, is_stored = first.dtype, first.right is None
    names = ("lora_A", "lora_B") if is_stored else ("lora_A", "lora_B", "left", "right")
    matrices = [work.stack(name, [getattr(layer, name) for layer in group], dtype) for name in names]
    if is_stored:
        # One matrix is read where it lies, in its own dtype.
        matrices.append(first.left[None] if n == 1 else work.stack("left", [layer.left for layer in group], dtype))
    energies = []
    if first.row_energy is not None:
        energies = [shares([layer.row_energy for layer in group]), stack([layer.col_energy for layer in group])]
    units = operand_units(matrices, energies)
    own: tuple[Tensor, ...] = ()
    if units is not None:
        unit_a, unit_b, unit_left, *unit_right = units[: len(matrices)]
        unit_past = unit_left if is_stored else unit_left * unit_right[0]
        if energies:
            # Squares and energies are added up: the larger ones decide.
            unit_energy = units[-2] * units[-1]
            common = torch.maximum(unit_past, unit_energy)
            energies = [
                over(t, unit.square() * (common / unit_energy), dtype)
                for t, unit in zip(energies, units[-2:], strict=True)
            ]
            unit_left, unit_past = unit_left * (common / unit_past), common
        divisors = [unit_a, unit_b] if is_stored else [unit_a, unit_b, unit_left, *unit_right]
        matrices[: len(divisors)] = [over(t, unit, dtype) for t, unit in zip(matrices, divisors, strict=False)]
        own = unit_a, unit_b, unit_past
    a, b, left, *right = matrices
    rows, cols = (t.to(dtype) for t in energies) if energies else (None, None)
    return _Operands(a, b, left, right[0] if right else None, rows, cols, *own)
