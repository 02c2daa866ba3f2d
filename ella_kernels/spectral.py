"""The spectral penalty ``s²‖(LᵀB)(A Rᵀ)‖_F²`` (the projected norm of DESIGN 2.2), in plain torch.

With ``N = (LᵀB)(A Rᵀ)``, a ``(k, k)`` matrix: ``∂P/∂B = 2s² L (N (A Rᵀ)ᵀ)`` and ``∂P/∂A = 2s² ((LᵀB)ᵀ N) R``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grouped import Layer, deliver, run_batches, stack

__all__ = ["spectral"]

_WORK = 2**20


def _layers_per_batch(layer: Layer) -> int:
    out, in_, r, k = layer.sizes
    return min(_WORK, out * in_ // 2) // (max(out, in_) * max(r, k))


def spectral(layers: Sequence[Layer], weight: Tensor | float = 1.0) -> list[Tensor]:
    """Spectral penalty of each layer; arguments, results and gradients as ``gram.hadamard_gram``."""
    return run_batches(layers, _layers_per_batch, lambda group: _batch(group, weight))


def _batch(group: list[Layer], weight: Tensor | float) -> Tensor:
    dtype = group[0].dtype
    a, b, left, right = (
        stack([getattr(layer, name) for layer in group], dtype) for name in ("lora_A", "lora_B", "left", "right")
    )
    scale = torch.tensor([layer.scaling**2 for layer in group], dtype=torch.float64).to(a.device)
    # The long sums in float64: nearly orthogonal factors cancel there, and nowhere else.
    rows = left.double().mT @ b.double()  # [n, k, r]
    cols = a.double() @ right.double().mT  # [n, r, k]
    projected = rows @ cols  # [n, k, k]
    values = projected.square().sum((1, 2)) * scale
    if group[0].grad_A is not None:
        factor = (2 * scale * weight)[:, None, None]
        grad_b = left @ (projected @ cols.mT * factor).to(dtype)
        grad_a = (rows.mT @ projected * factor).to(dtype) @ right
        deliver([layer.grad_B for layer in group], grad_b.unbind())
        deliver([layer.grad_A for layer in group], grad_a.unbind())
    return values.to(dtype)
