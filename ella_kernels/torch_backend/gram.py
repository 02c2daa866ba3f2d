"""Algorithm "gram": the Hadamard penalty from Gram matrices of Khatri–Rao products, in plain torch.

``ΔW ⊙ ΔW`` and ``W ⊙ W`` are themselves low-rank, over the *unordered pairs* of components::

    (ΔW ⊙ ΔW)_ij = s² Σ_{a≤a'} ω_aa' (B_ia B_ia')(A_aj A_a'j)        ω = 1 on the diagonal, 2 off it
    (W  ⊙ W )_ij =    Σ_{c≤c'} ω_cc' (L_ic L_ic')(R_cj R_c'j)  + ρ_i κ_j / τ

so with the pair products as rows, ``BB (pairs, out)``, ``LL (q, out)``, ``AA (pairs, in)``, ``RR (q, in)``, where
``pairs = r(r+1)/2`` and ``q = k(k+1)/2`` (+ 1: the energy term of a truncated past is one more row)::

    P = s² ⟨ω ωᵀ ⊙ BB·LLᵀ, AA·RRᵀ⟩

and ``∂P/∂B_ia = 2 s² Σ_a' B_ia' Σ_cc' ω_cc' (AA·RRᵀ)_{aa',cc'} LL_{cc',i}`` (docs/math.md). Using pairs instead of all
``r·k`` products costs a quarter of the multiplications of the textbook form ``⟨XᵀX, YᵀY⟩`` and gives the same number.

Factors, pasts and energies of odd sizes are divided by powers of two (:mod:`powers`). The inner products, ``pairs·q``
numbers, are multiplied back in float64, where they have room.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..layer import Layer
from .batching import WORK_BYTES, Workspace, deliver, is_wide, run_batches, shares, stack
from .powers import narrowed, operand_units, over

__all__ = ["hadamard_gram"]

# Bytes for every inner product of two pairs, of both sides: in their dtype, in float64 and as coefficients in both.
_PRODUCT_BYTES = 48
# Σ|terms| / |Σ terms| beyond which a layer is done again in float64. Measured on five kinds of data and ten shapes: the
# worst error grows from 6e-7 at ratios up to 2 to 6e-6 at 16, and reaches 1e-3 at 4e5 (outlier channels).
_CANCELLATION = 16.0


def _n_pairs(m: int) -> int:
    return m * (m + 1) // 2


def _diagonal_blocks(r: int, q: int) -> Iterator[range]:
    """Split the diagonals ``d`` of the (a, a+d) pairs so that a (pairs, q) block takes half the work memory at most."""
    start, rows = 0, 0
    for d in range(r):
        if rows and _PRODUCT_BYTES * (rows + r - d) * q > WORK_BYTES // 2:
            yield range(start, d)
            start, rows = d, 0
        rows += r - d
    yield range(start, r)


def _multiplicity(m: int, diagonals: range, like: Tensor) -> Tensor:
    """ω for the pairs of ``diagonals``: 1 for d = 0, 2 otherwise."""
    omega = like.new_full((sum(m - d for d in diagonals),), 2.0)
    if 0 in diagonals:
        omega[:m] = 1.0
    return omega


class _Side:
    """Rows of B with L, or columns of A with R, of ``n`` layers: factors ``(n, r, c)``, pasts ``(n, k, c)``.

    Both sides of square layers make one ``_Side`` of ``2n``: half the operations to launch, twice the work in each.

    Attributes:
        limits: elements of pair products, of both kinds together and of the larger one.
        unit, row_units: ``(n, 1)`` and ``(n, q)``, what the factors and the rows of the past's pair products were
            divided by; None if by 1.
    """

    def __init__(
        self, name: str, work: Workspace, factor: Tensor, past: Tensor, energy: Tensor | None,
        limits: tuple[int, int],
        units: Sequence[Tensor] | None,
    ) -> None:  # fmt: skip
        self.name, self.work, self.limits = name, work, limits
        self.factor, self.past, self.energy = factor, past, energy
        self.n, self.r, self.width = factor.shape
        self.k = past.shape[1]
        self.q = _n_pairs(self.k) + (energy is not None)
        self.unit = self.row_units = None
        if units is not None:
            self.unit, past_unit, *energy_unit = (own[:, None] for own in units)
            self.row_units = torch.cat([past_unit.expand(-1, _n_pairs(self.k)), *energy_unit], 1).square()
        self.kept: tuple[slice, Tensor] | None = None

    def chunks(self, pairs: int) -> Iterator[slice]:
        both, largest = self.limits
        step = min(both // (self.n * (self.q + pairs)), largest // (self.n * max(self.q, pairs)))
        step = max(16, step)
        for start in range(0, self.width, step):
            yield slice(start, min(start + step, self.width))

    def _pair_products(self, name: str, factor: Tensor, diagonals: range, extra: Tensor | None = None) -> Tensor:
        """Products ``f_a f_{a+d}`` for ``d`` in ``diagonals``: ``(n, m, c) → (n, pairs [+ 1], c)``, ``extra`` last."""
        n, m, c = factor.shape
        pairs = sum(m - d for d in diagonals)
        out = self.work.take(self.name + name, factor, n, pairs + (extra is not None), c)
        row = 0
        for d in diagonals:
            torch.mul(factor[:, : m - d], factor[:, d:], out=out[:, row : row + m - d])
            row += m - d
        if extra is not None:
            out[:, pairs] = extra
        return out

    def past_pairs(self, c: slice) -> Tensor:
        if self.kept is None or self.kept[0] != c:
            energy = None if self.energy is None else self.energy[:, c]
            self.kept = (c, self._pair_products("past", self.past[:, :, c], range(self.k), energy))
        return self.kept[1]

    def gram(self, diagonals: range) -> Tensor:
        """``(n, pairs, q)`` float64: inner products of the factor's pairs with the past's, of their own size."""
        pairs = sum(self.r - d for d in diagonals)
        total = self.factor.new_zeros((self.n, pairs, self.q))
        for c in self.chunks(pairs):
            total.baddbmm_(self._pair_products("factor", self.factor[:, :, c], diagonals), self.past_pairs(c).mT)
        wide = self.work.take(self.name + "gram", total.new_empty(0, dtype=torch.float64), *total.shape).copy_(total)
        return wide if self.unit is None else wide.mul_((self.unit.square() * self.row_units)[:, None])

    def add_grad_(self, grad: Tensor, coefficients: Tensor, diagonals: range) -> None:
        """``grad[a] += Σ_a' (coefficients · past pairs)_{aa'} factor[a']`` for the pairs of ``diagonals``."""
        n, pairs, _ = coefficients.shape
        for c in self.chunks(pairs):
            past = self.past_pairs(c)
            weights = torch.bmm(
                coefficients, past, out=self.work.take(self.name + "factor", past, n, pairs, past.shape[2])
            )
            factor, out, row = self.factor[:, :, c], grad[:, :, c], 0
            for d in diagonals:
                m = self.r - d
                block = weights[:, row : row + m]
                out[:, :m].addcmul_(block, factor[:, d:])
                if d:
                    out[:, d:].addcmul_(block, factor[:, :m])
                row += m


def _fixed_bytes(layer: Layer, size: int) -> int:
    """Work memory of a layer that does not shrink with its chunks: stacks, gradients, inner products."""
    out, in_, r, k = layer.sizes
    q = _n_pairs(k) + 1
    rows = max(sum(r - d for d in diagonals) for diagonals in _diagonal_blocks(r, q))
    return size * (out + in_) * (2 * r + k) + _PRODUCT_BYTES * rows * q


def _pair_bytes(layer: Layer, size: int) -> int:
    """Pair products of the factors and of the past, both sides."""
    out, in_, r, k = layer.sizes
    return size * (out + in_) * (_n_pairs(r) + _n_pairs(k) + 1)


def _layers_per_batch(layer: Layer) -> int:
    out, in_, r, k = layer.sizes
    size = layer.dtype.itemsize
    n = WORK_BYTES // (_fixed_bytes(layer, size) + _pair_bytes(layer, size))
    if is_wide(layer):
        n = min(n, (out * in_ - 1) // (2 * max(out, in_) * max(_n_pairs(r), _n_pairs(k) + 1)))
    return n


def _sides(group: list[Layer], work: Workspace, dtype: torch.dtype) -> list[_Side]:
    """Rows and columns of ``group``: one side of both where a square layer's work is small, else two."""
    out, in_, *_ = group[0].sizes
    sides = {
        "rows": [[layer.lora_B.mT for layer in group], [layer.left.mT for layer in group]],
        "cols": [[layer.lora_A for layer in group], [layer.right for layer in group]],
    }
    energies = []
    if group[0].row_energy is not None:
        energies = [shares([layer.row_energy for layer in group]), stack([layer.col_energy for layer in group])]
    first, n, size = group[0], len(group), dtype.itemsize
    limit = max(WORK_BYTES - n * _fixed_bytes(first, size), WORK_BYTES // 4) // size
    if out == in_ and n * _pair_bytes(first, size) <= limit * size:
        sides = {"both": [rows + cols for rows, cols in zip(*sides.values(), strict=True)]}
        energies = [torch.cat(energies)] if energies else []
    largest = out * in_ - 1 if is_wide(first) else limit
    stacked: list[Any] = [
        work.stack(f"{name} {i}", part, dtype) for name, parts in sides.items() for i, part in enumerate(parts)
    ]
    units = operand_units(stacked, energies)
    if units is not None:
        stacked = [over(t, unit, dtype) for t, unit in zip(stacked, units, strict=False)]
        energies = [over(t, unit.square(), dtype) for t, unit in zip(energies, units[len(stacked) :], strict=True)]
    return [
        _Side(
            name, work, *stacked[2 * i : 2 * i + 2], energies[i].to(dtype) if energies else None,
            (limit // len(sides), largest), units and [*units[2 * i : 2 * i + 2], *units[len(stacked) + i :][:1]],
        )
        for i, name in enumerate(sides)
    ]  # fmt: skip


def hadamard_gram(layers: Sequence[Layer], weight: Tensor | float = 1.0) -> list[Tensor]:
    """Hadamard penalty of each layer; gradients are added to ``grad_A`` and ``grad_B`` where those are given.

    Args:
        layers: checked layers with low-rank pasts, none of them zero by shape.
        weight: factor on the gradients, a number or a 0-dim tensor; the values are unweighted.

    Returns:
        One 0-dim value per layer, in the layer's arithmetic dtype.

    Work memory: a batch of several layers stays within ``WORK_BYTES``. So does the work on one layer, in chunks, apart
    from ``r·k²`` coefficients, its gradients, and copies of its operands where they are strided or of another dtype.
    """
    work = Workspace()
    return run_batches(layers, _layers_per_batch, lambda group: _batch(group, weight, work, group[0].dtype))


def _batch(group: list[Layer], weight: Tensor | float, work: Workspace, dtype: torch.dtype) -> Tensor:
    first, n = group[0], len(group)
    sides = _sides(group, work, dtype)
    r, k, like = sides[0].r, sides[0].k, sides[0].factor
    scaling = torch.tensor([layer.scaling for layer in group], dtype=torch.float64).to(like.device)
    past_weight = _multiplicity(k, range(k), scaling)  # [q]
    if first.row_energy is not None:
        past_weight = torch.cat([past_weight, past_weight.new_ones(1)])

    values, magnitude = torch.zeros(2, n, dtype=torch.float64, device=like.device)
    with_grad = first.grad_A is not None
    if with_grad:
        grads = [work.take(side.name + "grad", side.factor, *side.factor.shape).zero_() for side in sides]
        grad_scale, spare = (2 * scaling * scaling * weight).repeat(2)[:, None, None], None
        if sides[0].unit is not None:
            # [2n, 1, q]: by the rows that the coefficients multiply, and the factors.
            grad_scale = grad_scale * torch.cat([side.unit * side.row_units for side in sides])[:, None]
    for diagonals in _diagonal_blocks(r, sides[0].q):
        grams = [side.gram(diagonals) for side in sides]
        of_rows, of_cols = grams if len(sides) == 2 else grams[0].split(n)  # [n, pairs, q] each
        omega = _multiplicity(r, diagonals, scaling)[:, None]
        weighted = of_cols.mul_(past_weight)
        if with_grad:
            # The gradient of one side has the other side's Gram matrix as its coefficients.
            coefficients = work.take("coefficients", scaling, 2 * n, *weighted.shape[1:])
            torch.mul(weighted, grad_scale[:n], out=coefficients[:n])
            torch.mul(of_rows, past_weight * grad_scale[n:], out=coefficients[n:])
            # No inner product is larger than the largest of the squares, which the first diagonal has.
            coefficients, spare = narrowed(coefficients, dtype, spare, is_first=0 in diagonals)
            for side, grad, of_other in zip(sides, grads, coefficients.split(2 * n // len(sides)), strict=True):
                side.add_grad_(grad, of_other, diagonals)
        products = weighted.mul_(omega).mul_(of_rows)
        values += products.sum((1, 2))
        magnitude += products.abs_().sum((1, 2))
    values = values * scaling * scaling
    again = _cancelled(values, magnitude * scaling * scaling, dtype)
    if again:
        values[again] = _batch([group[i] for i in again], weight, work, torch.float64)
    kept = [i for i in range(n) if i not in again]
    if with_grad and kept:
        if spare is not None:
            grads = [grad * own[:, None, None] for grad, own in zip(grads, spare.split(len(grads[0])), strict=True)]
        grad_rows, grad_cols = grads if len(sides) == 2 else grads[0].split(n)
        if again:
            grad_rows, grad_cols = grad_rows[kept], grad_cols[kept]
        deliver([group[i].grad_B.mT for i in kept], grad_rows)
        deliver([group[i].grad_A for i in kept], grad_cols)
    return values.to(dtype)


def _cancelled(values: Tensor, magnitude: Tensor, dtype: torch.dtype) -> list[int]:
    """Layers whose terms cancel so far that float32 products lose the digits: these are done again in float64.

    On a CPU only: looking at the values would make the host wait for a device.
    """
    if dtype == torch.float64 or values.device.type != "cpu":
        return []
    return (magnitude > _CANCELLATION * values.abs()).nonzero().flatten().tolist()
