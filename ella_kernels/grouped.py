"""Many layers as one problem: the layer record every algorithm takes, and the batching of layers of one shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layer(NamedTuple):
    """One layer's operands after checking: what every algorithm, on every backend, is handed.

    Attributes:
        lora_A: ``(r, in)``; lora_B: ``(out, r)``; any floating dtype and strides.
        left: ``(out, k)``, or the dense past ``(out, in)`` when ``right`` is None.
        right: ``(k, in)`` or None.
        row_energy, col_energy: ``(out,)`` and ``(in,)``, or None.
        scaling: the LoRA scaling ``s``.
        algorithm: "gram", "stream" or "dense", already chosen.
        grad_A, grad_B: where gradients go, or None if only the value is wanted.
    """

    lora_A: Tensor
    lora_B: Tensor
    left: Tensor
    right: Tensor | None
    row_energy: Tensor | None
    col_energy: Tensor | None
    scaling: float
    algorithm: str
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic dtype: float64 if any operand is, else float32."""
        wide = torch.float64
        # Asked several times per layer and step, so spelled out.
        if self.lora_A.dtype is wide or self.lora_B.dtype is wide or self.left.dtype is wide:
            return wide
        for t in (self.right, self.row_energy, self.col_energy):
            if t is not None and t.dtype is wide:
                return wide
        return torch.float32

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``(out, in, r, k)``; ``k`` is 0 for a dense past."""
        rank = 0 if self.right is None else self.right.shape[0]
        return self.lora_B.shape[0], self.lora_A.shape[1], self.lora_A.shape[0], rank

    @property
    def is_zero(self) -> bool:
        """True when the penalty vanishes by shape alone: an empty operand, or a past of no components."""
        out, in_, r, k = self.sizes
        no_past = self.right is not None and k == 0 and self.row_energy is None
        return no_past or 0 in (out, in_, r)


def run_batches(
    layers: Sequence[Layer], per_batch: Callable[[Layer], int], batch: Callable[[list[Layer]], Tensor]
) -> list[Tensor]:
    """Values of ``layers`` from ``batch``, called on up to ``per_batch(layer)`` layers that may be stacked."""
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        key = (layer.sizes, layer.dtype, layer.right is None, layer.row_energy is None, layer.grad_A is None)
        groups.setdefault(key, []).append(index)
    values: dict[int, Tensor] = {}
    for indices in groups.values():
        size = max(1, per_batch(layers[indices[0]]))
        for start in range(0, len(indices), size):
            chosen = indices[start : start + size]
            values.update(zip(chosen, batch([layers[i] for i in chosen]).unbind(), strict=True))
    return [values[i] for i in range(len(layers))]


def stack(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float64) -> Tensor:
    """``(n, …)`` in ``dtype``, contiguous; a single tensor that fits is viewed, not copied."""
    if len(tensors) == 1:
        return tensors[0].to(dtype).contiguous().unsqueeze(0)
    return torch.stack([t.to(dtype) for t in tensors])


def shares(energies: Sequence[Tensor]) -> Tensor:
    """Row energies ``ρ`` over their sum ``τ``, ``(n, out)`` float64; all zero where nothing was dropped.

    Whatever the size of the energies, these are at most 1, where ``1/τ`` may have no number.
    """
    rows = stack(energies)
    total = rows.sum(1, keepdim=True)
    return torch.where(total == 0, 0, rows / total)


def weight_on(device: torch.device, weight: Tensor | float) -> Tensor | float:
    """A weight as every algorithm takes it: a number, or a 0-dim float32 or float64 tensor on ``device``.

    Nothing waits for a device, unless the weight is on another one.
    """
    if not isinstance(weight, Tensor):
        return float(weight)
    if weight.device != device and weight.device.type == "cpu":
        return float(weight.item())
    # A part of something larger may be a part of a gradient, and change while it is read.
    is_own = weight.untyped_storage().nbytes() == weight.dtype.itemsize
    if is_own and weight.device == device and weight.dtype in (torch.float32, torch.float64):
        return weight
    return weight.to(device, torch.float64, copy=True)


def deliver(targets: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    """Add each gradient, float32 or float64, to its target; the sum is formed in the wider dtype and rounded once."""
    if len(set(map(Tensor.data_ptr, targets))) == len(targets):
        torch._foreach_add_(list(targets), list(grads))
        return
    for target, grad in zip(targets, grads, strict=True):
        target.add_(grad)
