"""N-LoRA: sparse updates, so that those of two tasks seldom meet in one entry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from .base import FoldingArm

__all__ = ["NLora", "NLoraSettings"]

# Entries of ΔW that are in memory at once.
ENTRIES = 1 << 22


@dataclass(frozen=True)
class NLoraSettings:
    """``strength`` is λ. Entries are summed, so a number means more in a larger model: this one is not the paper's."""

    strength: float = 1e-4

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)


class NLora(FoldingArm):
    """N-LoRA (Yang et al., COLING 2025, arXiv 2410.10179): λ Σ_layers ‖ΔW_t‖₁ added to the loss of every task.

    ``ΔW_t = scaling · B_t A_t``, the update that acts, as everywhere in this package; its absolute entries are summed,
    so layers of any (out, in) count by their entries. With ``S = sign(ΔW_t)`` the gradients are ``λ · scaling · S Aᵀ``
    for B and ``λ · scaling · Bᵀ S`` for A. Earlier tasks do not enter: what keeps tasks apart is that each is sparse,
    the first one too, and nothing is carried beside the past.

    ΔW has to be formed, a block of rows at a time: time grows with out · in. Left out: nothing of the loss; finished
    updates are kept as factors, not merged into the base (``keep_past="merge"`` does that).
    """

    title = "N-LoRA"
    begins_plain = False
    Settings: ClassVar[type] = NLoraSettings

    def extra_gradient(self, index: int) -> Tensor:
        terms = []
        for layer in self.past.layers:
            if layer.tied_to is not None:
                continue
            weight = self.settings.strength * layer.scaling()
            for a, b in layer.factors(*layer.parameters()):
                for rows in b.split(max(1, ENTRIES // a.shape[1])):
                    term = weight * (rows @ a).abs().sum()
                    # At once, so that no more than this block is held for the backward.
                    term.backward()
                    terms.append(term.detach())
        return torch.stack([t.to(terms[0].device) for t in terms]).sum()
