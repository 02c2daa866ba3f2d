"""The projected norm, fused. With ``M = Σ_i y_i x_iᵀ (k, r)`` of each side, past ``y`` and factor ``x``::

    P = s² ‖M M'ᵀ‖² = s² ⟨MᵀM, M'ᵀM'⟩      ∂P/∂x_i = 2 y_iᵀ C,  C = s² M (M'ᵀM')

where ``'`` (``_2`` in the code) is the other side. Three kernels: blocks of M over chunks of rows; C and the value, in
float64, because nearly orthogonal factors cancel there; the gradients.
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
from .launch import TL_DTYPES, dot_precision, launch, sums_dtype, weight_arguments
from .primitives import (
    add_tile,
    count_rows,
    find_layer,
    find_side,
    load_item,
    load_scaling,
    load_tile,
    load_weight,
    side_factor,
    side_grad,
    side_past,
    split_scale,
    store_value,
    sum_slices,
)
from .schedule import Chunks, Plan, make_plans
from .split_dot import dot
from .tables import LAYER, SIDE
from .tiles import SpectralTile, spectral_tile

__all__ = [
    "TOUCHED",
    "Shape",
    "SpectralLaunches",
    "prepare_spectral",
    "spectral_bwd_kernel_factors",
    "spectral_fwd_kernel_blocks",
    "spectral_fwd_kernel_reduce",
    "spectral_shape",
]

# The operands that each kernel over items touches. Energies do not enter.
TOUCHED: dict[str, tuple[str, ...]] = {"blocks": ("factor", "past"), "factors": ("past", "grad")}


class Shape(NamedTuple):
    """Sizes of a class that its kernels are compiled for, ``S`` in them: ranks, and tiles cut to them.

    Attributes:
        R, K: components of factor and past. BR, BK: the same, of a tile.
        BM, GM: rows per step of the ``blocks`` and the ``factors`` kernel.
        N_SLICES: tiles of the past's components. SLICES: the same, as a block.
    """

    R: int
    K: int
    BR: int
    BK: int
    BM: int
    GM: int
    N_SLICES: int
    SLICES: int


@triton.jit
def _block(
    p_side, item, o_k, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    # M = Σ_i y_i x_iᵀ [BK, BR]
    BR: tl.constexpr = S.BR
    b_m = tl.zeros((o_k.shape[0], BR), dtype=ACC)
    x = side_factor(p_side, item.start, S.R, T, LAST)
    y = side_past(p_side, item.start, S.K, T, LAST)
    n_rows = count_rows(item.start, item.stop, T)
    for i in range(0, n_rows, S.BM):
        o_row = i + tl.arange(0, S.BM)
        m_row = o_row < n_rows
        b_x = load_tile(x, o_row, m_row, tl.arange(0, BR), ACC, LAST)
        b_y = load_tile(y, o_row, m_row, o_k, ACC, LAST)
        b_m = dot(tl.trans(b_y), b_x, b_m, PRECISION, ACC)
    return b_m


@triton.jit
def spectral_fwd_kernel_blocks(
    p_sides, p_items, p_blocks, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    item = load_item(p_items, tl.program_id(0).to(tl.int64))
    p_side = find_side(p_sides, item.side)
    o_k, o_r = item.first.to(tl.int32) + tl.arange(0, S.BK), tl.arange(0, S.BR)
    if tl.load(p_side + SIDE.value.components_are_last) != 0:
        b_m = _block(p_side, item, o_k, S, T, ACC, PRECISION, True)
    else:
        b_m = _block(p_side, item, o_k, S, T, ACC, PRECISION, False)
    p_m = p_blocks + item.slot * (S.K * S.R) + (o_k[:, None] * S.R + o_r[None, :])
    tl.store(p_m, b_m, mask=(o_k < S.K)[:, None] & (o_r < S.R)[None, :])


@triton.jit
def _sum_chunks(p_blocks, slot, n_chunks, o_k, S: tl.constexpr):
    # M [BK, BR] of a side, in float64.
    BR: tl.constexpr = S.BR
    o_r = tl.arange(0, BR)
    m_m = (o_k < S.K)[:, None] & (o_r < S.R)[None, :]
    p_m = p_blocks + slot * (S.K * S.R) + (o_k[:, None] * S.R + o_r[None, :])
    b_m = tl.zeros((o_k.shape[0], BR), dtype=tl.float64)
    for j in range(0, n_chunks.to(tl.int32)):
        b_m += tl.load(p_m + j * (S.K * S.R), mask=m_m, other=0.0).to(tl.float64)
    return b_m


@triton.jit
def spectral_fwd_kernel_reduce(p_layers, p_blocks, p_coefficients, p_partials, S: tl.constexpr, ACC: tl.constexpr):
    BR: tl.constexpr = S.BR
    BK: tl.constexpr = S.BK
    i_layer, i_side, i_block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    p_layer = find_layer(p_layers, i_layer)
    is_rows = i_side == 0
    row_slot, row_chunks = tl.load(p_layer + LAYER.value.row_slot), tl.load(p_layer + LAYER.value.row_chunks)
    col_slot, col_chunks = tl.load(p_layer + LAYER.value.col_slot), tl.load(p_layer + LAYER.value.col_chunks)
    slot, n_chunks = tl.where(is_rows, row_slot, col_slot), tl.where(is_rows, row_chunks, col_chunks)
    slot_2, n_chunks_2 = tl.where(is_rows, col_slot, row_slot), tl.where(is_rows, col_chunks, row_chunks)
    # M'ᵀM' [BR, BR]
    b_gram_2 = tl.zeros((BR, BR), dtype=tl.float64)
    for k0 in range(0, S.K, BK):
        b_m_2 = _sum_chunks(p_blocks, slot_2, n_chunks_2, k0 + tl.arange(0, BK), S)
        b_gram_2 = dot(tl.trans(b_m_2), b_m_2, b_gram_2, "ieee", tl.float64)
    # C / s² = M (M'ᵀM') [BK, BR]
    o_k, o_r = i_block * BK + tl.arange(0, BK), tl.arange(0, BR)
    b_m = _sum_chunks(p_blocks, slot, n_chunks, o_k, S)
    b_c = dot(b_m, b_gram_2, tl.zeros((BK, BR), dtype=tl.float64), "ieee", tl.float64)
    p_c = p_coefficients + (2 * i_layer + i_side) * (S.K * S.R) + (o_k[:, None] * S.R + o_r[None, :])
    scaling = load_scaling(p_layer + LAYER.value.scaling_bits)
    tl.store(p_c, (b_c * (scaling * scaling)).to(ACC), mask=(o_k < S.K)[:, None] & (o_r < S.R)[None, :])
    # ⟨M, C / s²⟩ = ⟨MᵀM, M'ᵀM'⟩
    tl.store(p_partials + i_layer * S.N_SLICES + i_block, tl.sum(b_m * b_c), mask=is_rows)


@triton.jit
def _factor_grads(
    p_side, item, p_c, grad_base, scale, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    GM: tl.constexpr = S.GM
    BR: tl.constexpr = S.BR
    y = side_past(p_side, item.start, S.K, T, LAST)
    g = side_grad(p_side, item.start, S.R, grad_base, T)
    n_rows = count_rows(item.start, item.stop, T)
    o_r = tl.arange(0, BR)
    for i in range(0, n_rows, GM):
        o_row = i + tl.arange(0, GM)
        m_row = o_row < n_rows
        # y_iᵀ C [GM, BR]
        b_g = tl.zeros((GM, BR), dtype=ACC)
        for k0 in range(0, S.K, S.BK):
            o_k = k0 + tl.arange(0, S.BK)
            b_y = load_tile(y, o_row, m_row, o_k, ACC, LAST)
            m_c = (o_k < S.K)[:, None] & (o_r < S.R)[None, :]
            b_c = tl.load(p_c + (o_k[:, None] * S.R + o_r[None, :]), mask=m_c, other=0.0)
            b_g = dot(b_y, b_c, b_g, PRECISION, ACC)
        add_tile(g, o_row, m_row, o_r, b_g * scale[0] * scale[1], ACC)


@triton.jit(do_not_specialize=["weight", "grad_base", "n_layers"])
def spectral_bwd_kernel_factors(
    p_layers, p_sides, p_items, p_coefficients, p_partials, p_values, p_weight, weight: tl.float64,
    grad_base: tl.int64, n_layers, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    if i_program < n_layers:
        total = sum_slices(p_partials + i_program * S.N_SLICES, S.N_SLICES, S.SLICES)
        store_value(find_layer(p_layers, i_program), total, p_values)
    else:
        item = load_item(p_items, i_program - n_layers)
        p_side = find_side(p_sides, item.side)
        p_c = p_coefficients + item.side * (S.K * S.R)
        scale = split_scale(2.0 * load_weight(p_weight, weight, WEIGHT_IS_TENSOR), ACC)
        if tl.load(p_side + SIDE.value.components_are_last) != 0:
            _factor_grads(p_side, item, p_c, grad_base, scale, S, T, ACC, PRECISION, True)
        else:
            _factor_grads(p_side, item, p_c, grad_base, scale, S, T, ACC, PRECISION, False)


def spectral_shape(r: int, k: int, tile: SpectralTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    BR, BK = max(16, triton.next_power_of_2(r)), min(tile.past_components, max(16, triton.next_power_of_2(k)))
    n_slices = -(-k // BK)
    return Shape(
        R=r, K=k, BR=BR, BK=BK, BM=tile.rows, GM=tile.grad_rows, N_SLICES=n_slices,
        SLICES=triton.next_power_of_2(n_slices),
    )  # fmt: skip


class SpectralLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    shape: Shape
    tile: SpectralTile
    dtype: torch.dtype
    sums: torch.dtype
    precision: str

    @property
    def work_bytes(self) -> int:
        """As :attr:`gram.GramLaunches.work_bytes`."""
        elements, n_slices = self.shape.R * self.shape.K, self.shape.N_SLICES
        return max(
            self.sums.itemsize * p.n_slots * elements
            + self.dtype.itemsize * 2 * p.n_layers * elements
            + 8 * p.n_layers * n_slices
            for p in self.plans
        )

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        S, tile, device, elements = self.shape, self.tile, values.device, self.shape.R * self.shape.K
        exact = "ieee" if self.sums == torch.float64 else self.precision
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        for plan in self.plans:
            # (n_slots, K, R); (n_layers, 2, K, R); (n_layers, N_SLICES)
            blocks = torch.empty(plan.n_slots * elements, dtype=self.sums, device=device)
            coefficients = torch.empty(2 * plan.n_layers * elements, dtype=self.dtype, device=device)
            partials = torch.empty(plan.n_layers * S.N_SLICES, dtype=torch.float64, device=device)
            for part in plan.launches["blocks"]:
                launch(
                    spectral_fwd_kernel_blocks, (part.n_items,), options, p_sides=plan.sides, p_items=part.items,
                    p_blocks=blocks, S=S, T=part.types, ACC=TL_DTYPES[self.sums], PRECISION=exact,
                )  # fmt: skip
            launch(
                spectral_fwd_kernel_reduce, (plan.n_layers, 2, S.N_SLICES), {"num_warps": tile.warps},
                p_layers=plan.layers, p_blocks=blocks, p_coefficients=coefficients, p_partials=partials, S=S,
                ACC=TL_DTYPES[self.dtype],
            )  # fmt: skip
            for i, part in enumerate(plan.launches["factors"]):
                # The first launch of a plan also finishes the values.
                n_layers = plan.n_layers if i == 0 else 0
                if n_layers + part.n_items == 0:
                    continue
                launch(
                    spectral_bwd_kernel_factors, (n_layers + part.n_items,), options, p_layers=plan.layers,
                    p_sides=plan.sides, p_items=part.items, p_coefficients=coefficients, p_partials=partials,
                    p_values=values, **weight_arguments(weight, values), grad_base=grad_base, n_layers=n_layers, S=S,
                    T=part.types, ACC=TL_DTYPES[self.dtype], PRECISION=self.precision,
                )  # fmt: skip


def prepare_spectral(
    layers: Sequence[Layer], precision: str, positions: Sequence[int], target: str | None = None
) -> SpectralLaunches:
    """Spectral penalty of layers of one class; arguments as :func:`gram.prepare_gram`. Energies do not enter."""
    dtype, target = layers[0].dtype, target or device_key(layers[0].lora_A.device)
    # The long sums, where nearly orthogonal factors cancel.
    sums = sums_dtype(precision != "tf32", layers)
    precision = dot_precision(precision, dtype, target)
    _, _, r, k = layers[0].sizes
    tile = spectral_tile(target, precision)
    shape = spectral_shape(r, k, tile)

    tiles = [(c, 0, 0, 0) for c in range(0, k, shape.BK)]
    chunks = Chunks.of(layers, TOUCHED, tile.rows, tile.grad_rows, tiles, k * r * sums.itemsize)
    return SpectralLaunches(make_plans(layers, positions, chunks), shape, tile, dtype, sums, precision)
