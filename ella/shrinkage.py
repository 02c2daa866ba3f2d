"""The shrinkage operator and the interference bound of the ELLA paper: the theory behind the penalty, for analysis.

Training uses the penalty; these act on dense matrices and are meant for diagnostics and tests. Source: Das Biswas et
al., EACL 2026 (arXiv 2601.02232); docs/math.md has them beside the penalty.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["interference", "interference_bound", "shrink", "shrink_spectral"]


def shrink(gradient: Tensor, past: Tensor, ella_lambda: float, eps: float = 0.0) -> Tensor:
    """``argmin ½‖ΔW - G‖² + (λ/2)‖E ⊙ ΔW‖² = G / (1 + λE²)`` with ``E = |W_past| + ε``, entry by entry.

    Args:
        gradient: ``G``, ``(out, in)``, the update wanted by the task.
        past: ``W_past``, ``(out, in)``.
        ella_lambda: λ ≥ 0.
        eps: ε ≥ 0.

    Raises ValueError for shapes that differ or a negative or non-finite λ or ε.

    >>> shrink(torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 1.0]]), 1.0)
    tensor([[2., 1.]])
    """
    weight = _energy(gradient, past, eps)
    return gradient / (1 + _strength("ella_lambda", ella_lambda) * weight.square())


def shrink_spectral(gradient: Tensor, left: Tensor, right: Tensor, ella_lambda: float) -> Tensor:
    """The same for the spectral penalty: ``(UᵀΔW V)_ij = (UᵀG V)_ij / (1 + λ S_i S_j)``, ``G`` elsewhere.

    Args:
        gradient: ``(out, in)``. left: ``(out, k)``, right: ``(k, in)`` with ``W_past = left @ right = U S Vᵀ``.
        ella_lambda: λ ≥ 0.
    """
    u, s, vh = torch.linalg.svd(left @ right, full_matrices=False)
    rank = int((s > s.max() * max(left.shape[0], right.shape[1]) * torch.finfo(s.dtype).eps).sum()) if s.numel() else 0
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    inside = u.mT @ gradient @ vh.mT
    strength = _strength("ella_lambda", ella_lambda) * s[:, None] * s[None, :]
    return gradient - u @ (inside * (strength / (1 + strength))) @ vh


def interference(update: Tensor, past: Tensor) -> Tensor:
    """``⟨ΔW, W_past⟩``, 0-dim: what the update writes along the past."""
    return (update * past).sum()


def interference_bound(gradient: Tensor, past: Tensor, ella_lambda: float, eps: float) -> Tensor:
    """Upper bound ``‖G‖_F / (2√λ) · ‖E⁻¹ ⊙ W_past‖_F`` on :func:`interference` of the shrunk update, 0-dim.

    Args: as :func:`shrink`, with λ > 0; where ``ε = 0`` entries with ``W_past = 0`` count as zero.
    """
    if _strength("ella_lambda", ella_lambda) == 0:
        raise ValueError("ella_lambda must be above 0: without a penalty there is no bound")
    weight = _energy(gradient, past, eps)
    ratio = torch.where(weight > 0, past / weight, torch.zeros_like(past))
    return gradient.norm() / (2 * math.sqrt(ella_lambda)) * ratio.norm()


def _energy(gradient: Tensor, past: Tensor, eps: float) -> Tensor:
    if gradient.shape != past.shape:
        raise ValueError(f"past must have the gradient's shape {tuple(gradient.shape)}, found {tuple(past.shape)}")
    return past.abs() + _strength("eps", eps)


def _strength(name: str, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} must be finite and at least 0, found {value}")
    return value
