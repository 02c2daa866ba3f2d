"""Materialising reference: values and closed-form gradients of both penalties, in any floating dtype.

Forms every ``(out, in)`` matrix and follows the formulae line by line. Everything else is tested against this module,
so it is written to be read, not to be fast. Source: Das Biswas et al., EACL 2026 (arXiv 2601.02232) for the Hadamard
penalty; docs/math.md for the projected norm and the energy correction.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .autocast import without_autocast
from .lowrank import LowRank

__all__ = ["hadamard_grad", "hadamard_penalty", "past_squared", "spectral_grad", "spectral_penalty"]

Past = LowRank | Tensor | None


def past_squared(past: LowRank | Tensor) -> Tensor:
    """``W ⊙ W (+ ρκᵀ/τ)``, ``(out, in)``: all that the Hadamard penalty knows of the past."""
    if isinstance(past, Tensor):
        return past.square()
    squared = (past.left @ past.right).square()
    if past.row_energy is not None and past.col_energy is not None:
        total = past.row_energy.sum()
        # Nothing dropped: τ = 0 and the whole term is zero, not 0/0. A small τ has no inverse, but ρ/τ is at most 1.
        share = torch.where(total == 0, 0, past.row_energy / total)
        squared = squared + torch.outer(share, past.col_energy)
    return squared


def hadamard_penalty(lora_A: Tensor, lora_B: Tensor, past: Past, scaling: float = 1.0) -> Tensor:
    """``‖ΔW ⊙ W_past‖_F²`` with ``ΔW = scaling · B A``; 0-dim, differentiable by plain autograd."""
    if past is None:
        return (lora_A.sum() + lora_B.sum()) * 0
    with without_autocast(lora_A.device):
        delta = scaling * (lora_B @ lora_A)
        return (delta.square() * past_squared(past)).sum()


def hadamard_grad(lora_A: Tensor, lora_B: Tensor, past: Past, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Closed form ``∂P/∂A = 2s Bᵀ H``, ``∂P/∂B = 2s H Aᵀ``, ``H = ΔW ⊙ W ⊙ W``; returned as ``(grad_A, grad_B)``."""
    if past is None:
        return torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    with without_autocast(lora_A.device):
        h = scaling * (lora_B @ lora_A) * past_squared(past)
        return 2 * scaling * (lora_B.mT @ h), 2 * scaling * (h @ lora_A.mT)


def _even_split(past: LowRank | Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(past, LowRank):
        return past.left, past.right
    u, s, vh = torch.linalg.svd(past, full_matrices=False)
    root = s.sqrt()
    return u * root, root[:, None] * vh


def spectral_penalty(lora_A: Tensor, lora_B: Tensor, past: Past, scaling: float = 1.0) -> Tensor:
    """``‖Lᵀ ΔW Rᵀ‖_F²``, the projected norm; a dense past is split evenly by its SVD. Energies do not enter."""
    if past is None:
        return (lora_A.sum() + lora_B.sum()) * 0
    with without_autocast(lora_A.device):
        left, right = _even_split(past)
        return (left.mT @ (scaling * (lora_B @ lora_A)) @ right.mT).square().sum()


def spectral_grad(lora_A: Tensor, lora_B: Tensor, past: Past, scaling: float = 1.0) -> tuple[Tensor, Tensor]:
    """Closed form with ``H = L (Lᵀ ΔW Rᵀ) R``: ``∂P/∂A = 2s Bᵀ H``, ``∂P/∂B = 2s H Aᵀ``."""
    if past is None:
        return torch.zeros_like(lora_A), torch.zeros_like(lora_B)
    with without_autocast(lora_A.device):
        left, right = _even_split(past)
        h = left @ (left.mT @ (scaling * (lora_B @ lora_A)) @ right.mT) @ right
        return 2 * scaling * (lora_B.mT @ h), 2 * scaling * (h @ lora_A.mT)
