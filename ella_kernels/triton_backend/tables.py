"""Pointer tables: where the operands of many layers are.

A table holds addresses, strides, sizes and the scaling, never values: operands may change in place between calls. Its
rows are records of int64, one class each here; a kernel finds a field by the field's place in the class.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..layer import Layer
from .launch import TL_DTYPES, capturing

__all__ = [
    "ITEM",
    "LAYER",
    "SIDE",
    "Item",
    "LayerRecord",
    "Side",
    "SideClass",
    "Types",
    "batches",
    "float_bits",
    "gradient_base",
    "group_by_class",
    "is_aligned",
    "side_classes",
    "side_record",
    "to_device",
]


class Side(NamedTuple):
    """The rows (B with L) or the columns (A with R) of one layer.

    Attributes:
        factor, factor_row, factor_comp: address, and strides in elements along rows and components; ``past``,
            ``energy`` and ``grad`` alike. A stored past has the other side's rows as components, seen from either side.
        grad_offset: bytes from the group's first gradient: a fresh allocation of the same pattern meets the same table.
        partner_slot: where the partial blocks of the layer's other side begin.
        components_are_last: lanes that are neighbours in memory lie along the components, else along the rows.
        scaling_bits: the float64 scaling.
    """

    factor: int
    factor_row: int
    factor_comp: int
    past: int
    past_row: int
    past_comp: int
    energy: int
    energy_row: int
    rows: int
    grad_offset: int
    grad_row: int
    grad_comp: int
    partner_slot: int
    components_are_last: int
    scaling_bits: int


class Item(NamedTuple):
    """What one program does: rows from ``start`` to ``stop`` of a side, by tiles of its components.

    Attributes:
        side: number of the side. slot: number of the partial block it writes.
        first, second, past_first, past_second: the first components of a tile of products, of factor and past.
    """

    side: int
    start: int
    stop: int
    slot: int = 0
    first: int = 0
    second: int = 0
    past_first: int = 0
    past_second: int = 0


class LayerRecord(NamedTuple):
    """Where the partial blocks of a layer's two sides are: the first, and how many; and where its value goes."""

    row_slot: int
    row_chunks: int
    col_slot: int
    col_chunks: int
    scaling_bits: int
    value: int


# Each field's place. Constants that a kernel reads are part of the key under which Triton keeps it: a class is not.
SIDE = tl.constexpr(Side(*range(len(Side._fields))))
ITEM = tl.constexpr(Item(*range(len(Item._fields))))
LAYER = tl.constexpr(LayerRecord(*range(len(LayerRecord._fields))))

# What a captured CUDA graph copies to the device on every replay: never dropped.
_read_by_graphs: list[Tensor] = []


class Types(NamedTuple):
    """How operands lie in memory, as a kernel is compiled for: ``T`` there.

    Attributes:
        FACTOR, PAST, ENERGY, GRAD: names of dtypes; None for what a launch does not touch, so that kernels do not
            differ by it.
        ALIGNED: loads may be 16 bytes wide, see :func:`is_aligned`.
    """

    FACTOR: str | None
    PAST: str | None
    ENERGY: str | None
    GRAD: str | None
    ALIGNED: bool


class SideClass(NamedTuple):
    """What one launch has in common: the dtypes of factor, past, energy and gradient of a side."""

    factor: torch.dtype
    past: torch.dtype
    energy: torch.dtype
    grad: torch.dtype

    def types(self, aligned: bool, touched: Sequence[str]) -> Types:
        """What is compiled in for a launch that touches these operands."""
        factor, past, energy, grad = (
            TL_DTYPES[dtype].name if name in touched else None for name, dtype in self._asdict().items()
        )
        return Types(factor, past, energy, grad, aligned)


def side_classes(layer: Layer) -> tuple[SideClass, SideClass]:
    """Dtypes of the rows side and the columns side; absent tensors take the factor's."""

    def dtype(t: Tensor | None, like: Tensor) -> torch.dtype:
        return like.dtype if t is None else t.dtype

    a, b, left = layer.lora_A, layer.lora_B, layer.left
    assert left is not None, "layers without a past do not come here"
    return (
        SideClass(b.dtype, left.dtype, dtype(layer.row_energy, b), dtype(layer.grad_B, b)),
        SideClass(a.dtype, dtype(layer.right, left), dtype(layer.col_energy, a), dtype(layer.grad_A, a)),
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
    used, targets = limit + 1, set[int]()
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


def side_record(layer: Layer, is_rows: bool, grad_base: int, partner_slot: int) -> Side:
    """The record of one side; gradients relative to ``grad_base``."""
    factor, past, energy, grad = (
        (layer.lora_B, layer.left, layer.row_energy, layer.grad_B)
        if is_rows
        else (layer.lora_A, layer.left if layer.right is None else layer.right, layer.col_energy, layer.grad_A)
    )
    past_address, past_row, past_comp = _address(past, not is_rows)
    grad_address, grad_row, grad_comp = _address(grad, not is_rows)
    return Side(
        *_address(factor, not is_rows),
        *(past_address, past_row, past_comp),
        *((0, 0) if energy is None else (energy.data_ptr(), energy.stride(0))),
        rows=factor.shape[0 if is_rows else 1],
        grad_offset=0 if grad is None else grad_address - grad_base,
        grad_row=grad_row,
        grad_comp=grad_comp,
        partner_slot=partner_slot,
        components_are_last=int(past_comp < past_row),
        scaling_bits=float_bits(layer.scaling),
    )


def is_aligned(side: Side) -> bool:
    """Whether loads of this side may be 16 bytes wide: what ``ALIGNED`` promises to the kernels."""
    for address, row, comp in (
        (side.factor, side.factor_row, side.factor_comp),
        (side.past, side.past_row, side.past_comp),
    ):
        near, far = (comp, row) if side.components_are_last else (row, comp)
        if address and (address % 16 or near != 1 or far % 4):
            return False
    return side.rows % 4 == 0


def to_device(tables: Sequence[Sequence[tuple[int, ...]]], device: torch.device) -> list[Tensor]:
    """Int64 tables as views of one device tensor, copied once and without waiting for the device."""
    # Each begins at a multiple of 16 bytes: Triton compiles a kernel again for pointers that do not.
    flat = [[entry for row in table for entry in row] for table in tables]
    sizes = [len(entries) + len(entries) % 2 for entries in flat]
    padded = [entry for entries in flat for entry in (*entries, *[0] * (len(entries) % 2))]
    host = torch.tensor(padded, dtype=torch.int64, pin_memory=device.type == "cuda")
    if capturing():
        # The copy is part of the graph and repeated by every replay. Warming up before the capture avoids it.
        _read_by_graphs.append(host)
    return list(host.to(device, non_blocking=True).split(sizes))
