"""Device functions that the kernels share: records, a side's operands by tiles in either memory order, products of
components, and the numbering of unordered pairs of them."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .tables import ITEM, LAYER, SIDE, Item

__all__ = [
    "Matrix",
    "Vector",
    "add_tile",
    "count_rows",
    "find_layer",
    "find_side",
    "inverse_or_zero",
    "load_item",
    "load_products",
    "load_scaling",
    "load_tile",
    "load_vector",
    "load_weight",
    "n_pairs",
    "pair_index",
    "side_energy",
    "side_factor",
    "side_grad",
    "side_past",
    "split_scale",
    "store_value",
    "sum_slices",
]

_FAR, _NEAR = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)


class Matrix(NamedTuple):
    """An operand from some row on: address, strides along rows and components, and how many components it has."""

    p: Any
    s_row: Any
    s_comp: Any
    n_comp: Any


class Vector(NamedTuple):
    """A row's energies from some row on: address and stride."""

    p: Any
    s_row: Any


@triton.jit
def load_item(p_items, i_item):
    """Item number ``i_item``, field by field; the compiler drops the loads of those that a kernel does not use."""
    p_item = p_items + i_item * len(ITEM.value)
    fields = ()
    for i in tl.static_range(len(ITEM.value)):
        fields += (tl.load(p_item + i),)  # type: ignore[assignment]
    return Item(*fields)  # type: ignore[call-arg]


@triton.jit
def find_side(p_sides, i_side):
    """Address of side number ``i_side``. Its fields are read where they are used: there are too many to hold."""
    return p_sides + i_side * len(SIDE.value)


@triton.jit
def find_layer(p_layers, i_layer):
    """Address of layer number ``i_layer``."""
    return p_layers + i_layer * len(LAYER.value)


