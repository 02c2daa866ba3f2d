"""Algorithm "gram", fused: three kernels over a pointer table, for every layer of a group at once.

blocks   M = Σ_i (x ⊛ x)(y ⊛ y)ᵀ over a chunk of rows, for one tile of factor pairs and past pairs
reduce   sums the chunks in order; value partials ⟨ωM_rows, ωM_cols⟩; leaves the coefficients of the gradients
factors  ∂P/∂x_ia = 2s² Σ_a' x_ia' Σ_q M'[aa', q] y_iq, added to the gradient; and the value from its partials
"""

from __future__ import annotations

import triton
import triton.language as tl

from .pairs import load_pairs, pair_index
from .records import (
    COL_CHUNKS,
    COL_SLOT,
    COMPONENTS_ARE_LAST,
    ITEM,
    ITEM_FIRST,
    ITEM_SECOND,
    ITEM_SIDE,
    ITEM_SLOT,
    ITEM_START,
    ITEM_STOP,
    LAYER,
    PARTNER_SLOT,
    ROW_CHUNKS,
    ROW_SLOT,
    SCALING_BITS,
    SIDE,
)
from .sides import (
    add_tile,
    inverse_or_zero,
    load_scaling,
    load_tile,
    load_weight,
    side_energy,
    side_factor,
    side_grad,
    side_past,
    store_value,
)

__all__ = ["gram_bwd_kernel_factors", "gram_fwd_kernel_blocks", "gram_fwd_kernel_reduce"]


@triton.jit
def _block(
    p_side, start, stop, o_p, o_q, R: tl.constexpr, K: tl.constexpr, ENERGY: tl.constexpr, FACTOR: tl.constexpr,
    PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, TP: tl.constexpr, TQ: tl.constexpr, COMPONENTS_LAST: tl.constexpr,
):  # fmt: skip
    b_block = tl.zeros((TP, TQ), dtype=ACC)
    b_total = tl.zeros((BM,), dtype=ACC)
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, COMPONENTS_LAST)
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, COMPONENTS_LAST)
    p_e, s_e = side_energy(p_side, start, ENERGY_TYPE)
    n_rows = (stop - start).to(tl.int32)
    if ALIGNED:
        n_rows = tl.multiple_of(n_rows, 4)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_xx = load_pairs(p_x, s_xr, s_xc, o_row, m_row, o_p, p_e, s_e, R, False, ACC, COMPONENTS_LAST)
        b_yy = load_pairs(p_y, s_yr, s_yc, o_row, m_row, o_q, p_e, s_e, K, ENERGY, ACC, COMPONENTS_LAST)
        b_block = tl.dot(tl.trans(b_xx), b_yy, b_block, input_precision=PRECISION, out_dtype=ACC)
        if ENERGY:
            b_total += tl.load(p_e + o_row * s_e, mask=m_row, other=0.0).to(ACC)
    return b_block, tl.sum(b_total)


