"""SLAO: tasks are merged into one adapter as they come, A and B each in its own way."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ella.lora import AdaptedLayer, adapted_layers

from .base import Arm

__all__ = ["Slao", "orthonormal_rows"]


class Slao(Arm):
    """SLAO (Qiao & Mahdavi 2025, "Merge before Forget", arXiv 2512.23017, algorithm 1), tasks i counted from 1:

    - task i > 1 starts from ``A = Qᵀ`` of ``A_{i-1}ᵀ = QR``, signs as of ``diag(R)``, and ``B = B_{i-1}``, both
      factors as fine-tuned, not as merged;
    - after it ``A_merge = A_i`` and ``B_merge ← B_merge + (B_i - B_merge) / √i``, and the merged factors are evaluated.

    The merged factors are the adapter that is saved; A as fine-tuned is A as merged, so B as fine-tuned is all that is
    carried beside it, whatever the number of tasks. Where ``lora_bias`` is set the bias goes as B does.

    Left out: nothing of the algorithm. A zero on ``diag(R)``, whose sign the paper's formula makes 0, counts as
    positive.
    """

    title = "SLAO"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fine_tuned: dict[str, Tensor] = {}
        self._merged: dict[str, Tensor] = {}

    @torch.no_grad()
    def before_task(self, index: int) -> None:
        if index == 0:
            return
        self._merged = {name: p.detach().clone() for name, p in self._interpolated().items()}
        for layer in self._layers():
            for a, _ in layer.factors(*layer.parameters()):
                if a.shape[0] > a.shape[1]:
                    raise ValueError(
                        f"{layer.name} has A of shape {tuple(a.shape)}, whose rows cannot be orthogonal; "
                        f"expected a rank of at most {a.shape[1]}"
                    )
                a.copy_(orthonormal_rows(a))
        for name, parameter in self._interpolated().items():
            parameter.copy_(self.fine_tuned[name])

    @torch.no_grad()
    def after_task(self, index: int, name: str) -> None:
        parameters = self._interpolated()
        self.fine_tuned = {key: p.detach().clone() for key, p in parameters.items()}
        for key, merged in self._merged.items():
            parameters[key].copy_(merged + (parameters[key] - merged) / math.sqrt(index + 1))
        self._merged = {}

    def tensors(self) -> dict[str, Tensor]:
        return self.fine_tuned

    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        self.fine_tuned = {name: tensors[name].to(p.device) for name, p in self._interpolated().items()}

    def _layers(self) -> list[AdaptedLayer]:
        return [layer for layer in adapted_layers(self.model, self.adapter) if layer.tied_to is None]

    def _interpolated(self) -> dict[str, nn.Parameter]:
        """B, and its bias, of every layer."""
        return {
            f"{layer.name}.{n}": p
            for layer in self._layers()
            for n, p in enumerate(layer.all_parameters(self.adapter)[1:])
        }


def orthonormal_rows(a: Tensor) -> Tensor:
    """``Qᵀ (r, in)`` of ``Aᵀ = QR`` with the signs that make ``diag(R)`` positive: A itself where its rows are so."""
    q, r = torch.linalg.qr(a.T.float() if a.dtype != torch.float64 else a.T)
    return (q * torch.where(r.diagonal() < 0, -1.0, 1.0)).T.to(a.dtype)
