"""How much losses depend on the rows and columns of a layer's weight: sums of squared gradients.

``F``, the sum over losses of ``∂loss/∂W ⊙ ∂loss/∂W`` (out, in), is EWC's empirical Fisher information up to a factor
where each loss is a record's (Kirkpatrick et al. 2017, arXiv 1612.00796). Its row and column sums are kept,
``F ≈ ρκᵀ/τ``, as Adafactor has it of second moments (Shazeer and Stern 2018, arXiv 1804.04235): ``out + in`` numbers a
layer. Neither ``F`` nor a gradient is formed: with a layer's inputs ``x_t`` at all tokens of a loss and the gradients
``δ_t`` of its outputs, ``∂loss/∂W = Σ_t δ_t x_tᵀ``, whose squares in row ``i`` sum to ``Σ_tu δ_ti (x_t·x_u) δ_ui``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from .acting import TASK
from .checkpoint import Importance
from .distributed import summed
from .lora import AdaptedLayer

__all__ = ["measure", "refuse_unmeasured"]

# Tokens whose products with all others are formed at a time.
_TOKENS = 2048


def refuse_unmeasured(layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError, naming it, for a layer whose weight is not multiplied with the rows of its input."""
    for layer in layers:
        if layer.kind != "linear":
            raise ValueError(
                f"penalty='importance' is measured on linear layers; {layer.name} is of kind {layer.kind!r}: leave it "
                "out of target_modules, or use penalty='hadamard'"
            )


def measure(model: PeftModel, layers: Sequence[AdaptedLayer], losses: Iterable[Tensor]) -> dict[str, Importance]:
    """``ρ`` and ``κ`` of every layer, by name, over the losses of all processes; tied layers are measured once.

    ``losses`` are made one by one while they are asked for, in eval mode, by forwards in which the adapter in training
    is active. No ``.grad`` is touched.

    Raises ValueError where no loss was, or none depends on a layer.
    """
    layers = [layer for layer in layers if layer.tied_to is None]
    calls: dict[str, list[tuple[Tensor, Tensor]]] = {layer.name: [] for layer in layers}
    found = {}
    for layer in layers:
        out, in_ = layer.shape
        device = layer.parameters()[0].device
        found[layer.name] = Importance(torch.zeros(out, device=device), torch.zeros(in_, device=device))
    handles = [
        layer.module.register_forward_hook(_Note(layer, calls[layer.name]), with_kwargs=True) for layer in layers
    ]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        for loss in losses:
            if not loss.requires_grad:
                raise ValueError("a loss has no graph: compute it with adapters enabled, outside torch.no_grad()")
            made = [(name, x, output) for name, noted in calls.items() for x, output in noted]
            grads = torch.autograd.grad(loss, [output for *_, output in made], allow_unused=True) if made else ()
            for noted in calls.values():  # of this loss, and of what was computed again for it
                noted.clear()
            by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {}
            for (name, x, _), gradient in zip(made, grads, strict=True):
                if gradient is not None:
                    by_layer.setdefault(name, []).append((x, gradient))
            for name, pairs in by_layer.items():
                found[name] = found[name].plus(_squares(pairs))
            del made, grads, by_layer
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    tensors = iter(summed([part for pair in found.values() for part in pair]))
    found = {name: Importance(next(tensors), next(tensors)) for name in found}
    if all(held.total == 0 for held in found.values()):
        raise ValueError(
            "nothing was measured: expected losses that are computed while they are asked for, from forwards through "
            "the LoRA layers with the adapter in training: (model(**record).loss for record in records)"
        )
    broken = [name for name, held in found.items() if not (held.rows.isfinite().all() and held.cols.isfinite().all())]
    if broken:
        raise ValueError(f"gradients of {broken[0]} are not finite: nothing is taken from these losses")
    return found


class _Note:
    """Forward hook of a LoRA layer: its inputs and outputs, while the adapter in training acts."""

    def __init__(self, layer: AdaptedLayer, calls: list[tuple[Tensor, Tensor]]) -> None:
        self.layer, self.calls = layer, calls

    def __call__(self, module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        trained = TASK if TASK in module.scaling else self.layer.adapter
        acts = trained in module.active_adapters and not module.disable_adapters
        if acts and torch.is_grad_enabled() and output.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            self.calls.append((x.detach(), output))


@torch.no_grad()
def _squares(pairs: Sequence[tuple[Tensor, Tensor]]) -> Importance:
    """Row and column sums of ``G ⊙ G``, ``G = Σ_t δ_t x_tᵀ`` over all tokens of ``pairs``, in float32."""
    # [tokens, in], [tokens, out]
    x, gradient = (torch.cat([t.reshape(-1, t.shape[-1]).float() for t in parts]) for parts in zip(*pairs, strict=True))
    rows = cols = torch.zeros((), device=x.device)
    for some_x, some_gradient in zip(x.split(_TOKENS), gradient.split(_TOKENS), strict=True):
        rows = rows + (some_gradient * ((some_x @ x.T) @ gradient)).sum(0)
        cols = cols + (some_x * ((some_gradient @ gradient.T) @ x)).sum(0)
    # Sums of squares, but for rounding.
    return Importance(rows.clamp_min(0), cols.clamp_min(0))
