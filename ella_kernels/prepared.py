"""A group of layers up to its launches: which of them are zero, which have a kernel, and where values go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .autocast import without_autocast
from .dispatch import no_kernel, warn_once
from .layer import Layer, weight_on
from .torch_backend import gram, spectral, stream

if TYPE_CHECKING:
    from . import triton_backend

__all__ = ["Prepared", "prepare"]


class Prepared(NamedTuple):
    """Checked layers, ready to run.

    Attributes:
        shape, dtype, device: of the values.
        is_partial: some values are zero without being computed.
        on_triton: one per algorithm.
        on_torch: per algorithm, the layers without a kernel and where their values go.
    """

    shape: tuple[int]
    dtype: torch.dtype
    device: torch.device
    is_partial: bool
    on_triton: list[triton_backend.Prepared]
    on_torch: dict[str, list[tuple[int, Layer]]]

    @property
    def holds_operands(self) -> bool:
        """Whether tensors of the caller, or values made from them, are in here; else only their addresses are."""
        return bool(self.on_torch) or any(prepared.copies for prepared in self.on_triton)

    def run(self, weight: Tensor | float, moved_by: int = 0) -> Tensor:
        """The values; ``weight`` times the gradients is added to the layers' targets.

        Args:
            weight: a number or a real 0-dim tensor, of any dtype and on any device.
            moved_by: bytes by which all targets lie elsewhere than when this was prepared; 0 if it holds operands.
        """
        values = (torch.zeros if self.is_partial else torch.empty)(self.shape, dtype=self.dtype, device=self.device)
        with without_autocast(self.device):
            for prepared in self.on_triton:
                prepared.run(weight, values, moved_by)
            for algorithm, placed in self.on_torch.items():
                wide = weight_on(self.device, weight)
                wide = wide.double() if isinstance(wide, Tensor) else wide
                found = _torch_path(algorithm)([layer for _, layer in placed], wide)
                for (index, _), value in zip(placed, found, strict=True):
                    values[index] = value
        return values


def prepare(layers: Sequence[Layer | None], like: Tensor, backend: str, precision: str) -> Prepared:
    """Sort layers by algorithm and backend and find their tables.

    Args:
        layers: checked; None marks a layer without a past.
        like: an operand of the widest dtype among them, which the values take, or float32.
        backend: "torch", "triton", or "auto": Triton wherever it has a kernel.
        precision: "auto", "ieee" or "tf32".
    """
    on_triton: dict[str, list[int]] = {}
    on_torch: dict[str, list[tuple[int, Layer]]] = {}
    for index, layer in enumerate(layers):
        if layer is None or layer.is_zero:
            continue
        _, _, r, k = layer.sizes
        reason = None if backend == "torch" else no_kernel(layer.algorithm, r, k)
        if reason is not None:
            warn_once(reason)
        if backend == "torch" or reason is not None:
            on_torch.setdefault(layer.algorithm, []).append((index, layer))
        else:
            on_triton.setdefault(layer.algorithm, []).append(index)
    is_partial = sum(map(len, on_triton.values())) < len(layers)
    with without_autocast(like.device):
        prepared = [_on_triton(algorithm, layers, indices, precision) for algorithm, indices in on_triton.items()]
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return Prepared((len(layers),), dtype, like.device, is_partial, prepared, on_torch)


def _on_triton(algorithm: str, layers: Sequence[Layer], indices: list[int], precision: str) -> triton_backend.Prepared:
    from . import triton_backend

    return triton_backend.prepare(algorithm, [layers[i] for i in indices], precision, indices)


def _torch_path(algorithm: str) -> Callable[[Sequence[Layer], Tensor | float], list[Tensor]]:
    return {"gram": gram.hadamard_gram, "spectral": spectral.spectral}.get(algorithm, stream.hadamard_stream)
