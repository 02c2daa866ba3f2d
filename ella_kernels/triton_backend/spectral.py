"""The projected norm, fused. With ``M = Σ_i y_i x_iᵀ (k, r)`` of each side, past ``y`` and factor ``x``::

    P = s² ‖M_rows M_colsᵀ‖² = s² ⟨M_rowsᵀM_rows, M_colsᵀM_cols⟩      ∂P/∂x_i = 2s² y_iᵀ C,  C = M (M'ᵀM')

where ``'`` is the other side. Three kernels: blocks of M over chunks of rows; C and the value, in float64, because
nearly orthogonal factors cancel there; the gradients.
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
from .launch import TL_DTYPES, dot_precision, sums_dtype, weight_arguments
from .primitives import (
    add_tile,
    count_rows,
    load_scaling,
    load_tile,
    load_weight,
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
    ITEM_SIDE,
    ITEM_SLOT,
    ITEM_START,
    ITEM_STOP,
    LAYER,
    LAYER_SCALING_BITS,
    ROW_CHUNKS,
    ROW_SLOT,
    SIDE,
)
from .schedule import Plan, Work, make_plans
from .split_dot import dot
from .tiles import SpectralTile, spectral_tile

__all__ = [
    "SpectralLaunches",
    "prepare_spectral",
    "spectral_bwd_kernel_factors",
    "spectral_constants",
    "spectral_fwd_kernel_blocks",
    "spectral_fwd_kernel_reduce",
]


@triton.jit
def _block(
    p_side, start, stop, o_k, R: tl.constexpr, K: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr,
    BK: tl.constexpr, COMPONENTS_LAST: tl.constexpr,
):  # fmt: skip
    b_block = tl.zeros((BK, BR), dtype=ACC)
    p_x, s_xr, s_xc = side_factor(p_side, start, FACTOR, ALIGNED, COMPONENTS_LAST)
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, COMPONENTS_LAST)
    n_rows = count_rows(start, stop, ALIGNED)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, tl.arange(0, BR), R, ACC, COMPONENTS_LAST)
        b_y = load_tile(p_y, s_yr, s_yc, o_row, m_row, o_k, K, ACC, COMPONENTS_LAST)
        b_block = dot(tl.trans(b_y), b_x, b_block, PRECISION, ACC)
    return b_block


@triton.jit
def spectral_fwd_kernel_blocks(
    p_sides, p_items, p_blocks, R: tl.constexpr, K: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr,
    ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    p_item = p_items + tl.program_id(0).to(tl.int64) * ITEM
    p_side = p_sides + tl.load(p_item + ITEM_SIDE) * SIDE
    start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
    o_k, o_r = tl.load(p_item + ITEM_FIRST).to(tl.int32) + tl.arange(0, BK), tl.arange(0, BR)
    if tl.load(p_side + COMPONENTS_ARE_LAST) != 0:
        b_block = _block(p_side, start, stop, o_k, R, K, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, BR, BK, True)
    else:
        b_block = _block(p_side, start, stop, o_k, R, K, FACTOR, PAST, ALIGNED, ACC, PRECISION, BM, BR, BK, False)
    p_block = p_blocks + tl.load(p_item + ITEM_SLOT) * (K * R)
    tl.store(p_block + (o_k[:, None] * R + o_r[None, :]), b_block, mask=(o_k < K)[:, None] & (o_r < R)[None, :])


@triton.jit
def _sum_chunks(
    p_blocks, slot, n_chunks, o_k, R: tl.constexpr, K: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    o_r = tl.arange(0, BR)
    m_m = (o_k < K)[:, None] & (o_r < R)[None, :]
    p_m = p_blocks + slot * (K * R) + (o_k[:, None] * R + o_r[None, :])
    b_m = tl.zeros((BK, BR), dtype=tl.float64)
    for j in range(0, n_chunks.to(tl.int32)):
        b_m += tl.load(p_m + j * (K * R), mask=m_m, other=0.0).to(tl.float64)
    return b_m


@triton.jit
def spectral_fwd_kernel_reduce(
    p_layers, p_blocks, p_coefficients, p_partials, R: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    i_layer, i_side, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    p_layer = p_layers + i_layer * LAYER
    row_slot, row_chunks = tl.load(p_layer + ROW_SLOT), tl.load(p_layer + ROW_CHUNKS)
    col_slot, col_chunks = tl.load(p_layer + COL_SLOT), tl.load(p_layer + COL_CHUNKS)
    is_rows = i_side == 0
    own_slot, own_chunks = tl.where(is_rows, row_slot, col_slot), tl.where(is_rows, row_chunks, col_chunks)
    other_slot, other_chunks = tl.where(is_rows, col_slot, row_slot), tl.where(is_rows, col_chunks, row_chunks)
    b_gram = tl.zeros((BR, BR), dtype=tl.float64)
    for k0 in range(0, K, BK):
        b_m = _sum_chunks(p_blocks, other_slot, other_chunks, k0 + tl.arange(0, BK), R, K, BR, BK)
        b_gram = dot(tl.trans(b_m), b_m, b_gram, "ieee", tl.float64)
    o_k, o_r = i_block * BK + tl.arange(0, BK), tl.arange(0, BR)
    b_m = _sum_chunks(p_blocks, own_slot, own_chunks, o_k, R, K, BR, BK)
    b_c = dot(b_m, b_gram, tl.zeros((BK, BR), dtype=tl.float64), "ieee", tl.float64)
    p_c = p_coefficients + (2 * i_layer + i_side) * (K * R) + (o_k[:, None] * R + o_r[None, :])
    scaling = load_scaling(p_layer + LAYER_SCALING_BITS)
    tl.store(p_c, (b_c * (scaling * scaling)).to(ACC), mask=(o_k < K)[:, None] & (o_r < R)[None, :])
    tl.store(p_partials + i_layer * tl.num_programs(2) + i_block, tl.sum(b_m * b_c), mask=is_rows)


@triton.jit
def _factor_grads(
    p_side, p_c, grad_base, start, stop, scale, spare, R: tl.constexpr, K: tl.constexpr, PAST: tl.constexpr,
    GRAD: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr,
    BR: tl.constexpr, BK: tl.constexpr, COMPONENTS_LAST: tl.constexpr,
):  # fmt: skip
    p_y, s_yr, s_yc = side_past(p_side, start, PAST, ALIGNED, COMPONENTS_LAST)
    p_g, s_gr, s_gc = side_grad(p_side, grad_base, start, GRAD)
    n_rows = count_rows(start, stop, ALIGNED)
    o_r = tl.arange(0, BR)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_grad = tl.zeros((BM, BR), dtype=ACC)
        for k0 in range(0, K, BK):
            o_k = k0 + tl.arange(0, BK)
            b_y = load_tile(p_y, s_yr, s_yc, o_row, m_row, o_k, K, ACC, COMPONENTS_LAST)
            m_c = (o_k < K)[:, None] & (o_r < R)[None, :]
            b_c = tl.load(p_c + (o_k[:, None] * R + o_r[None, :]), mask=m_c, other=0.0)
            b_grad = dot(b_y, b_c, b_grad, PRECISION, ACC)
        add_tile(p_g, s_gr, s_gc, o_row, m_row, o_r, R, b_grad * scale * spare, ACC)


@triton.jit
def spectral_bwd_kernel_factors(
    p_layers, p_sides, p_items, p_coefficients, p_partials, p_values, p_weight, weight: tl.float64,
    grad_base: tl.int64, n_layers, R: tl.constexpr, K: tl.constexpr, FACTOR: tl.constexpr, PAST: tl.constexpr,
    ENERGY_TYPE: tl.constexpr, GRAD: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, WEIGHT_IS_TENSOR: tl.constexpr, BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
    SLICES: tl.constexpr,
):  # fmt: skip
    N_SLICES: tl.constexpr = (K + BK - 1) // BK
    i_item = tl.program_id(0).to(tl.int64)
    if i_item < n_layers:
        store_value(p_layers + i_item * LAYER, p_partials + i_item * N_SLICES, N_SLICES, p_values, SLICES)
    else:
        p_item = p_items + (i_item - n_layers) * ITEM
        i_side = tl.load(p_item + ITEM_SIDE)
        p_side = p_sides + i_side * SIDE
        start, stop = tl.load(p_item + ITEM_START), tl.load(p_item + ITEM_STOP)
        p_c = p_coefficients + i_side * (K * R)
        scale, spare = split_scale(2.0 * load_weight(p_weight, weight, WEIGHT_IS_TENSOR), ACC)
        if tl.load(p_side + COMPONENTS_ARE_LAST) != 0:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, spare, R, K, PAST, GRAD, ALIGNED, ACC, PRECISION, BM, BR,
                BK, True
            )  # fmt: skip
        else:
            _factor_grads(
                p_side, p_c, grad_base, start, stop, scale, spare, R, K, PAST, GRAD, ALIGNED, ACC, PRECISION, BM, BR,
                BK, False
            )  # fmt: skip


def spectral_constants(r: int, k: int, tile: SpectralTile) -> dict:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    return {
        "R": r,
        "K": k,
        "BR": max(16, triton.next_power_of_2(r)),
        "BK": min(tile.past_components, max(16, triton.next_power_of_2(k))),
    }


class SpectralLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    sizes: dict
    tile: SpectralTile
    dtype: torch.dtype
    sums: torch.dtype
    precision: str

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        for plan in self.plans:
            self._launch_plan(plan, weight, values, grad_base)

    def _launch_plan(self, plan: Plan, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        tile, device, elements = self.tile, values.device, self.sizes["R"] * self.sizes["K"]
        n_slices = -(-self.sizes["K"] // self.sizes["BK"])
        blocks = torch.empty(plan.n_slots * elements, dtype=self.sums, device=device)
        coefficients = torch.empty(2 * plan.n_layers * elements, dtype=self.dtype, device=device)
        partials = torch.empty(plan.n_layers * n_slices, dtype=torch.float64, device=device)
        exact = "ieee" if self.sums == torch.float64 else self.precision
        sizes = self.sizes | {"ACC": TL_DTYPES[self.dtype]}
        compiled = {"num_warps": tile.warps, "num_stages": tile.stages}
        for launch in plan.launches:
            spectral_fwd_kernel_blocks[(launch.n_blocks,)](
                plan.sides,
                launch.blocks,
                blocks,
                **sizes | {"ACC": TL_DTYPES[self.sums]},
                **launch.constants,
                PRECISION=exact,
                BM=tile.rows,
                **compiled,
            )
        spectral_fwd_kernel_reduce[(plan.n_layers, 2, n_slices)](
            plan.layers, blocks, coefficients, partials, **sizes, num_warps=tile.warps
        )
        for i, launch in enumerate(plan.launches):
            # The first launch of a plan also finishes the values.
            n_layers = plan.n_layers if i == 0 else 0
            if n_layers + launch.n_grads == 0:
                continue
            spectral_bwd_kernel_factors[(n_layers + launch.n_grads,)](
                plan.layers, plan.sides, launch.grads, coefficients, partials, values,
                *weight_arguments(weight, values), grad_base, n_layers, **sizes, **launch.constants,
                WEIGHT_IS_TENSOR=isinstance(weight, Tensor), PRECISION=self.precision, BM=tile.grad_rows,
                SLICES=triton.next_power_of_2(n_slices), **compiled,
            )  # fmt: skip


def prepare_spectral(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> SpectralLaunches:
    """Spectral penalty of layers of one class; arguments as :func:`gram.prepare_gram`. Energies do not enter."""
    dtype, device = layers[0].dtype, layers[0].lora_A.device
    # The long sums, where nearly orthogonal factors cancel.
    sums = sums_dtype(precision != "tf32", layers)
    precision = dot_precision(precision, dtype, device)
    _, _, r, k = layers[0].sizes
    tile = spectral_tile(device_key(device), precision)
    sizes = spectral_constants(r, k, tile)
    work = Work(tile.rows, tile.grad_rows, k * r, sums.itemsize, [(c, 0, 0, 0) for c in range(0, k, sizes["BK"])])
    return SpectralLaunches(make_plans(layers, positions, work), sizes, tile, dtype, sums, precision)