@triton.jit
def gram_fwd_kernel_blocks(
    p_sides, p_items, p_blocks, p_totals, R: tl.constexpr, K: tl.constexpr, ENERGY: tl.constexpr,
    FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TP: tl.constexpr, TQ: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    Q: tl.constexpr = K * (K + 1) // 2 + ENERGY
    p_item = p_items + tl.program_id(0).to(tl.int64) * ITEM
    p_side = p_sides + tl.load(p_item + ITEM_SIDE) * SIDE
    start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
    o_p = tl.multiple_of(tl.load(p_item + ITEM_FIRST).to(tl.int32), TP) + tl.arange(0, TP)
    o_q = tl.multiple_of(tl.load(p_item + ITEM_SECOND).to(tl.int32), TQ) + tl.arange(0, TQ)
    slot = tl.load(p_item + ITEM_SLOT)
    if tl.load(p_side + COMPONENTS_ARE_LAST) != 0:
        b_block, total = _block(
            p_side, start, stop, o_p, o_q, R, K, ENERGY, FACTOR, PAST, ENERGY_TYPE, ALIGNED, ACC, PRECISION, BM, TP,
            TQ, True,
        )  # fmt: skip
    else:
        b_block, total = _block(
            p_side, start, stop, o_p, o_q, R, K, ENERGY, FACTOR, PAST, ENERGY_TYPE, ALIGNED, ACC, PRECISION, BM, TP,
            TQ, False,
        )  # fmt: skip
    m_block = (o_p < P)[:, None] & (o_q < Q)[None, :]
    tl.store(p_blocks + slot * (P * Q) + (o_p[:, None] * Q + o_q[None, :]), b_block, mask=m_block)
    if ENERGY:
        # Every tile of a slot holds the same total; the first one writes it.
        tl.store(p_totals + slot, total, mask=tl.load(p_item + ITEM_FIRST) + tl.load(p_item + ITEM_SECOND) == 0)


@triton.jit
def _sum_chunks(p_x, n_chunks, STEP: tl.constexpr, m_x, ACC: tl.constexpr, BLOCK: tl.constexpr):
    b_sum = tl.zeros((BLOCK,), dtype=ACC)
    for j in range(0, n_chunks.to(tl.int32)):
        b_sum += tl.load(p_x + j * STEP, mask=m_x, other=0.0)
    return b_sum


@triton.jit
def gram_fwd_kernel_reduce(
    p_layers, p_blocks, p_totals, p_partials, R: tl.constexpr, K: tl.constexpr, ENERGY: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    Q: tl.constexpr = K * (K + 1) // 2 + ENERGY
    i_layer, i_slice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_layer = p_layers + i_layer * LAYER
    o_e = i_slice * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < P * Q
    row_slot, col_slot = tl.load(p_layer + ROW_SLOT), tl.load(p_layer + COL_SLOT)
    p_rows, p_cols = p_blocks + row_slot * (P * Q) + o_e, p_blocks + col_slot * (P * Q) + o_e
    b_rows = _sum_chunks(p_rows, tl.load(p_layer + ROW_CHUNKS), P * Q, m_e, ACC, BLOCK)
    b_cols = _sum_chunks(p_cols, tl.load(p_layer + COL_CHUNKS), P * Q, m_e, ACC, BLOCK)
    o_p, o_q = o_e // Q, o_e % Q
    # Squares come first in the numbering of pairs and count once, mixed products twice.
    b_weight = tl.where(o_q < K, 1.0, 2.0).to(ACC)
    if ENERGY:
        total = tl.sum(tl.zeros((1,), dtype=ACC))
        for j in range(0, tl.load(p_layer + ROW_CHUNKS).to(tl.int32)):
            total += tl.load(p_totals + row_slot + j)
        b_weight = tl.where(o_q == Q - 1, inverse_or_zero(total).to(ACC), b_weight)
    b_pairs = tl.where(o_p < R, 1.0, 2.0).to(tl.float64)
    value = tl.sum(b_rows.to(tl.float64) * (b_cols * b_weight).to(tl.float64) * b_pairs)
    tl.store(p_partials + i_layer * tl.num_programs(1) + i_slice, value)
    # In place of the first chunks, which only this program reads at these elements.
    tl.store(p_rows, b_rows * b_weight, mask=m_e)
    tl.store(p_cols, b_cols * b_weight, mask=m_e)


@triton.jit
def _coefficients(p_c, o_a, o_b, o_q, R: tl.constexpr, Q: tl.constexpr, ACC: tl.constexpr):
    # [TQ, RA * RB]: column (a, b) holds the coefficients of the unordered pair {a, b}.
    m_ab = (o_a < R) & (o_b < R)
    o_c = pair_index(o_a, o_b, R)[None, :] * Q + o_q[:, None]
    return tl.load(p_c + o_c, mask=m_ab[None, :] & (o_q < Q)[:, None], other=0.0).to(ACC)


@triton.jit
def _factor_grads(
    p_side, p_c, grad_base, start, stop, scale, R: tl.constexpr, K: tl.constexpr, ENERGY: tl.constexpr,
    FACTOR: tl.constexpr, PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, TQ: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr,
    COMPONENTS_LAST: tl.constexpr,
):  # fmt: skip
    Q: tl.constexpr = K * (K + 1) // 2 + ENERGY
    ONE_TILE: tl.constexpr = Q <= TQ and RA >= R and RB >= R
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, COMPONENTS_LAST)
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, COMPONENTS_LAST)
    p_e, s_e = side_energy(p_side, start, ENERGY_TYPE)
    p_g, s_gr, s_gc = side_grad(p_side, grad_base, start, GRAD)
    n_rows = (stop - start).to(tl.int32)
    if ALIGNED:
        n_rows = tl.multiple_of(n_rows, 4)
    o_ab = tl.arange(0, RA * RB)
    if ONE_TILE:
        b_c = _coefficients(p_c, o_ab // RB, o_ab % RB, tl.arange(0, TQ), R, Q, ACC)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        for a0 in range(0, R, RA):
            b_grad = tl.zeros((BM, RA), dtype=ACC)
            for b0 in range(0, R, RB):
                b_w = tl.zeros((BM, RA * RB), dtype=ACC)
                if ONE_TILE:
                    b_yy = load_pairs(
                        p_y, s_yr, s_yc, o_row, m_row, tl.arange(0, TQ), p_e, s_e, K, ENERGY, ACC, COMPONENTS_LAST
                    )  # fmt: skip
                    b_w = tl.dot(b_yy, b_c, b_w, input_precision=PRECISION, out_dtype=ACC)
                else:
                    for q0 in range(0, Q, TQ):
                        o_q = q0 + tl.arange(0, TQ)
                        b_yy = load_pairs(
                            p_y, s_yr, s_yc, o_row, m_row, o_q, p_e, s_e, K, ENERGY, ACC, COMPONENTS_LAST
                        )  # fmt: skip
                        b_cq = _coefficients(p_c, a0 + o_ab // RB, b0 + o_ab % RB, o_q, R, Q, ACC)
                        b_w = tl.dot(b_yy, b_cq, b_w, input_precision=PRECISION, out_dtype=ACC)
                o_b = b0 + tl.arange(0, RB)
                b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, o_b, R, ACC, COMPONENTS_LAST)
                b_grad += tl.sum(tl.reshape(b_w, (BM, RA, RB)) * b_x[:, None, :], 2)
            add_tile(p_g, s_gr, s_gc, o_row, m_row, a0 + tl.arange(0, RA), R, b_grad * scale, ACC)


@triton.jit
def gram_bwd_kernel_factors(
    p_layers, p_sides, p_items, p_blocks, p_partials, p_values, p_weight, weight: tl.float64, grad_base: tl.int64,
    n_layers, n_slices, R: tl.constexpr, K: tl.constexpr, ENERGY: tl.constexpr, FACTOR: tl.constexpr,
    PAST: tl.constexpr, ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT_IS_TENSOR: tl.constexpr, BM: tl.constexpr, TQ: tl.constexpr, RA: tl.constexpr,
    RB: tl.constexpr, SLICES: tl.constexpr,
):  # fmt: skip
    P: tl.constexpr = R * (R + 1) // 2
    Q: tl.constexpr = K * (K + 1) // 2 + ENERGY
    i_item = tl.program_id(0).to(tl.int64)
    if i_item < n_layers:
        store_value(p_layers + i_item * LAYER, p_partials + i_item * n_slices, n_slices, p_values, SLICES)
    else:
        p_item = p_items + (i_item - n_layers) * ITEM
        p_side = p_sides + tl.load(p_item + ITEM_SIDE) * SIDE
        start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
        p_c = p_blocks + tl.load(p_side + PARTNER_SLOT) * (P * Q)
        scaling = load_scaling(p_side + SCALING_BITS)
        scale = (2.0 * scaling * scaling * load_weight(p_weight, weight, WEIGHT_IS_TENSOR)).to(ACC)
        if tl.load(p_side + COMPONENTS_ARE_LAST) != 0:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, R, K, ENERGY, FACTOR, PAST, ENERGY_TYPE, GRAD,
                ALIGNED, ACC, PRECISION, BM, TQ, RA, RB, True,
            )  # fmt: skip
        else:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, R, K, ENERGY, FACTOR, PAST, ENERGY_TYPE, GRAD,
                ALIGNED, ACC, PRECISION, BM, TQ, RA, RB, False,
            )  # fmt: skip
