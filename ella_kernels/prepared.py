"""A group of layers up to its launches: which of them are zero, which have a kernel, and where values go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .autocast import without_autocast
from .dispatch import no_kernel, warn_once
from .layer import Layer, weight_on
from .torch_backend import gram, spectral, stream

__all__ = ["Launches", "Prepared", "prepare"]


class Launches(Protocol):
    """What the Triton backend makes of layers that share kernels: device tables and compile-time constants."""

    @property
    def plans(self) -> Sequence[Any]:
        """Device tables of the batches of layers."""

    @property
    def work_bytes(self) -> int:
        """What :meth:`launch` allocates at once, at most."""

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None: ...


class Prepared(NamedTuple):
    """Checked layers, ready to run; with launches only, as often as the operands stay where they are.

    Attributes:
        n_layers, dtype, device: of the values.
        is_partial: some values are zero without being computed.
        launches: of each class of layers, and the address its gradients are relative to.
        guard: the context launches are made in.
        on_torch: per algorithm, the layers without a kernel and where their values go.
        copies: layers whose operands had to be converted, alive until the launches that read them are queued. Their
            values are those of one call.
    """

    n_layers: int
    dtype: torch.dtype
    device: torch.device
    is_partial: bool
    launches: list[tuple[Launches, int]]
    guard: Callable[[Tensor], Any] | None
    on_torch: dict[str, list[tuple[int, Layer]]]
    copies: list[Layer]

    @property
    def holds_operands(self) -> bool:
        """Whether tensors of the caller, or values made from them, are in here; else only their addresses are."""
        return bool(self.on_torch or self.copies)

    def run(self, weight: Tensor | float, moved_by: int = 0) -> Tensor:
        """The values ``(n_layers,)``; ``weight`` times the gradients is added to the layers' targets.

        Args:
            weight: a number or a real 0-dim tensor, of any dtype and on any device.
            moved_by: bytes by which all targets lie elsewhere than when this was prepared; 0 if it holds operands.
        """
        values = (torch.zeros if self.is_partial else torch.empty)(self.n_layers, dtype=self.dtype, device=self.device)
        weight = weight_on(self.device, weight)
        with without_autocast(self.device):
            if self.guard is not None:
                with self.guard(values):
                    for launches, grad_base in self.launches:
                        launches.launch(weight, values, grad_base + moved_by)
            for algorithm, placed in self.on_torch.items():
                wide = weight.double() if isinstance(weight, Tensor) else weight
                found = _torch_path(algorithm)([layer for _, layer in placed], wide)
                for (index, _), value in zip(placed, found, strict=True):
                    values[index] = value
        return values


def prepare(layers: Sequence[Layer], backend: str, precision: str) -> Prepared:
    """Sort layers by algorithm and backend, and make the tables of those that have a kernel.

    Args:
        layers: checked, on one device.
        backend: "torch", "triton", or "auto": Triton wherever it has a kernel.
        precision: "auto", "ieee" or "tf32".
    """
    on_triton: dict[str, list[int]] = {}
    on_torch: dict[str, list[tuple[int, Layer]]] = {}
    for index, layer in enumerate(layers):
        if layer.is_zero:
            continue
        _, _, r, k = layer.sizes
        reason = None if backend == "torch" else no_kernel(layer.algorithm, r, k)
        if reason is not None:
            warn_once(reason)
        if backend == "torch" or reason is not None:
            on_torch.setdefault(layer.algorithm, []).append((index, layer))
        else:
            on_triton.setdefault(layer.algorithm, []).append(index)
    device, launches, copies, guard = layers[0].lora_A.device, [], [], None
    if on_triton:
        from . import triton_backend

        guard = triton_backend.guard
        with without_autocast(device), guard(layers[0].lora_A):
            for algorithm, indices in on_triton.items():
                made, converted = triton_backend.prepare(algorithm, [layers[i] for i in indices], precision, indices)
                launches += made
                copies += converted
    return Prepared(
        len(layers),
        torch.float64 if any(layer.dtype == torch.float64 for layer in layers) else torch.float32,
        device,
        sum(map(len, on_triton.values())) < len(layers),
        launches,
        guard,
        on_torch,
        copies,
    )


def _torch_path(algorithm: str) -> Callable[[Sequence[Layer], Tensor | float], list[Tensor]]:
    return {"gram": gram.hadamard_gram, "spectral": spectral.spectral}.get(algorithm, stream.hadamard_stream)
