"""Powers of two that bring odd operands to a common size, and their products back: no digit changes, nothing overflows.

A penalty multiplies eight numbers. In fp32 their products leave the range long before the penalty does: factors of 2⁴⁰
beside factors of 2⁻⁴⁰ have squares of 2⁸⁰ and 2⁻⁸⁰, and pairs of those are infinite or zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["narrowed", "operand_units", "over", "units"]

_EXPONENT = 0x7FF << 52
# Of an operand's largest element. Eight elements of the target, summed over a tile, are far from the end of fp32, and
# what is small beside outliers is far from its beginning.
_SMALLEST, _GREATEST, _TARGET = 2.0**-12, 2.0**12, 2.0**4


def units(sizes: Tensor, smallest: float, greatest: float, *targets: float) -> Tensor | None:
    """What to divide tensors by, given the largest element of each: 1 within the bounds, else powers of two, float64.

    Args:
        sizes: ``(n,)``. smallest, greatest: the bounds.
        targets: what too small and too great ones are brought to, up to a factor of two.

    Returns:
        ``(n,)``; None if all are 1 or belong to nothing but zeros, and it costs nothing to know.
    """
    if sizes.device.type == "cpu" and all(smallest <= size <= greatest or size == 0 for size in sizes.tolist()):
        return None
    sizes = sizes.double()
    floor = (sizes.view(torch.int64) & _EXPONENT).view(torch.float64)
    found = torch.where(sizes > greatest, floor / targets[-1], floor / targets[0])
    return torch.where((sizes >= smallest) & (sizes <= greatest), 1, found.clamp(2.0**-126, 2.0**126))


def operand_units(matrices: Sequence[Tensor], energies: Sequence[Tensor]) -> list[Tensor] | None:
    """:func:`units` of what a penalty multiplies; those of energies are roots, as energies are squares.

    Args:
        matrices: ``(n, ·, ·)`` each, any ``n``. energies: ``(n, ·)`` each.

    Returns:
        ``(n,)`` of each; None if all are 1.
    """
    if _are_usual(matrices, energies):
        return None
    sizes = [*map(_largest, matrices), *(t.amax(1).sqrt() for t in energies)]
    found = units(torch.cat(sizes), _SMALLEST, _GREATEST, _TARGET)
    return None if found is None else list(found.split(list(map(len, sizes))))


def _are_usual(matrices: Sequence[Tensor], energies: Sequence[Tensor]) -> bool:
    """Whether all units are known to be 1, by norms, which take one pass: the largest element is between root and norm.

    On a CPU only: looking at them would make the host wait for a device.
    """
    for t in matrices:
        if t.device.type != "cpu":
            return False
        if t.numel():
            norms = torch.linalg.vector_norm(t, 2, (1, 2), dtype=None if t.dtype == torch.float64 else torch.float32)
            smallest = _SMALLEST * math.sqrt(t.shape[1] * t.shape[2])
            if not all(smallest <= norm <= _GREATEST for norm in norms.tolist()):
                return False
    return all(_SMALLEST**2 <= size <= _GREATEST**2 or size == 0 for t in energies for size in t.amax(1).tolist())


def _largest(matrices: Tensor) -> Tensor:
    if matrices.numel() == 0:
        return matrices.new_zeros(len(matrices))
    if matrices.numel() < 2**20:
        return matrices.abs().amax((1, 2))
    # Slower, and copies nothing.
    return torch.maximum(matrices.amax((1, 2)), -matrices.amin((1, 2)))


def over(tensors: Tensor, unit: Tensor, dtype: torch.dtype) -> Tensor:
    """Each of ``(n, …)`` divided by its unit, in ``dtype``."""
    return (tensors / unit.to(tensors.dtype).view(-1, *[1] * (tensors.ndim - 1))).to(dtype)


def narrowed(
    coefficients: Tensor, dtype: torch.dtype, spare: Tensor | None = None, *, is_first: bool = True
) -> tuple[Tensor, Tensor | None]:
    """float64 coefficients ``(n, ·, ·)``, which may be overwritten, in ``dtype``, and what is left out of them.

    Returns:
        The coefficients, and the powers of two ``(n,)`` by which what they make is still to be multiplied, or None.
        Those of a first part serve for others: pass them with ``is_first=False``.
    """
    if is_first:
        spare = units(_largest(coefficients), 2.0**-90, 2.0**90, 2.0**-90, 2.0**90)
    if spare is not None:
        coefficients /= spare[:, None, None]
    return coefficients.to(dtype), spare
