"""LiNeS: what a task changed in shallow layers is taken back in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..checks import check_number
from .base import FoldingArm

__all__ = ["Lines", "LinesSettings", "depth_of"]


@dataclass(frozen=True)
class LinesSettings:
    """``shallow`` is the factor of the first block, of 0 to 1; 1 leaves updates as they are. 0.5 is not the paper's."""

    shallow: float = 0.5

    def __post_init__(self) -> None:
        check_number("shallow", self.shallow, least=0)
        if self.shallow > 1:
            raise ValueError(f"shallow is {self.shallow!r}; expected a number of 0 to 1")


class Lines(FoldingArm):
    """LiNeS (Wang et al. 2024, arXiv 2410.17146): a finished update is scaled by a factor linear in depth.

    ``ΔW_l ← (α + β (l - 1) / (L - 1)) ΔW_l`` for block l of L, here with ``α = shallow`` and ``β = 1 - shallow``: the
    last block is left as it is. The paper edits one fine-tuned model, or the task vectors that are merged into one.
    Here it is applied once to every task of a stream, when it is finished and before it is folded, so the next tasks
    are trained on the scaled one, and the task's own score is that of the scaled one too. Nothing is added to a step
    and nothing carried beside the past.

    Blocks are counted in the stack they are in, so a decoder's first one has ``shallow`` again; layers outside of any
    stack (a head) keep their update, as do those of a stack of one block. Left out: choosing β on held-out data.
    """

    title = "LiNeS"
    Settings: ClassVar[type] = LinesSettings

    @torch.no_grad()
    def after_task(self, index: int, name: str) -> None:
        root = self.model.base_model.model
        for layer in self.past.layers:
            if layer.tied_to is None:
                factor = self.settings.shallow + (1 - self.settings.shallow) * depth_of(root, layer.name)
                # B and its bias: the layer's effect is linear in the two.
                for parameter in layer.all_parameters(layer.adapter)[1:]:
                    parameter.mul_(factor)
        super().after_task(index, name)


def depth_of(root: Any, name: str) -> float:
    """0 to 1: where the first numbered block in ``name`` (``layers.3`` of 0 to 11: 3/11) stands in its list; else 1."""
    module = root
    for part in name.split("."):
        if isinstance(module, nn.ModuleList) and part.isdigit():
            return int(part) / (len(module) - 1) if len(module) > 1 else 1.0
        module = getattr(module, part, None)
    return 1.0
