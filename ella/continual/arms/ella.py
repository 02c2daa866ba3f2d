"""ELLA: the penalty of this package, and its cheaper forms."""

from __future__ import annotations

from dataclasses import fields
from typing import ClassVar

from torch import Tensor

from ella.config import EllaConfig

from .base import FoldingArm

__all__ = ["Ella"]

#: Records of a task of which the importance is measured, one by one after its training, as EWC's F is.
MEASURED = 128


class Ella(FoldingArm):
    """ELLA (Das Biswas et al., EACL 2026, arXiv 2601.02232): λ‖ΔW ⊙ W_past‖_F² added to the loss from task 2 on.

    Nothing is left out. ``EllaConfig`` has the forms: ``penalty_rank`` uses the leading components,
    ``penalty="spectral"`` the projected norm, ``penalty="importance"`` (this package's own) puts the importance of a
    coordinate to the finished tasks' losses in place of ``W_past²``, measured on :data:`MEASURED` records of a task.
    """

    title = "ELLA"
    ella_fields: ClassVar[tuple[str, ...]] = tuple(f.name for f in fields(EllaConfig))

    def after_task(self, index: int, name: str) -> None:
        if self.ella.penalty == "importance":
            chosen = self.sample(index, MEASURED, 1)
            self.past.measure_importance(self.classifier.loss(task, rows) for task, rows in chosen)
        super().after_task(index, name)

    def state_bytes(self) -> int:
        importance = self.past.state().layers.values() if self.ella.penalty == "importance" else ()
        held = [part for layer in importance for part in layer.importance or ()]
        return super().state_bytes() + sum(t.numel() * t.element_size() for t in held)

    def extra_gradient(self, index: int) -> Tensor | None:
        return self.past.add_gradient_() if index > 0 else None
