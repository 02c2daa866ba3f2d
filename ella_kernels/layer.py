"""The record of one layer that every algorithm takes, on every backend."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Layer", "weight_on"]


class Layer(NamedTuple):
    """One layer's operands after checking: what every algorithm, on every backend, is handed.

    Attributes:
        lora_A: ``(r, in)``; lora_B: ``(out, r)``; any floating dtype and strides.
        left: ``(out, k)``, or the dense past ``(out, in)`` when ``right`` is None; None without a past.
        right: ``(k, in)`` or None.
        row_energy, col_energy: ``(out,)`` and ``(in,)``, or None.
        scaling: the LoRA scaling ``s``.
        algorithm: "gram", "stream", "dense" or "spectral", already chosen; "none" without a past.
        grad_A, grad_B: where gradients go, or None if only the value is wanted.
    """

    lora_A: Tensor
    lora_B: Tensor
    left: Tensor | None
    right: Tensor | None
    row_energy: Tensor | None
    col_energy: Tensor | None
    scaling: float
    algorithm: str
    grad_A: Tensor | None = None
    grad_B: Tensor | None = None

    @property
    def past(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        """``left``, ``right`` and the energies."""
        return self.left, self.right, self.row_energy, self.col_energy

    @property
    def dtype(self) -> torch.dtype:
        """Arithmetic dtype: float64 if any operand is, else float32."""
        # Asked several times per layer and step, so spelled out.
        wide = torch.float64
        if self.lora_A.dtype is wide or self.lora_B.dtype is wide:
            return wide
        for t in self.past:
            if t is not None and t.dtype is wide:
                return wide
        return torch.float32

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """``(out, in, r, k)``; ``k`` is 0 without factors of a past."""
        rank = 0 if self.right is None else self.right.shape[0]
        return self.lora_B.shape[0], self.lora_A.shape[1], self.lora_A.shape[0], rank

    @property
    def is_zero(self) -> bool:
        """True when the penalty vanishes by shape alone: no past or one of no components, or an empty operand."""
        out, in_, r, k = self.sizes
        no_past = self.left is None or (self.right is not None and k == 0 and self.row_energy is None)
        return no_past or 0 in (out, in_, r)


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
