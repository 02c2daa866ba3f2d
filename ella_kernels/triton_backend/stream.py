"""Algorithms "stream" and "dense", fused: each program owns rows of one factor and walks the other side in tiles.

With factor ``x`` and past ``y`` of the owned side and a prime (``_2`` in the code) for the other side's, one tile is::

    D = s·x·x'ᵀ      W = y·y'ᵀ (or read)      H = D ⊙ (W ⊙ W + ρρ'ᵀ/τ)      ∂P/∂x += 2s H·x'      P += ⟨H, D⟩

The rows of B see the columns of A as the other side, and the reverse: one kernel writes both gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import device_key
from ..layer import Layer
from .launch import TL_DTYPES, arithmetic, launch, register_limit, weight_arguments
from .primitives import (
    add_tile,
    count_rows,
    find_layer,
    find_side,
    inverse_or_zero,
    load_item,
    load_scaling,
    load_tile,
    load_vector,
    load_weight,
    side_energy,
    side_factor,
    side_grad,
    side_past,
    split_scale,
)
from .schedule import Owners, Plan, make_plans
from .split_dot import dot
from .tables import LAYER, SIDE
from .tiles import StreamTile, stream_tile

__all__ = [
    "VALUES_BLOCK",
    "Shape",
    "StreamLaunches",
    "prepare_stream",
    "stream_kernel_factors",
    "stream_kernel_values",
    "stream_shape",
    "touched",
]

VALUES_BLOCK = 128


class Shape(NamedTuple):
    """Sizes of a class that its kernel is compiled for, ``S`` in it: ranks, and tiles cut to them.

    Attributes:
        R, K: components of factor and past. STORED: the past is a matrix, and K is 0.
        ENERGY, GRAD: whether there are energies; whether gradients are wanted.
        BM, BN: owned rows, and rows of the other side, of a tile.
        BR, BK: components of factor and past at a time.
        HELD: all components of the past fit a tile: the owned rows' is split once and kept.
    """

    R: int
    K: int
    STORED: bool
    ENERGY: bool
    GRAD: bool
    BM: int
    BN: int
    BR: int
    BK: int
    HELD: bool


@triton.jit
def _inverse_total(p_side, T: tl.constexpr, BLOCK: tl.constexpr):
    # 1/τ from the rows side of the layer, in one order for every program, in float64: it may be no number of fp32.
    e = side_energy(p_side, 0, T)
    n_rows = tl.load(p_side + SIDE.value.rows).to(tl.int32)
    b_total = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(0, n_rows, BLOCK):
        o_row = i + tl.arange(0, BLOCK)
        b_total += load_vector(e, o_row, o_row < n_rows, tl.float64)
    return inverse_or_zero(tl.sum(b_total))


@triton.jit
def _product(
    x, o_x, m_x, y, o_y, m_y, BLOCK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    # x·yᵀ [rows of x, rows of y] over all components, a block at a time.
    b_xy = tl.zeros((o_x.shape[0], o_y.shape[0]), dtype=ACC)
    for c in range(0, x.n_comp, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        b_x = load_tile(x, o_x, m_x, o_c, ACC, LAST)
        b_y = load_tile(y, o_y, m_y, o_c, ACC, not LAST)
        b_xy = dot(b_x, tl.trans(b_y), b_xy, PRECISION, ACC)
    return b_xy


@triton.jit(do_not_specialize=["weight", "grad_base"])
def stream_kernel_factors(
    p_sides, p_items, p_partials, p_weight, weight: tl.float64, grad_base: tl.int64, S: tl.constexpr, T: tl.constexpr,
    T_2: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_IS_TENSOR: tl.constexpr,
    IS_ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    BM: tl.constexpr = S.BM
    BR: tl.constexpr = S.BR
    # Only D needs more than three bf16 products for each of fp32: where the overlap vanishes, D is what cancels.
    NARROW: tl.constexpr = "bf16x3" if PRECISION == "tf32x3" else PRECISION
    item = load_item(p_items, tl.program_id(0).to(tl.int64))
    p_side = find_side(p_sides, item.side)
    # The two sides of a layer are neighbours in the table.
    p_side_2 = find_side(p_sides, item.side ^ 1)
    x = side_factor(p_side, item.start, S.R, T, LAST)
    x_2 = side_factor(p_side_2, 0, S.R, T_2, not LAST)
    n_rows = count_rows(item.start, tl.load(p_side + SIDE.value.rows), T)
    n_rows_2 = count_rows(0, tl.load(p_side_2 + SIDE.value.rows), T)
    if S.STORED:
        # One matrix, described by both sides: its components are the other side's rows.
        y = side_past(p_side, item.start, n_rows_2, T, LAST)
    else:
        y = side_past(p_side, item.start, S.K, T, LAST)
        y_2 = side_past(p_side_2, 0, S.K, T_2, not LAST)
    o_row = tl.arange(0, BM)
    m_row = o_row < n_rows
    first = item.first.to(tl.int32)
    o_comp = first + tl.arange(0, BR)
    if S.ENERGY:
        e = side_energy(p_side, item.start, T)
        e_2 = side_energy(p_side_2, 0, T_2)
        inverse_total = _inverse_total(p_side, T, 1024) if IS_ROWS else _inverse_total(p_side_2, T_2, 1024)
        b_e = (load_vector(e, o_row, m_row, tl.float64) * inverse_total).to(ACC)
    b_g = tl.zeros((BM, BR), dtype=ACC)
    b_value = tl.zeros((BM,), dtype=ACC)
    # With the scaling D is the update itself.
    scaling = load_scaling(p_side + SIDE.value.scaling_bits).to(ACC)
    # The owned side's tiles do not change along the walk, and are split once.
    if BR >= S.R:
        b_x = load_tile(x, o_row, m_row, tl.arange(0, BR), ACC, LAST) * scaling
    if S.HELD:
        b_y = load_tile(y, o_row, m_row, tl.arange(0, S.BK), ACC, LAST)
    for j in range(0, n_rows_2, S.BN):
        o_row_2 = j + tl.arange(0, S.BN)
        m_row_2 = o_row_2 < n_rows_2
        # D = s·x·x'ᵀ
        b_x_2 = load_tile(x_2, o_row_2, m_row_2, o_comp, ACC, not LAST)
        if BR >= S.R:
            b_d = dot(b_x, tl.trans(b_x_2), None, PRECISION, ACC)
        else:
            b_d = _product(x, o_row, m_row, x_2, o_row_2, m_row_2, BR, ACC, PRECISION, LAST) * scaling
        # W = y·y'ᵀ
        if S.STORED:
            b_w = load_tile(y, o_row, m_row, o_row_2, ACC, LAST)
        elif S.HELD:
            b_y_2 = load_tile(y_2, o_row_2, m_row_2, tl.arange(0, S.BK), ACC, not LAST)
            b_w = dot(b_y, tl.trans(b_y_2), None, NARROW, ACC)
        else:
            b_w = _product(y, o_row, m_row, y_2, o_row_2, m_row_2, S.BK, ACC, NARROW, LAST)
        # H = D ⊙ (W ⊙ W + ρρ'ᵀ/τ): in this order no product is far from those of ΔW and W, however large one and small
        # the other.
        b_h = (b_d * b_w) * b_w
        if S.ENERGY:
            b_e_2 = load_vector(e_2, o_row_2, m_row_2, ACC)
            b_h += (b_d * b_e[:, None]) * b_e_2[None, :]
        if IS_ROWS:
            b_value += tl.sum(b_h * b_d, 1)
        if S.GRAD:
            b_g = dot(b_h, b_x_2, b_g, NARROW, ACC)
    if IS_ROWS:
        tl.store(p_partials + item.slot, tl.sum(b_value.to(tl.float64)), mask=first == 0)
    if S.GRAD:
        weight = load_weight(p_weight, weight, WEIGHT_IS_TENSOR)
        scale = split_scale(2.0 * load_scaling(p_side + SIDE.value.scaling_bits) * weight, ACC)
        g = side_grad(p_side, item.start, S.R, grad_base, T)
        add_tile(g, o_row, m_row, o_comp, b_g * scale[0] * scale[1], ACC)


@triton.jit
def stream_kernel_values(p_layers, p_partials, p_values, BLOCK: tl.constexpr):
    p_layer = find_layer(p_layers, tl.program_id(0).to(tl.int64))
    p_first = p_partials + tl.load(p_layer + LAYER.value.row_slot)
    n_partials = tl.load(p_layer + LAYER.value.row_chunks).to(tl.int32)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(0, n_partials, BLOCK):
        o_part = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_first + o_part, mask=o_part < n_partials, other=0.0)
    tl.store(p_values + tl.load(p_layer + LAYER.value.value), tl.sum(b_sum).to(p_values.dtype.element_ty))


def stream_shape(r: int, k: int, stored: bool, energy: bool, grad: bool, tile: StreamTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    held = 0 < k <= tile.past_held
    return Shape(
        R=r, K=k, STORED=stored, ENERGY=energy, GRAD=grad, BM=tile.rows, BN=tile.other_rows,
        BR=min(tile.components, max(16, triton.next_power_of_2(r))),
        BK=max(16, triton.next_power_of_2(k)) if held else tile.past_block,
        HELD=0 < k <= tile.past_block or held,
    )  # fmt: skip


def touched(shape: Shape) -> dict[str, tuple[str, ...]]:
    """The operands that the kernel touches."""
    return {"factors": ("factor", "past", *["energy"] * shape.ENERGY, *["grad"] * shape.GRAD)}


class StreamLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    shape: Shape
    tile: StreamTile
    dtype: torch.dtype
    precision: str

    @property
    def work_bytes(self) -> int:
        """As :attr:`gram.GramLaunches.work_bytes`."""
        return max(8 * p.n_slots for p in self.plans)

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        tile = self.tile
        options = {"num_warps": tile.warps, "num_stages": tile.stages} | register_limit(tile.maxnreg)
        for plan in self.plans:
            # (n_slots,)
            partials = torch.empty(plan.n_slots, dtype=torch.float64, device=values.device)
            for part in plan.launches["factors"]:
                launch(
                    stream_kernel_factors, (part.n_items,), options, p_sides=plan.sides, p_items=part.items,
                    p_partials=partials, **weight_arguments(weight, values),
                    grad_base=grad_base, S=self.shape, T=part.types, T_2=part.other_types, ACC=TL_DTYPES[self.dtype],
                    PRECISION=self.precision, IS_ROWS=part.is_rows, LAST=part.last,
                )  # fmt: skip
            launch(
                stream_kernel_values, (plan.n_layers,), {"num_warps": 1}, p_layers=plan.layers, p_partials=partials,
                p_values=values, BLOCK=VALUES_BLOCK,
            )  # fmt: skip


def prepare_stream(
    layers: Sequence[Layer], precision: str, positions: Sequence[int], target: str | None = None
) -> StreamLaunches:
    """Hadamard penalty by tiles, of factors or of a stored past; arguments as :func:`gram.prepare_gram`."""
    first = layers[0]
    target = target or device_key(first.lora_A.device)
    dtype, precision, products = arithmetic(precision, layers, target)
    _, _, r, k = first.sizes
    tile = stream_tile(target, products)
    shape = stream_shape(r, k, first.right is None, first.row_energy is not None, first.grad_A is not None, tile)

    owners = Owners(touched(shape), shape.BM, range(0, r, shape.BR) if shape.GRAD else (0,))
    return StreamLaunches(make_plans(layers, positions, owners), shape, tile, dtype, precision)
