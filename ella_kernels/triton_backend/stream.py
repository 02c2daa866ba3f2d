"""Algorithms "stream" and "dense", fused: each program owns rows of one factor and walks the other side in tiles.

With ``x, L`` the factors of the owned side and ``x', R`` those of the other, one tile is::

    D = s·x·x'ᵀ      W = L·Rᵀ (or read)      H = D ⊙ (W ⊙ W + ρκᵀ/τ)      ∂P/∂x += 2s H·x'      P += ⟨H, D⟩

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
from . import records
from .launch import TL_DTYPES, arithmetic, register_limit, weight_arguments
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
from .tables import (
    batches,
    float_bits,
    gradient_base,
    is_aligned,
    side_classes,
    side_record,
    to_device,
)
from .tiles import StreamTile, stream_tile

__all__ = [
    "StreamLaunches",
    "prepare_stream",
    "stream_constants",
    "stream_kernel_factors",
    "stream_kernel_values",
]


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


class Launch(NamedTuple):
    """Programs of one side with one memory order, and what is compiled into them."""

    items: Tensor
    n_items: int
    constants: dict


class Plan(NamedTuple):
    """Device tables and grids of one batch of layers."""

    sides: Tensor
    layers: Tensor
    n_layers: int
    n_partials: int
    launches: list[Launch]


def stream_constants(r: int, k: int, tile: StreamTile) -> dict:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    return {
        "R": r,
        "K": k,
        "BM": tile.rows,
        "BN": tile.other_rows,
        "BR": min(tile.components, max(16, triton.next_power_of_2(r))),
        "BK": max(16, triton.next_power_of_2(k)) if 0 < k <= tile.past_held else tile.past_block,
    } | register_limit(tile.maxnreg)


class StreamLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    constants: dict
    precision: str

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        constants = self.constants | {"WEIGHT_IS_TENSOR": isinstance(weight, Tensor)}
        for plan in self.plans:
            partials = torch.empty(plan.n_partials, dtype=torch.float64, device=values.device)
            for launch in plan.launches:
                stream_kernel_factors[(launch.n_items,)](
                    plan.sides, launch.items, partials, *weight_arguments(weight, values), grad_base, **constants,
                    **launch.constants, PRECISION=self.precision,
                )  # fmt: skip
            stream_kernel_values[(plan.n_layers,)](plan.layers, partials, values, BLOCK=128, num_warps=1)


def prepare_stream(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> StreamLaunches:
    """Hadamard penalty by tiles, of factors or of a stored past; arguments as :func:`gram.prepare_gram`."""
    dtype, precision, products = arithmetic(precision, layers)
    _, _, r, k = layers[0].sizes
    tile = stream_tile(device_key(layers[0].lora_A.device), products)
    sizes = stream_constants(r, k, tile)
    energy = layers[0].row_energy is not None
    constants = sizes | {
        "STORED": layers[0].right is None,
        "ENERGY": energy,
        "WITH_GRAD": layers[0].grad_A is not None,
        "ACC": TL_DTYPES[dtype],
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    plans = _plans(layers, positions, sizes, gradient_base(layers))
    return StreamLaunches(plans, constants, precision)


def _plans(layers: Sequence[Layer], positions: Sequence[int], sizes: dict, grad_base: int) -> list[Plan]:
    return [
        _plan([layers[i] for i in chosen], [positions[i] for i in chosen], sizes, grad_base)
        for chosen in batches(layers, [0] * len(layers), 0)
    ]


def _plan(layers: Sequence[Layer], positions: Sequence[int], sizes: dict, grad_base: int) -> Plan:
    sides, rows, slot = [], [], 0
    items: dict[tuple[bool, bool], list] = {}
    for layer, position in zip(layers, positions, strict=True):
        for is_rows in (True, False):
            record = side_record(layer, is_rows, grad_base, 0)
            sides.append(record)
            size = record[records.ROWS.value]
            if is_rows:
                n_blocks = -(-size // sizes["BM"])
                rows.append([slot, n_blocks, 0, 0, float_bits(layer.scaling), position, 0, 0])
            elif layer.grad_A is None:
                continue
            components = range(0, sizes["R"], sizes["BR"]) if layer.grad_A is not None else (0,)
            chosen = items.setdefault((is_rows, bool(record[records.COMPONENTS_ARE_LAST.value])), [])
            for i in range(0, size, sizes["BM"]):
                chosen.extend([len(sides) - 1, i, 0, slot, c, 0, 0, 0] for c in components)
                slot += is_rows
    aligned = all(map(is_aligned, sides))
    on_sides, on_layers, *on_items = to_device([sides, rows, *items.values()], layers[0].lora_A.device)
    launches = []
    for ((is_rows, last), entries), table in zip(items.items(), on_items, strict=True):
        own, other = side_classes(layers[0])[:: 1 if is_rows else -1]
        constants = own.tl_dtypes | {f"{name}_2": t for name, t in other.tl_dtypes.items() if name != "GRAD"}
        constants |= {"ALIGNED": aligned, "IS_ROWS": is_rows, "LAST": last}
        launches.append(Launch(table, len(entries), constants))
    return Plan(on_sides, on_layers, len(layers), slot, launches)
