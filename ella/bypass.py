"""A forward that computes LoRA past its layer (fused kernels) leaves finished tasks out: noticed in the first step.

The trained factors of such a layer get a gradient although the layer's variant never ran. A hook on each ``lora_B``
looks once, in the first backward after a fold in which the layer takes part, and goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn

from .acting import TASK, TogetherVariant
from .lora import AdaptedLayer

__all__ = ["ForwardWatch"]


class ForwardWatch:
    """Watches ``layers`` of ``model`` until each has been through a forward and a backward."""

    def __init__(self, model: nn.Module, layers: Iterable[AdaptedLayer]) -> None:
        # A gradient from elsewhere, a loss on the factors alone, is nobody's forward.
        self._ran = False
        self._root = model.register_forward_pre_hook(self._note_forward)
        self._handles: dict[int, torch.utils.hooks.RemovableHandle] = {}
        # Gradients of the penalty in the running backward: a layer that the forward leaves out has no other.
        self._penalty: dict[int, Tensor] = {}
        for layer in layers:
            variant = layer.module.lora_variant.get(TASK)
            if isinstance(variant, TogetherVariant):
                variant.ran = False
                parameter = layer.parameters()[1]
                if parameter.requires_grad:
                    self._handles[id(parameter)] = parameter.register_hook(
                        partial(self._look, layer.name, variant, id(parameter))
                    )

    def seen_by_penalty(self, parameter: nn.Parameter) -> Tensor:
        """``parameter`` as the penalty should take it, so that its gradient is told from the forward's."""
        if id(parameter) not in self._handles or not (parameter.requires_grad and torch.is_grad_enabled()):
            return parameter
        alias = parameter.view_as(parameter)
        alias.register_hook(partial(self._note, id(parameter)))
        return alias

    def close(self) -> None:
        for handle in (self._root, *self._handles.values()):
            handle.remove()
        self._handles.clear()

    def _note_forward(self, module: nn.Module, args: tuple) -> None:
        self._ran = True

    def _note(self, key: int, grad: Tensor) -> None:
        before = self._penalty.get(key)
        self._penalty[key] = grad if before is None else before + grad

    def _look(self, name: str, variant: TogetherVariant, key: int, grad: Tensor) -> None:
        penalty = self._penalty.pop(key, None)
        if variant.ran:
            self._handles.pop(key).remove()
            if not self._handles:
                self._root.remove()
        elif self._ran and (penalty is None or not torch.allclose(penalty, grad)):
            raise RuntimeError(
                f"the forward went past the LoRA layer {name}: its factors have a gradient, but PEFT's forward, in "
                "which finished tasks act, never ran. Fused LoRA kernels do that (Unsloth, axolotl's lora_*_kernel): "
                "switch them off, or merge finished tasks into the base weights with EllaConfig(keep_past='merge')"
            )
