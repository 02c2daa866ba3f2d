"""Algorithm "gram", fused: three kernels over a pointer table, for every layer of a class at once.

With ``X = x ⊛ y`` the Khatri–Rao products (rows, r·k) of one side, factor ``x`` and past ``y``, and ρ its energies::

    blocks    M = XᵀX over a chunk of rows, one tile of products by another. M[ac, bd] depends on the unordered pairs
              {a, b} and {c, d} only, so one entry of each is computed and kept; and m_ab = Σ_i ρ_i x_ia x_ib
    reduce    sums the chunks in order; the value's share ⟨ω ωᵀ ⊙ M, M'⟩ (ω: how often a pair occurs, 1/τ for m); the
              coefficients of the gradients, c = s² ω ⊙ M
    factors   u_iab = Σ_cd c'[ab, cd] y_ic y_id + ρ_i c'[ab, ρ], c' of the other side; ∂P/∂x_ia = 2 Σ_b x_ib u_iab,
              added to the gradient; and the value from its shares
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
    load_products,
    load_scaling,
    load_tile,
    load_vector,
    load_weight,
    n_pairs,
    pair_index,
    side_energy,
    side_factor,
    side_grad,
    side_past,
    split_scale,
    store_value,
    sum_slices,
)
from .schedule import Chunks, Plan, make_plans
from .split_dot import dot, dot_self
from .tables import LAYER, SIDE
from .tiles import GramTile, gram_tile

__all__ = [
    "REDUCE_WARPS",
    "GramLaunches",
    "Shape",
    "gram_bwd_kernel_factors",
    "gram_fwd_kernel_blocks",
    "gram_fwd_kernel_reduce",
    "gram_shape",
    "prepare_gram",
    "touched",
]

_REDUCE_BLOCK = 1024
REDUCE_WARPS = 4
_ENERGY_TILE = 16


class Shape(NamedTuple):
    """Sizes of a class that its kernels are compiled for, ``S`` in them: ranks, and tiles cut to them.

    All are fields, and none is computed in a kernel from the others: Triton keeps a compiled kernel under their values.

    Attributes:
        R, K: components of factor and past. ENERGY: whether there are energies.
        P, Q, STRIDE: rows of a Gram block (pairs of the factor), its columns (pairs of the past, the energy's last),
            and the distance of two rows (16 bytes at least).
        BM, TR, TK, TE: the ``blocks`` kernel's rows per step, and components of factor, past, and factor with energies
            in a tile.
        GM, GR, GK: the same of the ``factors`` kernel.
        BLOCK: elements of a Gram block that a program of the ``reduce`` kernel sums. N_SLICES: how many programs.
        SLICES: the same, as a block.
    """

    R: int
    K: int
    ENERGY: bool
    P: int
    Q: int
    STRIDE: int
    BM: int
    TR: int
    TK: int
    TE: int
    GM: int
    GR: int
    GK: int
    BLOCK: int
    N_SLICES: int
    SLICES: int

    @property
    def elements(self) -> int:
        """Of a Gram block."""
        return self.P * self.STRIDE

    @property
    def tiles(self) -> list[tuple[int, int, int, int]]:
        """First components of all tiles of a Gram block: of equal entries only those of ordered tiles are computed."""

        def ordered(n: int, step: int) -> list[tuple[int, int]]:
            return [(first, second) for first in range(0, n, step) for second in range(first, n, step)]

        factor, past = ordered(self.R, self.TR), ordered(self.K, self.TK)
        tiles = [(*of_factor, *of_past) for of_factor in factor for of_past in past]
        if self.ENERGY:
            # The past's component K does not exist: it stands for the energies.
            tiles += [(*of_factor, self.K, self.K) for of_factor in ordered(self.R, self.TE)]
        return tiles


class _Tile(NamedTuple):
    # First components: products (a, c) by products (b, d).
    a: Any
    b: Any
    c: Any
    d: Any


@triton.jit
def _block(
    p_side, item, tile, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    SAME: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    # M [TR * TK, TR * TK] of a tile of products by another, which are the same if SAME.
    TX: tl.constexpr = S.TR * S.TK
    b_m = tl.zeros((TX, TX), dtype=ACC)
    x = side_factor(p_side, item.start, S.R, T, LAST)
    y = side_past(p_side, item.start, S.K, T, LAST)
    n_rows = count_rows(item.start, item.stop, T)
    for i in range(0, n_rows, S.BM):
        o_row = i + tl.arange(0, S.BM)
        m_row = o_row < n_rows
        b_ac = load_products(x, tile.a, y, tile.c, o_row, m_row, S.TR, S.TK, ACC, LAST)
        if SAME:
            b_m = dot_self(b_ac, b_m, PRECISION, ACC)
        else:
            b_bd = load_products(x, tile.b, y, tile.d, o_row, m_row, S.TR, S.TK, ACC, LAST)
            b_m = dot(tl.trans(b_ac), b_bd, b_m, PRECISION, ACC)
    if SAME:
        b_m = 0.5 * (b_m + tl.trans(b_m))
    return b_m


@triton.jit
def _energy_block(
    p_side, item, a0, b0, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    # m_ab = Σ ρ_i x_ia x_ib [TE, TE], and τ = Σ ρ_i.
    TE: tl.constexpr = S.TE
    BM: tl.constexpr = S.BM
    b_m = tl.zeros((TE, TE), dtype=ACC)
    b_total = tl.zeros((BM,), dtype=tl.float64)
    x = side_factor(p_side, item.start, S.R, T, LAST)
    e = side_energy(p_side, item.start, T)
    n_rows = count_rows(item.start, item.stop, T)
    for i in range(0, n_rows, BM):
        o_row = i + tl.arange(0, BM)
        m_row = o_row < n_rows
        b_e = load_vector(e, o_row, m_row, ACC)
        b_xa = load_tile(x, o_row, m_row, a0 + tl.arange(0, TE), ACC, LAST)
        b_xb = load_tile(x, o_row, m_row, b0 + tl.arange(0, TE), ACC, LAST)
        b_m = dot(tl.trans(b_xa * b_e[:, None]), b_xb, b_m, PRECISION, ACC)
        b_total += b_e.to(tl.float64)
    return b_m, tl.sum(b_total)


@triton.jit
def _first(component, STEP: tl.constexpr):
    # The first component of a tile of STEP.
    return tl.multiple_of(component.to(tl.int32), STEP)


@triton.jit
def _products_item(
    p_side, item, p_m, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    a0 = _first(item.first, S.TR)
    b0 = _first(item.second, S.TR)
    c0 = _first(item.past_first, S.TK)
    d0 = _first(item.past_second, S.TK)
    tile = _Tile(a0, b0, c0, d0)
    # With one tile the compiler knows.
    if (S.R <= S.TR and S.K <= S.TK) or ((a0 == b0) & (c0 == d0)):
        b_m = _block(p_side, item, tile, S, T, ACC, PRECISION, True, LAST)
    else:
        b_m = _block(p_side, item, tile, S, T, ACC, PRECISION, False, LAST)
    o_ac, o_bd = tl.arange(0, S.TR * S.TK)[:, None], tl.arange(0, S.TR * S.TK)[None, :]
    o_a, o_c, o_b, o_d = a0 + o_ac // S.TK, c0 + o_ac % S.TK, b0 + o_bd // S.TK, d0 + o_bd % S.TK
    m_m = (o_a <= o_b) & (o_b < S.R) & (o_c < S.K) & (o_d < S.K) & (o_c // S.GK <= o_d // S.GK)
    tl.store(p_m + (pair_index(o_a, o_b, S.R, 1) * S.STRIDE + pair_index(o_c, o_d, S.K, S.GK)), b_m, mask=m_m)


@triton.jit
def _energy_item(
    p_side, item, p_m, p_total, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    a0 = _first(item.first, S.TE)
    b0 = _first(item.second, S.TE)
    b_m, total = _energy_block(p_side, item, a0, b0, S, T, ACC, PRECISION, LAST)
    o_a, o_b = a0 + tl.arange(0, S.TE)[:, None], b0 + tl.arange(0, S.TE)[None, :]
    tl.store(p_m + pair_index(o_a, o_b, S.R, 1) * S.STRIDE, b_m, mask=(o_a <= o_b) & (o_b < S.R))
    # Every tile of a slot finds the same total; the first one writes it.
    tl.store(p_total, total, mask=a0 + b0 == 0)


@triton.jit
def gram_fwd_kernel_blocks(
    p_sides, p_items, p_blocks, p_totals, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    item = load_item(p_items, tl.program_id(0).to(tl.int64))
    p_side = find_side(p_sides, item.side)
    p_m, p_total = p_blocks + item.slot * (S.P * S.STRIDE), p_totals + item.slot
    is_last = tl.load(p_side + SIDE.value.components_are_last) != 0
    # Items of the energies are marked by a first component of the past that does not exist.
    if S.ENERGY and item.past_first >= S.K:
        if is_last:
            _energy_item(p_side, item, p_m + (S.Q - 1), p_total, S, T, ACC, PRECISION, True)
        else:
            _energy_item(p_side, item, p_m + (S.Q - 1), p_total, S, T, ACC, PRECISION, False)
    elif S.K > 0:
        if is_last:
            _products_item(p_side, item, p_m, S, T, ACC, PRECISION, True)
        else:
            _products_item(p_side, item, p_m, S, T, ACC, PRECISION, False)


@triton.jit
def _sum_chunks(p_x, n_chunks, m_x, STEP: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    # [BLOCK]: elements at p_x of n_chunks blocks that are STEP apart.
    b_sum = tl.zeros((BLOCK,), dtype=ACC)
    for j in range(0, n_chunks.to(tl.int32)):
        b_sum += tl.load(p_x + j * STEP, mask=m_x, other=0.0)
    return b_sum


@triton.jit
def _past_multiplicity(o_q, K: tl.constexpr, GK: tl.constexpr):
    # ω_cd: 1 for pairs within a block of the past's components, where both orders are listed, and 2 between blocks.
    b_omega = tl.full(o_q.shape, 2.0, dtype=tl.float64)
    for c0 in tl.static_range(0, K, GK):
        o_row = o_q - (c0 * K - c0 * (c0 - GK) // 2)
        b_omega = tl.where((o_row >= 0) & (o_row < GK * (K - c0)) & (o_row % (K - c0) < GK), 1.0, b_omega)
    return b_omega


@triton.jit
def _factor_multiplicity(o_p, R: tl.constexpr):
    # ω_ab: the factor's pairs are listed once; squares are the diagonal of their triangle.
    b_omega = tl.full(o_p.shape, 2.0, dtype=tl.float64)
    for a in tl.static_range(R):
        b_omega = tl.where(o_p == a * R - a * (a - 1) // 2, 1.0, b_omega)
    return b_omega


@triton.jit
def gram_fwd_kernel_reduce(p_layers, p_blocks, p_totals, p_partials, S: tl.constexpr, ACC: tl.constexpr):
    i_layer, i_slice = tl.program_id(0).to(tl.int64), tl.program_id(1)
    p_layer = find_layer(p_layers, i_layer)
    o_e = i_slice * S.BLOCK + tl.arange(0, S.BLOCK)
    o_p, o_q = o_e // S.STRIDE, o_e % S.STRIDE
    # Whole rows are read, which keeps loads wide; what pads them was never written.
    m_e = o_p < S.P
    row_slot, col_slot = tl.load(p_layer + LAYER.value.row_slot), tl.load(p_layer + LAYER.value.col_slot)
    p_rows, p_cols = p_blocks + row_slot * (S.P * S.STRIDE) + o_e, p_blocks + col_slot * (S.P * S.STRIDE) + o_e
    b_rows = _sum_chunks(p_rows, tl.load(p_layer + LAYER.value.row_chunks), m_e, S.P * S.STRIDE, S.BLOCK, ACC)
    b_cols = _sum_chunks(p_cols, tl.load(p_layer + LAYER.value.col_chunks), m_e, S.P * S.STRIDE, S.BLOCK, ACC)
    b_rows, b_cols = tl.where(o_q < S.Q, b_rows, 0.0), tl.where(o_q < S.Q, b_cols, 0.0)
    b_omega = _past_multiplicity(o_q, S.K, S.GK)
    if S.ENERGY:
        total = tl.sum(tl.zeros((1,), dtype=tl.float64))
        for j in range(0, tl.load(p_layer + LAYER.value.row_chunks).to(tl.int32)):
            total += tl.load(p_totals + row_slot + j)
        b_omega = tl.where(o_q == S.Q - 1, inverse_or_zero(total), b_omega)
    # ⟨ω ωᵀ ⊙ M, M'⟩
    share = tl.sum(b_rows.to(tl.float64) * (b_cols.to(tl.float64) * b_omega) * _factor_multiplicity(o_p, S.R))
    tl.store(p_partials + i_layer * S.N_SLICES + i_slice, share)
    # c = s² ω ⊙ M, in place of the first chunks, which only this program reads at these elements.
    scaling = load_scaling(p_layer + LAYER.value.scaling_bits)
    b_omega *= scaling * scaling
    tl.store(p_rows, (b_rows.to(tl.float64) * b_omega).to(ACC), mask=m_e)
    tl.store(p_cols, (b_cols.to(tl.float64) * b_omega).to(ACC), mask=m_e)


@triton.jit
def _coefficients(p_c, o_ab, m_ab, c0, d0, S: tl.constexpr, ACC: tl.constexpr):
    # [GK * GK, GR * GR]: row (c, d), column (b, a) holds the coefficient of x_b y_c y_d in ∂P/∂x_a.
    o_cd = tl.arange(0, S.GK * S.GK)
    o_c, o_d = c0 + o_cd // S.GK, d0 + o_cd % S.GK
    m_c = ((o_c < S.K) & (o_d < S.K))[:, None] & m_ab[None, :]
    return tl.load(p_c + (o_ab[None, :] + pair_index(o_c, o_d, S.K, S.GK)[:, None]), mask=m_c, other=0.0).to(ACC)


@triton.jit
def _columns(a0, b0, S: tl.constexpr):
    # Rows of a Gram block for the columns (b, a) of a tile, in which the sum over b stays within a lane.
    o_ba = tl.arange(0, S.GR * S.GR)
    o_a, o_b = a0 + o_ba % S.GR, b0 + o_ba // S.GR
    o_ab = pair_index(tl.minimum(o_a, o_b), tl.maximum(o_a, o_b), S.R, 1) * S.STRIDE
    return o_ab, (o_a < S.R) & (o_b < S.R)


@triton.jit
def _factor_grads(
    p_side, item, p_c, grad_base, scale, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    LAST: tl.constexpr,
):  # fmt: skip
    GM: tl.constexpr = S.GM
    GR: tl.constexpr = S.GR
    x = side_factor(p_side, item.start, S.R, T, LAST)
    y = side_past(p_side, item.start, S.K, T, LAST)
    g = side_grad(p_side, item.start, S.R, grad_base, T)
    n_rows = count_rows(item.start, item.stop, T)
    if S.ENERGY:
        e = side_energy(p_side, item.start, T)
    if S.R <= GR and S.K <= S.GK:
        o_ab, m_ab = _columns(0, 0, S)
        b_c = _coefficients(p_c, o_ab, m_ab, 0, 0, S, ACC)
    for i in range(0, n_rows, GM):
        o_row = i + tl.arange(0, GM)
        m_row = o_row < n_rows
        for a0 in range(0, S.R, GR):
            b_g = tl.zeros((GM, GR), dtype=ACC)
            for b0 in range(0, S.R, GR):
                o_ab, m_ab = _columns(a0, b0, S)
                # u_iab = Σ_cd c'[ab, cd] y_ic y_id + ρ_i c'[ab, ρ]
                b_u = tl.zeros((GM, GR * GR), dtype=ACC)
                if S.R <= GR and S.K <= S.GK:
                    b_yy = load_products(y, 0, y, 0, o_row, m_row, S.GK, S.GK, ACC, LAST)
                    b_u = dot(b_yy, b_c, b_u, PRECISION, ACC)
                else:
                    for c0 in range(0, S.K, S.GK):
                        for d0 in range(c0, S.K, S.GK):
                            b_yy = load_products(y, c0, y, d0, o_row, m_row, S.GK, S.GK, ACC, LAST)
                            b_cd = _coefficients(p_c, o_ab, m_ab, c0, d0, S, ACC)
                            b_u = dot(b_yy, b_cd, b_u, PRECISION, ACC)
                if S.ENERGY:
                    b_ce = tl.load(p_c + (o_ab + (S.Q - 1)), mask=m_ab, other=0.0).to(ACC)
                    b_u += load_vector(e, o_row, m_row, ACC)[:, None] * b_ce[None, :]
                b_x = load_tile(x, o_row, m_row, b0 + tl.arange(0, GR), ACC, LAST)
                b_g += tl.sum(tl.reshape(b_u, (GM, GR, GR)) * b_x[:, :, None], 1)
            add_tile(g, o_row, m_row, a0 + tl.arange(0, GR), b_g * scale[0] * scale[1], ACC)


@triton.jit(do_not_specialize=["weight", "grad_base", "n_layers"])
def gram_bwd_kernel_factors(
    p_layers, p_sides, p_items, p_blocks, p_partials, p_values, p_weight, weight: tl.float64, grad_base: tl.int64,
    n_layers, S: tl.constexpr, T: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    WEIGHT_IS_TENSOR: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0).to(tl.int64)
    if i_program < n_layers:
        total = sum_slices(p_partials + i_program * S.N_SLICES, S.N_SLICES, S.SLICES)
        store_value(find_layer(p_layers, i_program), total, p_values)
    else:
        item = load_item(p_items, i_program - n_layers)
        p_side = find_side(p_sides, item.side)
        p_c = p_blocks + tl.load(p_side + SIDE.value.partner_slot) * (S.P * S.STRIDE)
        scale = split_scale(2.0 * load_weight(p_weight, weight, WEIGHT_IS_TENSOR), ACC)
        if tl.load(p_side + SIDE.value.components_are_last) != 0:
            _factor_grads(p_side, item, p_c, grad_base, scale, S, T, ACC, PRECISION, True)
        else:
            _factor_grads(p_side, item, p_c, grad_base, scale, S, T, ACC, PRECISION, False)


def gram_shape(r: int, k: int, energy: bool, tile: GramTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""

    def components(rank: int, most: int) -> int:
        return min(most, max(4, triton.next_power_of_2(max(1, rank))))

    TR, TK = components(r, 16), components(k, 16)
    while tile.products < TR * TK:
        TR, TK = (TR // 2, TK) if TR > TK else (TR, TK // 2)
    GR, GK = components(r, tile.grad_components), components(k, tile.grad_past_components)
    P, Q = n_pairs(r, 1), n_pairs(k, GK) + energy
    STRIDE = -(-Q // 4) * 4
    n_slices = -(-P * STRIDE // _REDUCE_BLOCK)
    return Shape(
        R=r, K=k, ENERGY=energy, P=P, Q=Q, STRIDE=STRIDE, BM=tile.rows, TR=TR, TK=TK, TE=_ENERGY_TILE,
        GM=tile.grad_rows, GR=GR, GK=GK, BLOCK=_REDUCE_BLOCK, N_SLICES=n_slices,
        SLICES=triton.next_power_of_2(n_slices),
    )  # fmt: skip


def touched(energy: bool) -> dict[str, tuple[str, ...]]:
    """The operands that each kernel over items touches."""
    read = ("factor", "past", *["energy"] * energy)
    return {"blocks": read, "factors": (*read, "grad")}


class GramLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    shape: Shape
    tile: GramTile
    dtype: torch.dtype
    precision: str

    @property
    def work_bytes(self) -> int:
        """What :meth:`launch` allocates at once, at most."""
        S, size = self.shape, self.dtype.itemsize
        return max(
            size * p.n_slots * S.elements + 8 * ((p.n_slots if S.ENERGY else 1) + p.n_layers * S.N_SLICES)
            for p in self.plans
        )

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """Values into their positions, ``weight`` times the gradients onto the targets, at most three launches a plan.

        Args:
            weight: a number or a 0-dim tensor, which is read on the device.
            values: float32 or float64.
            grad_base: address of the first layer's ``grad_B``, 0 without gradients.
        """
        S, tile, dtype, device = self.shape, self.tile, self.dtype, values.device
        sums = {"S": S, "ACC": TL_DTYPES[dtype]}
        products = sums | {"PRECISION": self.precision}
        options = {"num_warps": tile.warps, "num_stages": tile.stages} | register_limit(tile.maxnreg)
        grad_options = {"num_warps": tile.grad_warps, "num_stages": tile.grad_stages}
        grad_options |= register_limit(tile.grad_maxnreg)
        for plan in self.plans:
            # (n_slots, P, STRIDE); (n_slots,); (n_layers, N_SLICES)
            blocks = torch.empty(plan.n_slots * S.elements, dtype=dtype, device=device)
            totals = torch.empty(plan.n_slots if S.ENERGY else 1, dtype=torch.float64, device=device)
            partials = torch.empty(plan.n_layers * S.N_SLICES, dtype=torch.float64, device=device)
            for part in plan.launches["blocks"]:
                launch(
                    gram_fwd_kernel_blocks, (part.n_items,), options, p_sides=plan.sides, p_items=part.items,
                    p_blocks=blocks, p_totals=totals, T=part.types, **products,
                )  # fmt: skip
            launch(
                gram_fwd_kernel_reduce, (plan.n_layers, S.N_SLICES), {"num_warps": REDUCE_WARPS}, p_layers=plan.layers,
                p_blocks=blocks, p_totals=totals, p_partials=partials, **sums,
            )  # fmt: skip
            for i, part in enumerate(plan.launches["factors"]):
                # The first launch of a plan also finishes the values.
                n_layers = plan.n_layers if i == 0 else 0
                if n_layers + part.n_items == 0:
                    continue
                launch(
                    gram_bwd_kernel_factors, (n_layers + part.n_items,), grad_options, p_layers=plan.layers,
                    p_sides=plan.sides, p_items=part.items, p_blocks=blocks, p_partials=partials, p_values=values,
                    **weight_arguments(weight, values), grad_base=grad_base, n_layers=n_layers, T=part.types,
                    **products,
                )  # fmt: skip


def prepare_gram(
    layers: Sequence[Layer], precision: str, positions: Sequence[int], target: str | None = None
) -> GramLaunches:
    """Hadamard penalty of layers that share ranks and dtypes; gradients go to ``grad_A``, ``grad_B`` if given.

    Args:
        layers: checked layers with low-rank pasts, none of them zero by shape, of one class and device.
        precision: "auto", "ieee" or "tf32", see :func:`launch.arithmetic`.
        positions: layer ``i``'s unweighted value is number ``positions[i]`` of the values.
        target: "sm_90", say, in place of what the layers' device is: to ask what is needed there.
    """
    target = target or device_key(layers[0].lora_A.device)
    dtype, precision, products = arithmetic(precision, layers, target)
    _, _, r, k = layers[0].sizes
    tile = gram_tile(target, products)
    shape = gram_shape(r, k, layers[0].row_energy is not None, tile)

    block_bytes = shape.elements * dtype.itemsize
    chunks = Chunks.of(
        layers, touched(shape.ENERGY), tile.rows, tile.grad_rows, shape.tiles, block_bytes, tile.programs
    )
    return GramLaunches(make_plans(layers, positions, chunks), shape, tile, dtype, precision)
