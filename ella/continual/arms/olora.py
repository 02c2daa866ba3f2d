"""O-LoRA: every task's A is kept away from the A of all tasks before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..checks import check_number
from .base import FoldingArm

__all__ = ["OLora", "OLoraSettings"]


@dataclass(frozen=True)
class OLoraSettings:
    """``strength`` is λ₁; 0.5 is what the paper's code runs T5 with."""

    strength: float = 0.5

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)


class OLora(FoldingArm):
    """O-LoRA (Wang et al., Findings of EMNLP 2023, arXiv 2310.14152): λ₁ Σ_{i<t} ‖A_i A_tᵀ‖₁ from task 2 on.

    The absolute entries are summed over all adapted layers, as in the paper's code; the paper's formula squares them.
    The gradient is ``λ₁ sign(A_t A_iᵀ) A_i``, for A alone. The rows of every A stay as they were trained, so what is
    carried grows by an A of every layer per task, whatever ``past_rank`` caps the finished tasks at.

    Left out: the penalty on the norms of the new factors (λ₂) that the code offers beside this one.
    """

    title = "O-LoRA"
    Settings: ClassVar[type] = OLoraSettings
    #: (tasks · r, in) by layer and part: the rows of the A of all finished tasks.
    earlier: dict[str, Tensor]

    def begin(self) -> None:
        super().begin()
        self.earlier = {}

    def extra_gradient(self, index: int) -> Tensor | None:
        if index == 0:
            return None
        terms = [(a @ self.earlier[name].T).abs().sum() for name, a in self._rows().items()]
        term = self.settings.strength * torch.stack([t.to(terms[0].device) for t in terms]).sum()
        term.backward()
        return term.detach()

    def after_task(self, index: int, name: str) -> None:
        for key, a in self._rows().items():
            before = [self.earlier[key]] if key in self.earlier else []
            self.earlier[key] = torch.cat([*before, a.detach()])
        super().after_task(index, name)

    def tensors(self) -> dict[str, Tensor]:
        return self.earlier

    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        self.earlier = {name: tensors[name].to(a.device) for name, a in self._rows().items()}

    def _rows(self) -> dict[str, Tensor]:
        """``A (r, in)`` in training, by layer and part."""
        return {
            f"{layer.name}.{part}": a
            for layer in self.past.layers
            if layer.tied_to is None
            for part, (a, _) in enumerate(layer.factors(*layer.parameters()))
        }
