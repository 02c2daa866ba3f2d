"""Algorithms "stream" and "dense", fused: each program owns rows of one factor and walks the other side in tiles.

With ``x, L`` the factors of the owned side and ``x', R`` those of the other, one tile is::

    D = s·x·x'ᵀ      W = L·Rᵀ (or read)      H = D ⊙ (W ⊙ W + ρκᵀ/τ)      ∂P/∂x += 2s H·x'      P += ⟨H, D⟩

The rows of B see the columns of A as the other side, and the reverse: one kernel writes both gradients.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .primitives import (
    add_tile,
    count_rows,
    inverse_or_zero,
    load_scaling,
    load_tile,
    load_weight,
    side_energy,
    side_factor,
    side_grad,
    side_past,
    split_scale,
)
from .records import (
    ENERGY_PTR,
    ENERGY_ROW,
    ITEM,
    ITEM_FIRST,
    ITEM_SIDE,
    ITEM_SLOT,
    ITEM_START,
    LAYER,
    LAYER_VALUE,
    ROW_CHUNKS,
    ROW_SLOT,
    ROWS,
    SCALING_BITS,
    SIDE,
)
from .split_dot import dot

__all__ = ["stream_kernel_factors", "stream_kernel_values"]


@triton.jit
def _energy_share(p_side, TYPE: tl.constexpr, BLOCK: tl.constexpr):
    # 1/τ from the rows side of the layer, in one order for every program, in float64: it may be no number of fp32.
    p_energy, s_energy = tl.load(p_side + ENERGY_PTR).to(tl.pointer_type(TYPE)), tl.load(p_side + ENERGY_ROW)
    n_rows = tl.load(p_side + ROWS).to(tl.int32)
    b_total = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(0, n_rows, BLOCK):
        o_row = i + tl.arange(0, BLOCK)
        b_total += tl.load(p_energy + o_row * s_energy, mask=o_row < n_rows, other=0.0).to(tl.float64)
    return inverse_or_zero(tl.sum(b_total))


@triton.jit
def _product(
    p_x, s_xr, s_xc, o_x, m_x, p_y, s_yr, s_yc, o_y, m_y, N: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # [BM, BN] inner products over all components, a block at a time.
    b_xy = tl.zeros((BM, BN), dtype=ACC)
    for c in range(0, N, BLOCK):
        o_c = c + tl.arange(0, BLOCK)
        b_x = load_tile(p_x, s_xr, s_xc, o_x, m_x, o_c, N, ACC, LAST)
        b_y = load_tile(p_y, s_yr, s_yc, o_y, m_y, o_c, N, ACC, not LAST)
        b_xy = dot(b_x, tl.trans(b_y), b_xy, PRECISION, ACC)
    return b_xy


@triton.jit
def stream_kernel_factors(
    p_sides, p_items, p_partials, p_weight, weight: tl.float64, grad_base: tl.int64, R: tl.constexpr, K: tl.constexpr,
    STORED: tl.constexpr, ENERGY: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr,
    GRAD: tl.constexpr, FACTOR_2: tl.constexpr, PAST_2: tl.constexpr, ENERGY_TYPE_2: tl.constexpr,
    WITH_GRAD: tl.constexpr, WEIGHT_IS_TENSOR: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    IS_ROWS: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # Only D needs more than three bf16 products for each of fp32: where the overlap vanishes, D is what cancels.
    NARROW: tl.constexpr = "bf16x3" if PRECISION == "tf32x3" else PRECISION
    p_item = p_items + tl.program_id(0).to(tl.int64) * ITEM
    i_side, start = tl.load(p_item + ITEM_SIDE), tl.load(p_item + ITEM_START)
    i_comp, slot = tl.load(p_item + ITEM_FIRST).to(tl.int32), tl.load(p_item + ITEM_SLOT)
    p_side = p_sides + i_side * SIDE
    # The two sides of a layer are neighbours in the table.
    p_other = p_sides + (i_side ^ 1) * SIDE
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, LAST)
    p_z, s_zr, s_zc = side_factor(p_other, 0, FACTOR_2, ALIGNED, not LAST)
    # A stored past is one matrix, described by both sides: its components are the other side's rows.
    p_l, s_lr, s_lc = side_past(p_side, start, PAST, ALIGNED, LAST)
    n_rows = count_rows(start, tl.load(p_side + ROWS), ALIGNED)
    n_other = count_rows(0, tl.load(p_other + ROWS), ALIGNED)
    o_row = tl.arange(0, BM)
    m_row = o_row < n_rows
    o_comp = i_comp + tl.arange(0, BR)
    if not STORED:
        p_r, s_rr, s_rc = side_past(p_other, 0, PAST_2, ALIGNED, not LAST)
    if ENERGY:
        p_e, s_e = side_energy(p_side, start, ENERGY_TYPE)
        p_f, s_f = side_energy(p_other, 0, ENERGY_TYPE_2)
        share = _energy_share(p_side, ENERGY_TYPE, 1024) if IS_ROWS else _energy_share(p_other, ENERGY_TYPE_2, 1024)
        b_energy = (tl.load(p_e + o_row * s_e, mask=m_row, other=0.0).to(tl.float64) * share).to(ACC)
    b_grad = tl.zeros((BM, BR), dtype=ACC)
    b_value = tl.zeros((BM,), dtype=ACC)
    # With the scaling D is the update itself.
    scaling = load_scaling(p_side + SCALING_BITS).to(ACC)
    # The owned side's tiles do not change along the walk, and are split once.
    if BR >= R:
        b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, tl.arange(0, BR), R, ACC, LAST) * scaling
    if not STORED and K > 0 and BK >= K:
        b_l = load_tile(p_l, s_lr, s_lc, o_row, m_row, tl.arange(0, BK), K, ACC, LAST)
    for j in range(0, n_other, BN):
        o_col = j + tl.arange(0, BN)
        m_col = o_col < n_other
        b_z = load_tile(p_z, s_zr, s_zc, o_col, m_col, o_comp, R, ACC, not LAST)
        if BR >= R:
            b_d = dot(b_x, tl.trans(b_z), None, PRECISION, ACC)
        else:
            b_d = _product(
                p_x, s_xr, s_xc, o_row, m_row, p_z, s_zr, s_zc, o_col, m_col, R, BR, ACC, PRECISION, BM, BN, LAST
            ) * scaling  # fmt: skip
        if STORED:
            m_w = m_row[:, None] & m_col[None, :]
            if LAST:
                b_w = tl.load(p_l + (o_row[:, None] * s_lr + o_col[None, :] * s_lc), mask=m_w, other=0.0).to(ACC)
            else:
                b_w = tl.load(
                    p_l + (o_row[None, :] * s_lr + o_col[:, None] * s_lc), mask=tl.trans(m_w), other=0.0
                ).to(ACC)  # fmt: skip
                b_w = tl.trans(b_w)
        elif K > 0 and BK >= K:
            b_r = load_tile(p_r, s_rr, s_rc, o_col, m_col, tl.arange(0, BK), K, ACC, not LAST)
            b_w = dot(b_l, tl.trans(b_r), None, NARROW, ACC)
        else:
            b_w = _product(
                p_l, s_lr, s_lc, o_row, m_row, p_r, s_rr, s_rc, o_col, m_col, K, BK, ACC, NARROW, BM, BN, LAST
            )  # fmt: skip
        # In this order no product is far from those of ΔW and W, however large one and small the other.
        b_h = (b_d * b_w) * b_w
        if ENERGY:
            b_f = tl.load(p_f + o_col * s_f, mask=m_col, other=0.0).to(ACC)
            b_h += (b_d * b_energy[:, None]) * b_f[None, :]
        if IS_ROWS:
            b_value += tl.sum(b_h * b_d, 1)
        if WITH_GRAD:
            b_grad = dot(b_h, b_z, b_grad, NARROW, ACC)
    if IS_ROWS:
        tl.store(p_partials + slot, tl.sum(b_value.to(tl.float64)), mask=i_comp == 0)
    if WITH_GRAD:
        weight = load_weight(p_weight, weight, WEIGHT_IS_TENSOR)
        scale, spare = split_scale(2.0 * load_scaling(p_side + SCALING_BITS) * weight, ACC)
        p_g, s_gr, s_gc = side_grad(p_side, grad_base, start, GRAD)
        add_tile(p_g, s_gr, s_gc, o_row, m_row, o_comp, R, b_grad * scale * spare, ACC)


@triton.jit
def stream_kernel_values(p_layers, p_partials, p_values, BLOCK: tl.constexpr):
    p_layer = p_layers + tl.program_id(0).to(tl.int64) * LAYER
    p_first = p_partials + tl.load(p_layer + ROW_SLOT)
    n_partials = tl.load(p_layer + ROW_CHUNKS).to(tl.int32)
    b_sum = tl.zeros((BLOCK,), dtype=tl.float64)
    for i in range(0, n_partials, BLOCK):
        o_part = i + tl.arange(0, BLOCK)
        b_sum += tl.load(p_first + o_part, mask=o_part < n_partials, other=0.0)
    tl.store(p_values + tl.load(p_layer + LAYER_VALUE), tl.sum(b_sum).to(p_values.dtype.element_ty))
