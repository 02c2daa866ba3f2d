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
from torch.autograd.graph import get_gradient_edge

from .acting import TASK
from .checkpoint import Importance
from .distributed import is_spread, summed
from .lora import AdaptedLayer

__all__ = ["measure", "nothing", "refuse_unmeasured"]

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

    ``losses`` are made one by one while they are asked for, each by forwards of its own, in eval mode, with the adapter
    in training active. No ``.grad`` is touched.

    Raises TypeError for what is no loss, and ValueError where none was measured, one comes from no forward of its own,
    a gradient is not finite or does not reach a layer that has learned something.
    """
    if isinstance(losses, Tensor) or not isinstance(losses, Iterable):
        raise TypeError(f"losses must be made one by one, {_FORM}; found {type(losses).__name__}")
    layers = [layer for layer in layers if layer.tied_to is None]
    noted: list[tuple[str, Tensor, Any, torch.dtype]] = []
    found: dict[str, Importance] = {}
    called: set[str] = set()
    handles = [layer.module.register_forward_hook(_Note(layer, noted, called), with_kwargs=True) for layer in layers]
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        # Compiled code shows no layer's own output.
        with torch.compiler.set_stance("force_eager"):
            for number, loss in enumerate(losses, 1):
                calls = noted[:]
                for name, held in _of_loss(loss, number, calls).items():
                    found[name] = held.plus(found.get(name))
                noted.clear()  # with what was computed again for it
    finally:
        for handle in handles:
            handle.remove()
        for module in training:
            module.training = True
    for layer in layers:
        b = layer.parameters()[1]
        if layer.name in called - found.keys() and not is_spread(b) and b.any():
            raise ValueError(
                f"no gradient reaches {layer.name}, although its forward ran and it has learned something: its output "
                "is computed elsewhere (a fused LoRA kernel?); switch that off while importance is measured"
            )
    pairs = [found.get(layer.name) or nothing(layer) for layer in layers]
    sums = iter(summed([part for pair in pairs for part in pair]))
    found = {layer.name: Importance(next(sums), next(sums)) for layer in layers}
    if all(held.total == 0 for held in found.values()):
        raise ValueError(f"nothing was measured: expected losses that depend on the LoRA layers, {_FORM}")
    for name, held in found.items():
        if not (held.rows.isfinite().all() and held.cols.isfinite().all()):
            raise ValueError(f"gradients of {name} are not finite: nothing is taken from these losses")
    return found


_FORM = "(model(**record).loss for record in records)"


def nothing(layer: AdaptedLayer) -> Importance:
    """Of a layer that no loss depends on."""
    device = layer.parameters()[0].device
    return Importance(*(torch.zeros(size, device=device) for size in layer.shape))


class _Note:
    """Forward hook of a LoRA layer: its name, inputs, where its outputs hang in the graph, and their dtype.

    Of the outputs not the tensor itself: what changes it in place, an activation, would be in its gradient.
    """

    def __init__(
        self, layer: AdaptedLayer, noted: list[tuple[str, Tensor, Any, torch.dtype]], called: set[str]
    ) -> None:
        self.layer, self.noted, self.called = layer, noted, called

    def __call__(self, module: Any, args: tuple, kwargs: dict, output: Tensor) -> None:
        trained = TASK if TASK in module.scaling else self.layer.adapter
        acts = trained in module.active_adapters and not module.disable_adapters
        if not acts or not torch.is_grad_enabled():
            return
        self.called.add(self.layer.name)
        if output.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            self.noted.append((self.layer.name, x.detach().clone(), get_gradient_edge(output), output.dtype))


def _of_loss(loss: Tensor, number: int, calls: Sequence[tuple[str, Tensor, Any, torch.dtype]]) -> dict[str, Importance]:
    """What one loss says of the layers that it depends on."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise TypeError(f"loss {number} must be a tensor of one element, {_FORM}; found {what}")
    if not loss.requires_grad:
        raise ValueError(f"loss {number} has no graph: compute it with adapters enabled, outside torch.no_grad()")
    edges = [edge for _, _, edge, _ in calls]
    # Gradients of half precision would be too small for it: scaled as a gradient scaler does.
    scale = 2.0**16 if any(dtype == torch.float16 for *_, dtype in calls) else 1.0
    grads: Sequence[Tensor | None] = ()
    while edges:
        weight = torch.full_like(loss, scale)
        grads = torch.autograd.grad(loss, edges, weight, allow_unused=True, retain_graph=scale > 1)
        if scale <= 1 or all(g is None or g.isfinite().all() for g in grads):
            break
        scale /= 16
    by_layer: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (name, x, _, _), gradient in zip(calls, grads, strict=False):
        if gradient is not None:
            by_layer.setdefault(name, []).append((x, gradient.float() / scale))
    if not by_layer:
        raise ValueError(
            f"loss {number} comes from no forward of its own through the LoRA layers: expected losses that are "
            f"computed while they are asked for, one of each forward, {_FORM}"
        )
    return {name: _squares(pairs) for name, pairs in by_layer.items()}


@torch.no_grad()
def _squares(pairs: Sequence[tuple[Tensor, Tensor]]) -> Importance:
    """Row and column sums of ``G ⊙ G``, ``G = Σ_t δ_t x_tᵀ`` over all tokens of ``pairs``, in float32."""
    # [tokens, in], [tokens, out]
    x, gradient = (torch.cat([t.reshape(-1, t.shape[-1]).float() for t in parts]) for parts in zip(*pairs, strict=True))
    rows = cols = torch.zeros((), device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for some_x, some_gradient in zip(x.split(_TOKENS), gradient.split(_TOKENS), strict=True):
            rows = rows + (some_gradient * ((some_x @ x.T) @ gradient)).sum(0)
            cols = cols + (some_x * ((some_gradient @ gradient.T) @ x)).sum(0)
    # Sums of squares, but for rounding.
    return Importance(rows.clamp_min(0), cols.clamp_min(0))
