"""The spectral penalty ``s²‖(LᵀB)(A Rᵀ)‖_F²`` (the projected norm), in plain torch.

With ``N = (LᵀB)(A Rᵀ)``, a ``(k, k)`` matrix: ``∂P/∂B = 2s² L (N (A Rᵀ)ᵀ)`` and ``∂P/∂A = 2s² ((LᵀB)ᵀ N) R``
(docs/math.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..layer import Layer
from .batching import WORK_BYTES, deliver, run_batches, stack
from .powers import narrowed

__all__ = ["spectral"]


def _layers_per_batch(layer: Layer) -> int:
    out, in_, r, k = layer.sizes
    # Stacks and gradients, a float64 copy of each, and three (k, k) or (r, k) products in float64.
    size = layer.dtype.itemsize
    return WORK_BYTES // ((out + in_) * (r + k) * (2 * size + 8) + 24 * k * max(r, k))


def spectral(layers: Sequence[Layer], weight: Tensor | float = 1.0) -> list[Tensor]:
    """Spectral penalty of each layer; arguments, results and gradients as ``gram.hadamard_gram``."""
    return run_batches(layers, _layers_per_batch, lambda group: _batch(group, weight))


def _batch(group: list[Layer], weight: Tensor | float) -> Tensor:
    dtype = group[0].dtype
    a, b, left, right = (
        stack([getattr(layer, name) for layer in group], dtype) for name in ("lora_A", "lora_B", "left", "right")
    )
    scaling = torch.tensor([layer.scaling for layer in group], dtype=torch.float64).to(a.device)
    # The long sums in float64: nearly orthogonal factors cancel there, and nowhere else.
    rows = left.double().mT @ b.double()  # [n, k, r]
    cols = a.double() @ right.double().mT  # [n, r, k]
    projected = rows @ cols * scaling[:, None, None]  # [n, k, k]
    values = projected.square().sum((1, 2))
    if group[0].grad_A is not None:
        factor = (2 * scaling * weight)[:, None, None]
        of_rows, spare_rows = narrowed(projected @ cols.mT * factor, dtype)
        of_cols, spare_cols = narrowed(rows.mT @ projected * factor, dtype)
        for targets, grads, spare in (
            ([layer.grad_B for layer in group], left @ of_rows, spare_rows),
            ([layer.grad_A for layer in group], of_cols @ right, spare_cols),
        ):
            deliver(targets, grads if spare is None else grads * spare[:, None, None])
    return values.to(dtype)
