"""The past update as low-rank factors, and its truncation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """Aggregated past update ``W_past = left @ right``, optionally with the energies of what was truncated away.

    Attributes:
        left: ``(out, k)``. For the spectral penalty the SVD ``U S Vᵀ`` must be split evenly, ``left = U√S``,
            ``right = √S Vᵀ``, as :func:`truncate` does; the Hadamard penalty takes any factors.
        right: ``(k, in)``.
        row_energy: ``(out,)`` row sums of the squared dropped part ``D``, ``ρ_i = Σ_j D_ij²``, or None.
        col_energy: ``(in,)`` column sums ``κ_j = Σ_i D_ij²``, or None. Both energies or neither.

    ``k = 0`` with energies is legal: a past of ``out + in`` numbers.
    """

    left: Tensor
    right: Tensor
    row_energy: Tensor | None = None
    col_energy: Tensor | None = None


def svd_factors(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of ``left @ right`` without forming it.

    Args:
        left: ``(out, k)``, any floating dtype.
        right: ``(k, in)``.

    Returns:
        ``U (out, m)``, ``S (m,)`` descending, ``Vh (m, in)`` in float64, ``m = min(out, in, k)``. What of ``S`` cannot
        be told from this function's own rounding is zero.
    """
    # QR and SVD in float64: a fold happens once per task, and its error would otherwise accumulate over tasks.
    left, right = left.double(), right.double()
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.mT)
    u, s, vh = torch.linalg.svd(r_left @ r_right.mT, full_matrices=False)
    if s.numel():
        # Of the sizes of what is multiplied, whatever cancels; ten times what was measured.
        noise = 4 * torch.finfo(torch.float64).eps * (_column_norms(left) * _column_norms(right.mT)).sum()
        s = torch.where(s > noise, s, 0)
    return q_left @ u, s, vh @ q_right.mT


def _column_norms(matrix: Tensor) -> Tensor:
    largest = matrix.abs().amax(0).clamp_min(torch.finfo(torch.float64).tiny)
    return largest * (matrix / largest).norm(dim=0)


def split_evenly(u: Tensor, s: Tensor, vh: Tensor, rank: int, dtype: torch.dtype) -> LowRank:
    """Keep the leading ``rank`` singular triplets as ``(U√S, √S Vᵀ)`` and the energies of the rest, if any."""
    root = s[:rank].sqrt()
    left = (u[:, :rank] * root).to(dtype)
    right = (root[:, None] * vh[:rank]).to(dtype)
    if s.numel() <= rank:
        return LowRank(left, right)
    dropped = s[rank:].square()
    row_energy = u[:, rank:].square() @ dropped
    col_energy = dropped @ vh[rank:].square()
    return LowRank(left, right, row_energy.to(dtype), col_energy.to(dtype))


@torch.no_grad()
def truncate(left: Tensor, right: Tensor, rank: int) -> LowRank:
    """Best rank-``rank`` approximation of ``left @ right`` with the energies of the dropped part (docs/math.md).

    Args:
        left: ``(out, k)``, floating.
        right: ``(k, in)``, same device.
        rank: components to keep, ``≥ 0``; ``rank ≥ k`` keeps everything and returns no energies. Those of a product
            that has no more than ``rank`` components are zero.

    Returns:
        :class:`LowRank` in float32 (float64 if either input is), columns ordered by singular value, split evenly.

    Raises:
        TypeError: ``rank`` is not an int, or a factor is not a dense floating tensor.
        ValueError: negative ``rank``, shapes or devices that do not fit, or a factor that is not finite.

    >>> past = truncate(torch.eye(4), torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.0])), 2)
    >>> past.left.shape, past.row_energy
    (torch.Size([4, 2]), tensor([0., 0., 1., 0.]))
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank must be an int, found {type(rank).__name__}")
    if rank < 0:
        raise ValueError(f"rank must be at least 0, found {rank}")
    for name, factor in (("left", left), ("right", right)):
        if not isinstance(factor, Tensor) or not factor.is_floating_point():
            found = factor.dtype if isinstance(factor, Tensor) else type(factor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, found {found}")
        if factor.layout is not torch.strided or factor.is_nested:
            raise TypeError(f"{name} must be a dense tensor, found {'nested' if factor.is_nested else factor.layout}")
        if factor.ndim != 2:
            raise ValueError(f"{name} must have 2 dimensions, found shape {tuple(factor.shape)}")
    if left.shape[1] != right.shape[0]:
        raise ValueError(f"right must have shape ({left.shape[1]}, in) to follow left, found {tuple(right.shape)}")
    if left.device != right.device:
        raise ValueError(f"right must be on left's device {left.device}, found {right.device}")
    if left.device.type != "meta" and not torch.compiler.is_compiling():
        for name, factor in (("left", left), ("right", right)):
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name} must be finite, found nan or inf in it")
    dtype = torch.float64 if torch.float64 in (left.dtype, right.dtype) else torch.float32
    try:
        u, s, vh = svd_factors(left, right)
    except torch.linalg.LinAlgError as error:
        raise ValueError("left @ right must be finite in float64, found nan or inf in it") from error
    return split_evenly(u, s, vh, rank, dtype)
