"""OSF: the weights themselves are trained, beside the singular directions that matter most in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ella.lora import AdaptedLayer, adapted_layers
from ella.merging import shared_weights

from ..checks import check_number
from .base import Arm

__all__ = ["Osf", "OsfSettings"]


@dataclass(frozen=True)
class OsfSettings:
    """``preserved`` is the share of every weight's singular directions, the largest, that no task changes."""

    preserved: float = 0.5

    def __post_init__(self) -> None:
        check_number("preserved", self.preserved, above=0, below=1)


class Osf(Arm):
    """OSF (Nayak et al. 2025, arXiv 2504.07097), by PEFT's ``OSFConfig``: no LoRA, and every weight that had one.

    Before a task ``W = U S V`` is split at ``preserved`` of its rank; the lower part ``U_low S_low V_low`` is trained,
    with gradients of U_low and V_low projected off the upper part's directions. After it the update is merged into W,
    so what is carried are the changed weights, of one size for all tasks, and the next split is of the merged W. The
    adapter's rank, α and dropout have no part in it: only its choice of modules.

    Left out, as in PEFT: a share per layer by its importance (the paper measures how alike a layer's input and output
    are) that grows with the tasks. The projection is of the gradient: AdamW, with which all methods are trained, scales
    it entry by entry, so the steps leave the subspace a little, as does weight decay.

    Between tasks ``classifier.model`` is the base model itself, a PeftModel only while a task is trained.

    Raises ValueError for a layer that is no plain linear one, or whose weight is another module's too.
    """

    begins_plain = False
    title = "OSF"
    Settings: ClassVar[type] = OsfSettings

    def begin(self) -> None:
        self._drop_lora()

    def before_task(self, index: int) -> None:
        from peft import OSFConfig, get_peft_model

        # A pattern, as names in a list are matched at the end of any path.
        targets = "|".join(map(re.escape, self._names))
        config = OSFConfig(effective_rank=self.settings.preserved, target_modules=targets, task_type=self._task_type)
        self.classifier.model = get_peft_model(self.model, config, adapter_name=self.adapter)

    def after_task(self, index: int, name: str) -> None:
        # unload() would leave the task behind.
        self.classifier.model = self.model.merge_and_unload()

    def tensors(self) -> dict[str, Tensor]:
        return {name: self.model.get_submodule(name).weight for name in self._names}

    @torch.no_grad()
    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        self._drop_lora()
        for name, weight in self.tensors().items():
            weight.copy_(tensors[name])

    def state_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def dense_bytes(self) -> tuple[int, int]:
        return sum(4 * t.numel() for t in self.tensors().values()), len(self._names)

    @property
    def adapter(self) -> str:
        return self.classifier.adapter_name

    def _drop_lora(self) -> None:
        layers = adapted_layers(self.model, self.adapter)
        _check(self.model, layers)
        self._names = [layer.name for layer in layers]
        self._task_type = self.model.peft_config[self.adapter].task_type
        self.classifier.model = self.model.unload()


def _check(model: Any, layers: list[AdaptedLayer]) -> None:
    shared = shared_weights(model, layers)
    for layer in layers:
        base = layer.module.get_base_layer()
        if layer.kind != "linear" or not isinstance(base, nn.Linear) or not base.weight.is_floating_point():
            raise ValueError(f"OSF trains plain linear layers; {layer.name} is a {type(base).__name__}")
        if layer.name in shared:
            raise ValueError(
                f"the weight of {layer.name} is another module's too, and OSF would change both: leave it out of "
                "target_modules"
            )
        if min(base.weight.shape) < 2:
            raise ValueError(f"the weight of {layer.name} is {tuple(base.weight.shape)}: there is nothing to split")
