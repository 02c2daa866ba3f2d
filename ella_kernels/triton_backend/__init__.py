"""The fused Triton kernels. Imported only when a Triton backend runs: importing Triton takes time and reads the
environment."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..layer import Layer
from ..prepared import Launches
from . import gram, spectral, stream
from .launch import check_device, device_guard
from .tables import gradient_base, group_by_class

__all__ = ["ALGORITHMS", "guard", "kernels", "prepare"]

ALGORITHMS: dict[str, Callable[..., Launches]] = {
    "gram": gram.prepare_gram,
    "stream": stream.prepare_stream,
    "dense": stream.prepare_stream,
    "spectral": spectral.prepare_spectral,
}


@contextmanager
def guard(like: Tensor) -> Iterator[None]:
    """Where launches for the device of ``like`` are made.

    Raises:
        ValueError: the kernels cannot run on that device.
    """
    check_device(like)
    with device_guard(like):
        yield


def prepare(
    algorithm: str, layers: Sequence[Layer], precision: str, positions: Sequence[int]
) -> tuple[list[tuple[Launches, int]], list[Layer]]:
    """Tables and constants of ``layers``, inside :func:`guard`.

    Args:
        algorithm: "gram", "stream", "dense" or "spectral", of every layer.
        layers: checked layers, none of them zero by shape, on one device.
        precision: "auto", "ieee" or "tf32".
        positions: one per layer, where its value goes.

    Returns:
        The launches of each class with the address its gradients are relative to, and the layers of which copies are
        read.
    """
    read = [_as_read(layer) for layer in layers]
    launches: list[tuple[Launches, int]] = []
    for indices in group_by_class(read).values():
        chosen = [read[i] for i in indices]
        made = ALGORITHMS[algorithm](chosen, precision, [positions[i] for i in indices])
        launches.append((made, gradient_base(chosen)))
    return launches, [new for new, old in zip(read, layers, strict=True) if new is not old]


def kernels() -> dict[str, Any]:
    """Every kernel of this folder by its name."""
    modules = (gram, stream, spectral)
    return {name: getattr(module, name) for module in modules for name in module.__all__ if "_kernel_" in name}


def _as_read(layer: Layer) -> Layer:
    """The layer itself, or with copies of operands that the kernels cannot read as they are."""
    if layer.algorithm == "dense" and layer.right is not None:
        # The caller asked for the matrix; energies stay rank one.
        assert layer.left is not None, "layers without a past do not come here"
        layer = layer._replace(left=layer.left.to(layer.dtype) @ layer.right.to(layer.dtype), right=None)
    if layer.dtype != torch.float64:
        return layer
    # Triton 3.7 cannot compile float64 dots of operands that were loaded as 16 bits; such a mix is for checking only.
    names = ("lora_A", "lora_B", "left", "right", "row_energy", "col_energy")
    operands = {name: getattr(layer, name) for name in names}
    wide = {name: t.float() for name, t in operands.items() if t is not None and t.dtype.itemsize == 2}
    return layer._replace(**wide) if wide else layer
