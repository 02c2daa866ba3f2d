"""The fused Triton kernels. Imported only when a Triton backend runs: importing Triton takes time and reads the
environment."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..grouped import Layer
from .gram import hadamard_gram
from .launch import check_device, device_guard
from .spectral import projected_norm
from .stream import hadamard_stream
from .tables import group_by_class

__all__ = ["run"]

_ALGORITHMS = {
    "gram": hadamard_gram,
    "stream": hadamard_stream,
    "dense": hadamard_stream,
    "spectral": projected_norm,
}


def _without_half_in_float64(layer: Layer) -> Layer:
    # Triton 3.7 cannot compile float64 dots of operands that were loaded as 16 bits; such a mix is for checking only.
    if layer.dtype != torch.float64:
        return layer
    names = ("lora_A", "lora_B", "left", "right", "row_energy", "col_energy")
    operands = {name: getattr(layer, name) for name in names}
    wide = {name: t.float() for name, t in operands.items() if t is not None and t.dtype.itemsize == 2}
    return layer._replace(**wide)


def run(
    algorithm: str,
    layers: Sequence[Layer],
    weight: Tensor | float,
    precision: str,
    values: Tensor,
    positions: Sequence[int],
) -> None:
    """Values into ``values[positions]`` and ``weight`` times the gradients onto each layer's ``grad_A``, ``grad_B``.

    Args:
        algorithm: "gram", "stream", "dense" or "spectral", of every layer.
        layers: checked layers, none of them zero by shape, on one device.
        weight: a number or a 0-dim tensor, which is read on the device.
        precision: "auto", "ieee" or "tf32".
        values: float32 or float64; positions: one per layer.
    """
    check_device(values)
    if isinstance(weight, Tensor) and weight.device != values.device:
        # A scalar on the host is read there; nothing waits for the device.
        weight = float(weight)
    with device_guard(values):
        for indices in group_by_class(layers).values():
            chosen = [_without_half_in_float64(layers[i]) for i in indices]
            _ALGORITHMS[algorithm](chosen, weight, precision, values, [positions[i] for i in indices])