@triton.jit
def _matrix(
    p_side, FIELD: tl.constexpr, start, n_comp, TYPE: tl.constexpr, ALIGNED: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    # FIELD: the place of the address, which both strides follow.
    s_row, s_comp = tl.load(p_side + (FIELD + 1)), tl.load(p_side + (FIELD + 2))
    # 64-bit arithmetic up to the first row, 32-bit offsets from there. ALIGNED promises what makes loads wide: 16-byte
    # addresses, unit stride along the near dimension, and multiples of four along the other.
    p_tile = tl.load(p_side + FIELD).to(tl.pointer_type(tl.dtype(TYPE)))
    if ALIGNED:
        # Before the sum: a sum with a start of 0 is folded away, and a hint on it with it.
        p_tile = tl.multiple_of(p_tile, 16)
    p_tile += start * s_row
    s_row, s_comp = s_row.to(tl.int32), s_comp.to(tl.int32)
    if ALIGNED:
        p_tile = tl.multiple_of(p_tile, 16)
        if LAST:
            s_row, s_comp = tl.multiple_of(s_row, 4), 1
        else:
            s_row, s_comp = 1, tl.multiple_of(s_comp, 4)
    return Matrix(p_tile, s_row, s_comp, n_comp)


@triton.jit
def side_factor(p_side, start, n_comp, T: tl.constexpr, LAST: tl.constexpr):
    """``x`` from row ``start`` on; LAST: components are neighbours in memory."""
    # Triton 3.6 takes no bare string as an argument.
    TYPE: tl.constexpr = T.FACTOR
    return _matrix(p_side, SIDE.value.factor, start, n_comp, TYPE, T.ALIGNED, LAST)


@triton.jit
def side_past(p_side, start, n_comp, T: tl.constexpr, LAST: tl.constexpr):
    """``y`` from row ``start`` on; a stored past has the other side's rows as components."""
    TYPE: tl.constexpr = T.PAST
    return _matrix(p_side, SIDE.value.past, start, n_comp, TYPE, T.ALIGNED, LAST)


@triton.jit
def side_energy(p_side, start, T: tl.constexpr):
    """ρ of the rows, κ of the columns, from row ``start`` on."""
    p_energy, s_row = tl.load(p_side + SIDE.value.energy), tl.load(p_side + SIDE.value.energy_row)
    return Vector(p_energy.to(tl.pointer_type(tl.dtype(T.ENERGY))) + start * s_row, s_row.to(tl.int32))


@triton.jit
def side_grad(p_side, start, n_comp, grad_base, T: tl.constexpr):
    """∂P/∂x from row ``start`` on."""
    p_grad = (grad_base + tl.load(p_side + SIDE.value.grad_offset)).to(tl.pointer_type(tl.dtype(T.GRAD)))
    s_row, s_comp = tl.load(p_side + SIDE.value.grad_row), tl.load(p_side + SIDE.value.grad_comp)
    return Matrix(p_grad + start * s_row, s_row.to(tl.int32), s_comp.to(tl.int32), n_comp)


@triton.jit
def count_rows(start, stop, T: tl.constexpr):
    """``stop - start`` as an int32; ALIGNED promises a multiple of four."""
    n_rows = (stop - start).to(tl.int32)
    if T.ALIGNED:
        n_rows = tl.multiple_of(n_rows, 4)
    return n_rows


@triton.jit
def load_tile(x, o_row, m_row, o_comp, ACC: tl.constexpr, LAST: tl.constexpr):
    """``[rows, components]`` tile of a matrix, loaded so that lanes are neighbours in memory; zero outside."""
    if LAST:
        m_x = m_row[:, None] & (o_comp < x.n_comp)[None, :]
        b_x = tl.load(x.p + (o_row[:, None] * x.s_row + o_comp[None, :] * x.s_comp), mask=m_x, other=0.0).to(ACC)
    else:
        m_x = m_row[None, :] & (o_comp < x.n_comp)[:, None]
        b_x = tl.load(x.p + (o_row[None, :] * x.s_row + o_comp[:, None] * x.s_comp), mask=m_x, other=0.0).to(ACC)
        b_x = tl.trans(b_x)
    return b_x


@triton.jit
def load_vector(e, o_row, m_row, ACC: tl.constexpr):
    """``[rows]`` of a vector; zero outside."""
    return tl.load(e.p + o_row * e.s_row, mask=m_row, other=0.0).to(ACC)


@triton.jit
def add_tile(x, o_row, m_row, o_comp, b_x, ACC: tl.constexpr):
    """Add ``b_x`` to a tile in memory: the sum is formed in the accumulator's dtype and rounded once."""
    p_out = x.p + (o_row[:, None] * x.s_row + o_comp[None, :] * x.s_comp)
    m_out = m_row[:, None] & (o_comp < x.n_comp)[None, :]
    b_out = tl.load(p_out, mask=m_out, other=0.0).to(ACC) + b_x
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


@triton.jit
def load_products(
    x, a0, y, c0, o_row, m_row, TX: tl.constexpr, TY: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr
):  # fmt: skip
    """``[rows, TX * TY]`` products ``x[i, a]·y[i, c]`` in column ``(a, c)``, components from ``a0`` and ``c0``.

    Two narrow tiles are read and multiplied out in registers; products beyond the last component are zero.
    """
    b_x = load_tile(x, o_row, m_row, a0 + tl.arange(0, TX), ACC, LAST)
    b_y = load_tile(y, o_row, m_row, c0 + tl.arange(0, TY), ACC, LAST)
    return tl.reshape(b_x[:, :, None] * b_y[:, None, :], (b_x.shape[0], TX * TY))


@triton.jit
def load_scaling(p_bits):
    """The float64 whose bits a table holds."""
    return tl.load(p_bits).to(tl.float64, bitcast=True)


@triton.jit
def load_weight(p_weight, weight, IS_TENSOR: tl.constexpr):
    """The weight in float64, from the device if it is a tensor."""
    if IS_TENSOR:
        weight = tl.load(p_weight).to(tl.float64)
    return weight


@triton.jit
def split_scale(scale, ACC: tl.constexpr):
    """Two numbers whose product is a float64 one, which may be none of fp32: multiply by the first, then the second."""
    # The first never takes what it multiplies out of a range that the second brings it back to. No division: in float64
    # that is a call, with a stack.
    is_large, is_small = tl.abs(scale) > _FAR, tl.abs(scale) < _NEAR
    first = tl.where(is_large, _FAR, tl.where(is_small, _NEAR, 1.0))
    inverse = tl.where(is_large, _NEAR, tl.where(is_small, _FAR, 1.0))
    return first.to(ACC), (scale * inverse).to(ACC)


@triton.jit
def inverse_or_zero(x):
    """``1 / x``, and 0 for 0: nothing dropped, so the whole energy term is zero, not 0/0."""
    return tl.where(x == 0, 0.0, 1.0 / tl.where(x == 0, 1.0, x))


@triton.jit
def sum_slices(p_partials, N_SLICES: tl.constexpr, SLICES: tl.constexpr):
    """Sum of N_SLICES partial values, by a block of SLICES."""
    o_slice = tl.arange(0, SLICES)
    return tl.sum(tl.load(p_partials + o_slice, mask=o_slice < N_SLICES, other=0.0))


@triton.jit
def store_value(p_layer, total, p_values):
    """``P = s²·total`` to the layer's place."""
    scaling = load_scaling(p_layer + LAYER.value.scaling_bits)
    tl.store(p_values + tl.load(p_layer + LAYER.value.value), (total * scaling * scaling).to(p_values.dtype.element_ty))


@triton.jit
def pair_index(o_a, o_b, N: tl.constexpr, STEP: tl.constexpr):
    """Index of the pair ``(a, b)`` of N components, elementwise; :func:`n_pairs` of them.

    Pairs within a block of STEP components are ordered, (a, b) and (b, a); pairs of different blocks are unordered,
    and a's block must be the first. In one row ``a`` they are contiguous. STEP = 1: all unordered pairs, a ≤ b.
    """
    o_block = o_a // STEP * STEP
    o_row = o_block * N - o_block * (o_block - STEP) // 2 + (o_a - o_block) * (N - o_block)
    return o_row + (o_b - o_block)


def n_pairs(n: int, step: int) -> int:
    """How many pairs :func:`pair_index` numbers.

    >>> n_pairs(8, 1), n_pairs(8, 8), n_pairs(16, 8)
    (36, 64, 192)
    """
    return sum(n - a // step * step for a in range(n))
