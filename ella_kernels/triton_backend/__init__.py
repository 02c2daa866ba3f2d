"""The fused Triton kernels. Imported only when a Triton backend runs: importing Triton takes time and reads the
environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..layer import Layer, weight_on
from .gram import prepare_gram
from .launch import check_device, device_guard
from .spectral import prepare_spectral
from .stream import prepare_stream
from .tables import gradient_base, group_by_class

__all__ = ["Launches", "Prepared", "prepare"]

_ALGORITHMS = {
    "gram": prepare_gram,
    "stream": prepare_stream,
    "dense": prepare_stream,
    "spectral": prepare_spectral,
}


class Launches(Protocol):
    """What an algorithm makes of the layers of one class: device tables and compile-time constants, no operand."""

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None: ...


class Prepared(NamedTuple):
    """Layers of one algorithm and device up to their launches; runs as often as the operands stay where they are.

    Attributes:
        classes: the launches of each class and the address its gradients are relative to.
        copies: layers whose operands had to be converted, alive until the launches that read them are queued. Their
            values are those of this call: with copies it runs once.
    """

    classes: list[tuple[Launches, int]]
    copies: list[Layer]

    def run(self, weight: Tensor | float, values: Tensor, moved_by: int = 0) -> None:
        """Values into their positions of ``values`` and ``weight`` times the gradients onto the layers' targets.

        Args:
            weight: a number or a real 0-dim tensor, which is read on the device.
            values: float32 or float64.
            moved_by: bytes by which all targets lie elsewhere than when this was prepared.
        """
        check_device(values)
        weight = weight_on(values.device, weight)
        with device_guard(values):
            for launches, grad_base in self.classes:
                launches.launch(weight, values, grad_base + moved_by)


def prepare(algorithm: str, layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> Prepared:
    """Tables and constants of ``layers``.

    Args:
        algorithm: "gram", "stream", "dense" or "spectral", of every layer.
        layers: checked layers, none of them zero by shape, on one device.
        precision: "auto", "ieee" or "tf32".
        positions: one per layer, where its value goes.
    """
    check_device(layers[0].lora_A)
    with device_guard(layers[0].lora_A):
        read = [_as_read(layer) for layer in layers]
        classes = []
        for indices in group_by_class(read).values():
            chosen = [read[i] for i in indices]
            launches = _ALGORITHMS[algorithm](chosen, precision, [positions[i] for i in indices])
            classes.append((launches, gradient_base(chosen)))
    return Prepared(classes, [new for new, old in zip(read, layers, strict=True) if new is not old])


def _as_read(layer: Layer) -> Layer:
    """The layer itself, or with copies of operands that the kernels cannot read as they are."""
    if layer.algorithm == "dense" and layer.right is not None:
        # The caller asked for the matrix; energies stay rank one.
        layer = layer._replace(left=layer.left.to(layer.dtype) @ layer.right.to(layer.dtype), right=None)
    if layer.dtype != torch.float64:
        return layer
    # Triton 3.7 cannot compile float64 dots of operands that were loaded as 16 bits; such a mix is for checking only.
    names = ("lora_A", "lora_B", "left", "right", "row_energy", "col_energy")
    operands = {name: getattr(layer, name) for name in names}
    wide = {name: t.float() for name, t in operands.items() if t is not None and t.dtype.itemsize == 2}
    return layer._replace(**wide) if wide else layer
