"""Algorithm "gram", fused: three kernels over a pointer table, for every layer of a group at once.

With ``X = x ⊛ y`` the Khatri–Rao products (rows, r·k) of one side, factor ``x`` and past ``y``, and ρ its energies::

    blocks    M = XᵀX over a chunk of rows, one tile of products by another. M[ac, bd] depends on the unordered pairs
              {a, b} and {c, d} only, so one entry of each is computed and kept; and Σ_i ρ_i x_ia x_ib
    reduce    sums the chunks in order; the value's share ⟨ω ⊙ M_rows, M_cols⟩ (ω: how often a pair occurs)
    factors   ∂P/∂x_ia = 2s² Σ_b x_ib (Σ_cd M'[ab, cd] y_ic y_id + ρ_i m'_ab), M' and m' of the other side, added to
              the gradient; and the value from its shares
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
from .launch import TL_DTYPES, arithmetic, register_limit, weight_arguments
from .primitives import (
    add_tile,
    count_rows,
    inverse_or_zero,
    load_products,
    load_scaling,
    load_tile,
    load_weight,
    n_pairs,
    pair_index,
    side_energy,
    side_factor,
    side_grad,
    side_past,
    split_scale,
    store_value,
)
from .records import (
    COL_CHUNKS,
    COL_SLOT,
    COMPONENTS_ARE_LAST,
    ITEM,
    ITEM_FIRST,
    ITEM_PAST_FIRST,
    ITEM_PAST_SECOND,
    ITEM_SECOND,
    ITEM_SIDE,
    ITEM_SLOT,
    ITEM_START,
    ITEM_STOP,
    LAYER,
    LAYER_SCALING_BITS,
    PARTNER_SLOT,
    ROW_CHUNKS,
    ROW_SLOT,
    SIDE,
)
from .schedule import Plan, Work, make_plans
from .split_dot import dot, dot_self
from .tiles import GramTile, gram_tile

__all__ = [
    "GramLaunches",
    "compiled_constants",
    "gram_bwd_kernel_factors",
    "gram_fwd_kernel_blocks",
    "gram_fwd_kernel_reduce",
    "gram_shape",
    "prepare_gram",
]


@triton.jit
def _block(
    p_side, start, stop, a0, b0, c0, d0, R: tl.constexpr, K: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TR: tl.constexpr,
    TK: tl.constexpr, SAME: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # [TR * TK, TR * TK]: products (a, c) from (a0, c0) by products (b, d) from (b0, d0), which are the same if SAME.
    b_block = tl.zeros((TR * TK, TR * TK), dtype=ACC)
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, LAST)
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, LAST)
    n_rows = count_rows(start, stop, ALIGNED)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_xy = load_products(
            p_x, s_xr, s_xc, a0, p_y, s_yr, s_yc, c0, o_row, m_row, R, K, BM, TR, TK, ACC, LAST
        )  # fmt: skip
        if SAME:
            b_block = dot_self(b_xy, b_block, PRECISION, ACC)
        else:
            b_other = load_products(
                p_x, s_xr, s_xc, b0, p_y, s_yr, s_yc, d0, o_row, m_row, R, K, BM, TR, TK, ACC, LAST
            )  # fmt: skip
            b_block = dot(tl.trans(b_xy), b_other, b_block, PRECISION, ACC)
    if SAME:
        b_block = 0.5 * (b_block + tl.trans(b_block))
    return b_block


@triton.jit
def _energy_block(
    p_side, start, stop, a0, b0, R: tl.constexpr, FACTOR: tl.constexpr, ENERGY_TYPE: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TE: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    # [TE, TE]: Σ ρ_i x_ia x_ib, and Σ ρ_i.
    b_block = tl.zeros((TE, TE), dtype=ACC)
    b_total = tl.zeros((BM,), dtype=tl.float64)
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, LAST)
    p_e, s_e = side_energy(p_side, start, ENERGY_TYPE)
    n_rows = count_rows(start, stop, ALIGNED)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_e = tl.load(p_e + o_row * s_e, mask=m_row, other=0.0).to(ACC)
        b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, a0 + tl.arange(0, TE), R, ACC, LAST)
        b_other = load_tile(p_x, s_xr, s_xc, o_row, m_row, b0 + tl.arange(0, TE), R, ACC, LAST)
        b_block = dot(tl.trans(b_x * b_e[:, None]), b_other, b_block, PRECISION, ACC)
        b_total += b_e.to(tl.float64)
    return b_block, tl.sum(b_total)


@triton.jit
def _products_item(
    p_item, p_side, p_block, R: tl.constexpr, K: tl.constexpr, GK: tl.constexpr, STRIDE: tl.constexpr,
    FACTOR: tl.constexpr, PAST: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, TR: tl.constexpr, TK: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
    a0 = tl.multiple_of(tl.load(p_item + ITEM_FIRST).to(tl.int32), TR)
    b0 = tl.multiple_of(tl.load(p_item + ITEM_SECOND).to(tl.int32), TR)
    c0 = tl.multiple_of(tl.load(p_item + ITEM_PAST_FIRST).to(tl.int32), TK)
    d0 = tl.multiple_of(tl.load(p_item + ITEM_PAST_SECOND).to(tl.int32), TK)
    # With one tile the compiler knows.
    if (R <= TR and K <= TK) or ((a0 == b0) & (c0 == d0)):
        b_block = _block(
            p_side, start, stop, a0, b0, c0, d0, R, K, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, TR, TK, True, LAST
        )  # fmt: skip
    else:
        b_block = _block(
            p_side, start, stop, a0, b0, c0, d0, R, K, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, TR, TK, False, LAST
        )  # fmt: skip
    o_first, o_second = tl.arange(0, TR * TK)[:, None], tl.arange(0, TR * TK)[None, :]
    o_a, o_c, o_b, o_d = a0 + o_first // TK, c0 + o_first % TK, b0 + o_second // TK, d0 + o_second % TK
    m_block = (o_a <= o_b) & (o_b < R) & (o_c < K) & (o_d < K) & (o_c // GK <= o_d // GK)
    tl.store(p_block + (pair_index(o_a, o_b, R, 1) * STRIDE + pair_index(o_c, o_d, K, GK)), b_block, mask=m_block)


@triton.jit
def _energy_item(
    p_item, p_side, p_block, p_total, R: tl.constexpr, STRIDE: tl.constexpr, FACTOR: tl.constexpr,
    ENERGY_TYPE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    TE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
    a0 = tl.multiple_of(tl.load(p_item + ITEM_FIRST).to(tl.int32), TE)
    b0 = tl.multiple_of(tl.load(p_item + ITEM_SECOND).to(tl.int32), TE)
    b_block, total = _energy_block(
        p_side, start, stop, a0, b0, R, FACTOR, ENERGY_TYPE, ALIGNED, ACC, PRECISION, BM, TE, LAST
    )  # fmt: skip
    o_a, o_b = a0 + tl.arange(0, TE)[:, None], b0 + tl.arange(0, TE)[None, :]
    tl.store(p_block + pair_index(o_a, o_b, R, 1) * STRIDE, b_block, mask=(o_a <= o_b) & (o_b < R))
    # Every tile of a slot finds the same total; the first one writes it.
    tl.store(p_total, total, mask=a0 + b0 == 0)


@triton.jit
def gram_fwd_kernel_blocks(
    p_sides, p_items, p_blocks, p_totals, R: tl.constexpr, K: tl.constexpr, GK: tl.constexpr, Q: tl.constexpr,
    ENERGY: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TR: tl.constexpr,
    TK: tl.constexpr, TE: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    STRIDE: tl.constexpr = (Q + 3) // 4 * 4
    p_item = p_items + tl.program_id(0).to(tl.int64) * ITEM
    p_side = p_sides + tl.load(p_item + ITEM_SIDE) * SIDE
    slot = tl.load(p_item + ITEM_SLOT)
    p_block = p_blocks + slot * (P * STRIDE)
    is_last = tl.load(p_side + COMPONENTS_ARE_LAST) != 0
    # Items of the energies are marked by a first component of the past that does not exist.
    if ENERGY and tl.load(p_item + ITEM_PAST_FIRST) >= K:
        if is_last:
            _energy_item(
                p_item, p_side, p_block + Q - 1, p_totals + slot, R, STRIDE, FACTOR, ENERGY_TYPE, ALIGNED, ACC,
                PRECISION, BM, TE, True,
            )  # fmt: skip
        else:
            _energy_item(
                p_item, p_side, p_block + Q - 1, p_totals + slot, R, STRIDE, FACTOR, ENERGY_TYPE, ALIGNED, ACC,
                PRECISION, BM, TE, False,
            )  # fmt: skip
    elif K > 0:
        if is_last:
            _products_item(
                p_item, p_side, p_block, R, K, GK, STRIDE, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, TR, TK, True
            )  # fmt: skip
        else:
            _products_item(
                p_item, p_side, p_block, R, K, GK, STRIDE, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, TR, TK, False
            )  # fmt: skip


@triton.jit
def _sum_chunks(p_x, n_chunks, STEP: tl.constexpr, m_x, ACC: tl.constexpr, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), dtype=ACC)
    for j in range(0, n_chunks.to(tl.int32)):
        b_sum += tl.load(p_x + j * STEP, mask=m_x, other=0.0)
    return b_sum


@triton.jit
def _multiplicity(o_q, K: tl.constexpr, GK: tl.constexpr, ACC: tl.constexpr):
    # 1 for pairs within a block of the past's components, where both orders are listed, and 2 between blocks.
    b_count = tl.full(o_q.shape, 2.0, dtype=ACC)
    for c0 in tl.static_range(0, K, GK):
        o_row = o_q - (c0 * K - c0 * (c0 - GK) // 2)
        b_count = tl.where((o_row >= 0) & (o_row < GK * (K - c0)) & (o_row % (K - c0) < GK), 1.0, b_count)
    return b_count


@triton.jit
def gram_fwd_kernel_reduce(
    p_layers, p_blocks, p_totals, p_partials, R: tl.constexpr, K: tl.constexpr, GK: tl.constexpr, Q: tl.constexpr,
    ENERGY: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    STRIDE: tl.constexpr = (Q + 3) // 4 * 4
    i_layer, i_slice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_layer = p_layers + i_layer * LAYER
    o_e = i_slice * BLOCK + tl.arange(0, BLOCK)
    o_p, o_q = o_e // STRIDE, o_e % STRIDE
    # Whole rows are read, which keeps loads wide; what pads them was never written.
    m_e = o_p < P
    row_slot, col_slot = tl.load(p_layer + ROW_SLOT), tl.load(p_layer + COL_SLOT)
    p_rows, p_cols = p_blocks + row_slot * (P * STRIDE) + o_e, p_blocks + col_slot * (P * STRIDE) + o_e
    b_rows = _sum_chunks(p_rows, tl.load(p_layer + ROW_CHUNKS), P * STRIDE, m_e, ACC, BLOCK)
    b_cols = _sum_chunks(p_cols, tl.load(p_layer + COL_CHUNKS), P * STRIDE, m_e, ACC, BLOCK)
    b_rows, b_cols = tl.where(o_q < Q, b_rows, 0.0), tl.where(o_q < Q, b_cols, 0.0)
    b_count = _multiplicity(o_q, K, GK, tl.float64)
    if ENERGY:
        total = tl.sum(tl.zeros((1,), dtype=tl.float64))
        for j in range(0, tl.load(p_layer + ROW_CHUNKS).to(tl.int32)):
            total += tl.load(p_totals + row_slot + j)
        b_count = tl.where(o_q == Q - 1, inverse_or_zero(total), b_count)
    # The factor's pairs are listed once; squares are the diagonal of its triangle.
    b_twice = tl.full((BLOCK,), 2.0, dtype=tl.float64)
    for a in tl.static_range(R):
        b_twice = tl.where(o_p == a * R - a * (a - 1) // 2, 1.0, b_twice)
    value = tl.sum(b_rows.to(tl.float64) * (b_cols.to(tl.float64) * b_count) * b_twice)
    tl.store(p_partials + i_layer * tl.num_programs(1) + i_slice, value)
    # Coefficients of the gradients, in place of the first chunks, which only this program reads at these elements.
    scaling = load_scaling(p_layer + LAYER_SCALING_BITS)
    b_count *= scaling * scaling
    tl.store(p_rows, (b_rows.to(tl.float64) * b_count).to(ACC), mask=m_e)
    tl.store(p_cols, (b_cols.to(tl.float64) * b_count).to(ACC), mask=m_e)


@triton.jit
def _coefficients(
    p_c, o_ab, m_ab, c0, d0, K: tl.constexpr, ACC: tl.constexpr, GK: tl.constexpr
):  # fmt: skip
    # [GK * GK, GR * GR]: row (c, d), column (b, a) holds the coefficient of x_b y_c y_d in ∂P/∂x_a.
    o_cd = tl.arange(0, GK * GK)
    o_c, o_d = c0 + o_cd // GK, d0 + o_cd % GK
    m_c = ((o_c < K) & (o_d < K))[:, None] & m_ab[None, :]
    return tl.load(p_c + (o_ab[None, :] + pair_index(o_c, o_d, K, GK)[:, None]), mask=m_c, other=0.0).to(ACC)


@triton.jit
def _columns(a0, b0, R: tl.constexpr, STRIDE: tl.constexpr, GR: tl.constexpr):
    # Rows of a Gram block for the columns (b, a) of a tile, in which the sum over b stays within a lane.
    o_ba = tl.arange(0, GR * GR)
    o_a, o_b = a0 + o_ba % GR, b0 + o_ba // GR
    o_ab = pair_index(tl.minimum(o_a, o_b), tl.maximum(o_a, o_b), R, 1) * STRIDE
    return o_ab, (o_a < R) & (o_b < R)


@triton.jit
def _factor_grads(
    p_side, p_c, grad_base, start, stop, scale, spare, R: tl.constexpr, K: tl.constexpr, GK: tl.constexpr,
    Q: tl.constexpr,
    ENERGY: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, GR: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    STRIDE: tl.constexpr = (Q + 3) // 4 * 4
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, LAST)
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, LAST)
    p_e, s_e = side_energy(p_side, start, ENERGY_TYPE)
    p_g, s_gr, s_gc = side_grad(p_side, grad_base, start, GRAD)
    n_rows = count_rows(start, stop, ALIGNED)
    if R <= GR and K <= GK:
        o_ab, m_ab = _columns(0, 0, R, STRIDE, GR)
        b_c = _coefficients(p_c, o_ab, m_ab, 0, 0, K, ACC, GK)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        for a0 in range(0, R, GR):
            b_grad = tl.zeros((BM, GR), dtype=ACC)
            for b0 in range(0, R, GR):
                o_ab, m_ab = _columns(a0, b0, R, STRIDE, GR)
                b_w = tl.zeros((BM, GR * GR), dtype=ACC)
                if R <= GR and K <= GK:
                    b_yy = load_products(
                        p_y, s_yr, s_yc, 0, p_y, s_yr, s_yc, 0, o_row, m_row, K, K, BM, GK, GK, ACC, LAST
                    )  # fmt: skip
                    b_w = dot(b_yy, b_c, b_w, PRECISION, ACC)
                else:
                    for c0 in range(0, K, GK):
                        for d0 in range(c0, K, GK):
                            b_yy = load_products(
                                p_y, s_yr, s_yc, c0, p_y, s_yr, s_yc, d0, o_row, m_row, K, K, BM, GK, GK, ACC, LAST
                            )  # fmt: skip
                            b_cd = _coefficients(p_c, o_ab, m_ab, c0, d0, K, ACC, GK)
                            b_w = dot(b_yy, b_cd, b_w, PRECISION, ACC)
                if ENERGY:
                    b_m = tl.load(p_c + (o_ab + Q - 1), mask=m_ab, other=0.0).to(ACC)
                    b_w += tl.load(p_e + o_row * s_e, mask=m_row, other=0.0).to(ACC)[:, None] * b_m[None, :]
                b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, b0 + tl.arange(0, GR), R, ACC, LAST)
                b_grad += tl.sum(tl.reshape(b_w, (BM, GR, GR)) * b_x[:, :, None], 1)
            add_tile(p_g, s_gr, s_gc, o_row, m_row, a0 + tl.arange(0, GR), R, b_grad * scale * spare, ACC)


@triton.jit
def gram_bwd_kernel_factors(
    p_layers, p_sides, p_items, p_blocks, p_partials, p_values, p_weight, weight: tl.float64, grad_base: tl.int64,
    n_layers, n_slices, R: tl.constexpr, K: tl.constexpr, GK: tl.constexpr, Q: tl.constexpr, ENERGY: tl.constexpr,
    FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, WEIGHT_IS_TENSOR: tl.constexpr, BM: tl.constexpr, GR: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    STRIDE: tl.constexpr = (Q + 3) // 4 * 4
    i_item = tl.program_id(0).to(tl.int64)
    if i_item < n_layers:
        store_value(p_layers + i_item * LAYER, p_partials + i_item * n_slices, n_slices, p_values, SLICES)
    else:
        p_item = p_items + (i_item - n_layers) * ITEM
        p_side = p_sides + tl.load(p_item + ITEM_SIDE) * SIDE
        start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
        p_c = p_blocks + tl.load(p_side + PARTNER_SLOT) * (P * STRIDE)
        scale, spare = split_scale(2.0 * load_weight(p_weight, weight, WEIGHT_IS_TENSOR), ACC)
        if tl.load(p_side + COMPONENTS_ARE_LAST) != 0:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, spare, R, K, GK, Q, ENERGY, FACTOR, PAST, ENERGY_TYPE, GRAD,
                ALIGNED, ACC, PRECISION, BM, GR, True,
            )  # fmt: skip
        else:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, spare, R, K, GK, Q, ENERGY, FACTOR, PAST, ENERGY_TYPE, GRAD,
                ALIGNED, ACC, PRECISION, BM, GR, False,
            )  # fmt: skip


_REDUCE_BLOCK = 1024
_ENERGY_TILE = 16


class Shape(NamedTuple):
    """Compile-time sizes of a class: ranks, and the tiles cut to them.

    Attributes:
        rows, tile_r, tile_k, warps: the ``blocks`` kernel's rows per step, and components of factor and past in a tile.
        grad_rows, grad_r, grad_k, grad_warps: of the ``factors`` kernel.
        stages to programs: as in :class:`tiles.GramTile`.
    """

    r: int
    k: int
    energy: bool
    rows: int
    tile_r: int
    tile_k: int
    warps: int
    grad_rows: int
    grad_r: int
    grad_k: int
    grad_warps: int
    stages: int
    grad_stages: int
    maxnreg: int | None
    grad_maxnreg: int | None
    programs: int

    @property
    def past_pairs(self) -> int:
        """Pairs of the past that a row of a Gram block holds, and its energy."""
        return n_pairs(self.k, self.grad_k) + self.energy

    @property
    def elements(self) -> int:
        """Of a Gram block; rows are padded to 16 bytes."""
        return n_pairs(self.r, 1) * -(-self.past_pairs // 4) * 4

    @property
    def n_slices(self) -> int:
        return -(-self.elements // _REDUCE_BLOCK)

    def work(self, itemsize: int) -> Work:
        """What planning needs to know: of equal entries only those of ordered tiles are computed."""

        def ordered(n: int, step: int) -> list[tuple[int, int]]:
            return [(first, second) for first in range(0, n, step) for second in range(first, n, step)]

        factor, past = ordered(self.r, self.tile_r), ordered(self.k, self.tile_k)
        tiles = [(*of_factor, *of_past) for of_factor in factor for of_past in past]
        if self.energy:
            # The past's component k does not exist: it stands for the energies.
            tiles += [(*of_factor, self.k, self.k) for of_factor in ordered(self.r, _ENERGY_TILE)]
        return Work(self.rows, self.grad_rows, self.elements, itemsize, tiles, self.programs)


def gram_shape(r: int, k: int, energy: bool, tile: GramTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    tile_r, tile_k = _components(r, 16), _components(k, 16)
    while tile_r * tile_k > tile.products:
        tile_r, tile_k = (tile_r // 2, tile_k) if tile_r > tile_k else (tile_r, tile_k // 2)
    return Shape(
        r, k, energy, tile.rows, tile_r, tile_k, tile.warps,
        tile.grad_rows, _components(r, tile.grad_components), _components(k, tile.grad_past_components),
        tile.grad_warps, tile.stages, tile.grad_stages, tile.maxnreg, tile.grad_maxnreg, tile.programs,
    )  # fmt: skip


def _components(rank: int, most: int) -> int:
    return min(most, max(4, triton.next_power_of_2(max(1, rank))))


def compiled_constants(shape: Shape) -> list[tuple[str, dict, int]]:
    """Name, compile-time sizes and options, and warps of the three kernels, in launch order."""
    sizes = {"R": shape.r, "K": shape.k, "GK": shape.grad_k, "Q": shape.past_pairs, "ENERGY": int(shape.energy)}
    blocks = sizes | {"BM": shape.rows, "TR": shape.tile_r, "TK": shape.tile_k, "TE": _ENERGY_TILE}
    blocks |= {"num_stages": shape.stages} | register_limit(shape.maxnreg)
    reduce = sizes | {"BLOCK": _REDUCE_BLOCK}
    factors = sizes | {"BM": shape.grad_rows, "GR": shape.grad_r}
    factors |= {"SLICES": triton.next_power_of_2(shape.n_slices), "WEIGHT_IS_TENSOR": True}
    factors |= {"num_stages": shape.grad_stages} | register_limit(shape.grad_maxnreg)
    return [
        ("gram_fwd_kernel_blocks", blocks, shape.warps),
        ("gram_fwd_kernel_reduce", reduce, 4),
        ("gram_bwd_kernel_factors", factors, shape.grad_warps),
    ]


class GramLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    shape: Shape
    dtype: torch.dtype
    precision: str
    constants: list[tuple[str, dict, int]]

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """Values into their positions, ``weight`` times the gradients onto the targets, at most three launches a plan.

        Args:
            weight: a number or a 0-dim tensor, which is read on the device.
            values: float32 or float64.
            grad_base: address of the first layer's ``grad_B``, 0 without gradients.
        """
        for plan in self.plans:
            self._launch_plan(plan, weight, values, grad_base)

    def _launch_plan(self, plan: Plan, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        shape, dtype, device, acc = self.shape, self.dtype, values.device, TL_DTYPES[self.dtype]
        blocks = torch.empty(plan.n_slots * shape.elements, dtype=dtype, device=device)
        totals = torch.empty(plan.n_slots if shape.energy else 1, dtype=torch.float64, device=device)
        partials = torch.empty(plan.n_layers * shape.n_slices, dtype=torch.float64, device=device)
        (_, for_blocks, warps), (_, for_reduce, reduce_warps), (_, for_factors, grad_warps) = self.constants
        for_factors = for_factors | {"WEIGHT_IS_TENSOR": isinstance(weight, Tensor)}
        common = {"ACC": acc, "PRECISION": self.precision}
        for launch in plan.launches:
            gram_fwd_kernel_blocks[(launch.n_blocks,)](
                plan.sides, launch.blocks, blocks, totals, **for_blocks, **launch.constants, **common, num_warps=warps
            )
        gram_fwd_kernel_reduce[(plan.n_layers, shape.n_slices)](
            plan.layers, blocks, totals, partials, **for_reduce, ACC=acc, num_warps=reduce_warps
        )
        for i, launch in enumerate(plan.launches):
            # The first launch of a plan also finishes the values.
            n_layers = plan.n_layers if i == 0 else 0
            if n_layers + launch.n_grads == 0:
                continue
            gram_bwd_kernel_factors[(n_layers + launch.n_grads,)](
                plan.layers, plan.sides, launch.grads, blocks, partials, values, *weight_arguments(weight, values),
                grad_base, n_layers, shape.n_slices, **for_factors, **launch.constants, **common,
                num_warps=grad_warps,
            )  # fmt: skip


def prepare_gram(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> GramLaunches:
    """Hadamard penalty of layers that share ranks and dtypes; gradients go to ``grad_A``, ``grad_B`` if given.

    Args:
        layers: checked layers with low-rank pasts, none of them zero by shape, of one class and device.
        precision: "auto", "ieee" or "tf32", see :func:`launch.arithmetic`.
        positions: layer ``i``'s unweighted value is number ``positions[i]`` of the values.
    """
    dtype, precision, products = arithmetic(precision, layers)
    _, _, r, k = layers[0].sizes
    tile = gram_tile(device_key(layers[0].lora_A.device), products)
    shape = gram_shape(r, k, layers[0].row_energy is not None, tile)
    plans = make_plans(layers, positions, shape.work(dtype.itemsize))
    return GramLaunches(plans, shape, dtype, precision, compiled_constants(shape))
