"""The fused Triton kernels. Imported only when a Triton backend runs: importing Triton takes time and reads the
environment."""

from __future__ import annotations

from collections.abc import Sequence

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
    with device_guard(values):
        for indices in group_by_class(layers).values():
            chosen = [layers[i] for i in indices]
            _ALGORITHMS[algorithm](chosen, weight, precision, values, [positions[i] for i in indices])
