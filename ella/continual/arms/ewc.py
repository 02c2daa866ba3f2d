"""EWC: weights that mattered to earlier tasks are held where those left them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..checks import check_count, check_number
from .base import Arm

__all__ = ["Ewc", "EwcSettings"]


@dataclass(frozen=True)
class EwcSettings:
    """``strength`` is λ, ``decay`` γ; F is of at most ``fisher_batches`` batches of ``fisher_batch`` records."""

    strength: float = 1e3
    decay: float = 1.0
    fisher_batches: int = 128
    fisher_batch: int = 1

    def __post_init__(self) -> None:
        check_number("strength", self.strength, least=0)
        check_number("decay", self.decay, least=0)
        check_count("fisher_batches", self.fisher_batches)
        check_count("fisher_batch", self.fisher_batch)


class Ewc(Arm):
    """EWC on one adapter: λ/2 Σ F (θ - θ*)² from task 2 on (Kirkpatrick et al. 2017, arXiv 1612.00796, eq. 3).

    θ are the factors A and B, θ* what the last task left. After a task ``F ← γF + F_task``: the online form of Schwarz
    et al. 2018 (arXiv 1805.06370), so what is carried is F and θ*, twice the adapter however many tasks there are.
    ``F_task`` is the empirical Fisher: the mean over training batches of the squared gradient of the task's loss at its
    labels. It is that of single records with ``fisher_batch=1``; larger batches are faster and squared means are
    smaller.

    Left out: a penalty of its own per task (Kirkpatrick et al.), labels drawn from the model, F normalised over tasks.
    """

    title = "EWC"
    Settings: ClassVar[type] = EwcSettings

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.fisher: dict[str, Tensor] = {}
        self.anchor: dict[str, Tensor] = {}

    def before_task(self, index: int) -> None:
        # The adapter is what the last task left: it is saved as such.
        if index > 0:
            self.anchor = {name: p.detach().clone() for name, p in self._parameters().items()}

    @torch.no_grad()
    def extra_gradient(self, index: int) -> Tensor | None:
        if index == 0:
            return None
        terms = []
        for name, parameter in self._parameters().items():
            moved = parameter - self.anchor[name]
            gradient = self.settings.strength * self.fisher[name] * moved
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad.add_(gradient)
            terms.append(0.5 * (gradient * moved).sum())
        return torch.stack([t.to(terms[0].device) for t in terms]).sum()

    def after_task(self, index: int, name: str) -> None:
        found = self._fisher(index)
        self.fisher = {
            key: self.settings.decay * self.fisher[key] + new if key in self.fisher else new
            for key, new in found.items()
        }

    def _fisher(self, index: int) -> dict[str, Tensor]:
        """The mean squared gradient of the task's loss, float32, in eval mode."""
        parameters = self._parameters()
        total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
        chosen = self.sample(index, self.settings.fisher_batches, self.settings.fisher_batch)
        for task, rows in chosen:
            loss = self.classifier.loss(task, rows)
            gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.float().square() / len(chosen)
        return total

    def tensors(self) -> dict[str, Tensor]:
        return self.fisher

    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        self.fisher = {name: tensors[name].to(p.device) for name, p in self._parameters().items()}

    def state_bytes(self) -> int:
        anchor = self._parameters() if self.fisher else {}
        return sum(t.numel() * t.element_size() for t in [*self.fisher.values(), *anchor.values()])

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}
