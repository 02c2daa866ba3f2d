"""Pointer tables: where the operands of many layers are.

A table holds addresses, strides, sizes and the scaling, never values: operands may change in place between calls.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layer import Layer
from . import records
from .launch import TL_DTYPES, capturing

__all__ = [
    "SideClass",
    "batches",
    "float_bits",
    "gradient_base",
    "group_by_class",
    "is_aligned",
    "side_classes",
    "side_record",
    "to_device",
]

# What a captured CUDA graph copies to the device on every replay: never dropped.
_read_by_graphs: list[Tensor] = []


class SideClass(NamedTuple):
    """What one launch has in common: the dtypes of factor, past, energy and gradient of a side."""

    factor: torch.dtype
    past: torch.dtype
    energy: torch.dtype
    grad: torch.dtype

    @property
    def tl_dtypes(self) -> dict:
        """The operand dtypes as the kernels' keyword arguments."""
        return {
            "FACTOR": TL_DTYPES[self.factor],
            "PAST": TL_DTYPES[self.past],
            "ENERGY_TYPE": TL_DTYPES[self.energy],
            "GRAD": TL_DTYPES[self.grad],
        }


def side_classes(layer: Layer) -> tuple[SideClass, SideClass]:
    """Dtypes of the rows side and the columns side; absent tensors take the factor's."""

    def dtype(t: Tensor | None, like: Tensor) -> torch.dtype:
        return like.dtype if t is None else t.dtype

    a, b = layer.lora_A, layer.lora_B
    return (
        SideClass(b.dtype, layer.left.dtype, dtype(layer.row_energy, b), dtype(layer.grad_B, b)),
        SideClass(a.dtype, dtype(layer.right, layer.left), dtype(layer.col_energy, a), dtype(layer.grad_A, a)),
    )


def group_by_class(layers: Sequence[Layer]) -> dict[tuple, list[int]]:
    """Indices of the layers that share kernels: equal ranks, dtypes, and presence of energies and gradients."""
    groups: dict[tuple, list[int]] = {}
    for index, layer in enumerate(layers):
        _, _, r, k = layer.sizes
        key = (r, k, layer.right is None, layer.row_energy is not None, layer.grad_A is not None, layer.dtype)
        groups.setdefault((*key, side_classes(layer)), []).append(index)
    return groups


def gradient_base(layers: Sequence[Layer]) -> int:
    """The address that gradients are stored relative to: fresh ones in the old pattern need no new table."""
    first = layers[0].grad_B
    return 0 if first is None else first.data_ptr()


def batches(layers: Sequence[Layer], slots: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive layers whose slots fit the limit and whose gradient targets are all different."""
    batches: list[list[int]] = []
    used, targets = limit + 1, set()
    for index, layer in enumerate(layers):
        own = {t.data_ptr() for t in (layer.grad_A, layer.grad_B) if t is not None}
        if used + slots[index] > limit or targets & own:
            batches.append([])
            used, targets = 0, set()
        batches[-1].append(index)
        used += slots[index]
        targets |= own
    return batches


def float_bits(value: float) -> int:
    """The float64 ``value`` as an int64 table entry."""
    return struct.unpack("<q", struct.pack("<d", value))[0]


def _address(t: Tensor | None, transposed: bool) -> tuple[int, int, int]:
    if t is None:
        return 0, 0, 0
    row, comp = (t.stride(1), t.stride(0)) if transposed else (t.stride(0), t.stride(1))
    # Inside a block offsets are 32-bit; only the first row's is 64-bit.
    if t.shape[0 if transposed else 1] * abs(comp) >= 2**31 or 2**14 * abs(row) >= 2**31:
        raise ValueError(
            f"a tensor of shape {tuple(t.shape)} with strides {t.stride()} spans more than 2³¹ elements per block of "
            "rows, which the Triton kernels do not address; pass a contiguous copy or backend='torch'"
        )
    return t.data_ptr(), row, comp


def side_record(layer: Layer, is_rows: bool, grad_base: int, partner_slot: int) -> list[int]:
    """One row of the side table."""
    factor, past, energy, grad = (
        (layer.lora_B, layer.left, layer.row_energy, layer.grad_B)
        if is_rows
        # A stored past has the other side's rows for components, seen from either side.
        else (layer.lora_A, layer.left if layer.right is None else layer.right, layer.col_energy, layer.grad_A)
    )
    record = [0] * records.SIDE.value
    fields = [*_address(factor, not is_rows), *_address(past, not is_rows)]
    fields += [0, 0] if energy is None else [energy.data_ptr(), energy.stride(0)]
    fields.append(factor.shape[0 if is_rows else 1])
    pointer, row, comp = _address(grad, not is_rows)
    fields += [pointer - grad_base if grad is not None else 0, row, comp, partner_slot]
    # Lanes should be neighbours in memory: along the components if those are closer together, else along the rows.
    fields += [int(fields[5] < fields[4]), float_bits(layer.scaling)]
    record[: len(fields)] = fields
    return record


def is_aligned(record: list[int]) -> bool:
    """Whether loads of this side may be 16 bytes wide: what ``ALIGNED`` promises to the kernels."""
    last = record[records.COMPONENTS_ARE_LAST.value]
    for pointer, row, comp in (
        [record[i.value] for i in (records.FACTOR_PTR, records.FACTOR_ROW, records.FACTOR_COMP)],
        [record[i.value] for i in (records.PAST_PTR, records.PAST_ROW, records.PAST_COMP)],
    ):
        near, far = (comp, row) if last else (row, comp)
        if pointer and (pointer % 16 or near != 1 or far % 4):
            return False
    return record[records.ROWS.value] % 4 == 0


def to_device(tables: Sequence[list[list[int]]], device: torch.device) -> list[Tensor]:
    """Int64 tables as views of one device tensor, copied once and without waiting for the device."""
    flat = [entry for table in tables for row in table for entry in row]
    host = torch.tensor(flat, dtype=torch.int64, pin_memory=device.type == "cuda")
    if capturing():
        # The copy is part of the graph and repeated by every replay. Warming up before the capture avoids it.
        _read_by_graphs.append(host)
    sizes = [sum(len(row) for row in table) for table in tables]
    return list(host.to(device, non_blocking=True).split(sizes))
