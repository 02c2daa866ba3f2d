"""Device functions that the kernels share: a side's operands by tiles in either memory order, products of components,
and the numbering of unordered pairs of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .records import (
    ENERGY_PTR,
    ENERGY_ROW,
    FACTOR_COMP,
    FACTOR_PTR,
    FACTOR_ROW,
    GRAD_COMP,
    GRAD_OFFSET,
    GRAD_ROW,
    LAYER_SCALING_BITS,
    LAYER_VALUE,
    PAST_COMP,
    PAST_PTR,
    PAST_ROW,
)

__all__ = [
    "add_tile",
    "count_rows",
    "inverse_or_zero",
    "load_products",
    "load_scaling",
    "load_tile",
    "load_weight",
    "n_pairs",
    "pair_index",
    "side_energy",
    "side_factor",
    "side_grad",
    "side_past",
    "split_scale",
    "store_value",
]

_FAR, _NEAR = tl.constexpr(2.0**100), tl.constexpr(2.0**-100)


@triton.jit
def _matrix(
    p_x, s_row, s_comp, start, ALIGNED: tl.constexpr, COMPONENTS_LAST: tl.constexpr, TYPE: tl.constexpr
):  # fmt: skip
    # 64-bit arithmetic up to the first row, 32-bit offsets from there. ALIGNED promises what makes loads wide: 16-byte
    # addresses, unit stride along the near dimension, and multiples of four along the other.
    p_tile = p_x.to(tl.pointer_type(TYPE))
    if ALIGNED:
        # Before the sum: a sum with a start of 0 is folded away, and a hint on it with it.
        p_tile = tl.multiple_of(p_tile, 16)
    p_tile += start * s_row
    s_row, s_comp = s_row.to(tl.int32), s_comp.to(tl.int32)
    if ALIGNED:
        p_tile = tl.multiple_of(p_tile, 16)
        if COMPONENTS_LAST:
            s_row, s_comp = tl.multiple_of(s_row, 4), 1
        else:
            s_row, s_comp = 1, tl.multiple_of(s_comp, 4)
    return p_tile, s_row, s_comp


@triton.jit
def side_factor(p_side, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr, COMPONENTS_LAST: tl.constexpr):
    """Pointer to row ``start`` of the factor, and its strides along rows and components."""
    s_row, s_comp = tl.load(p_side + FACTOR_ROW), tl.load(p_side + FACTOR_COMP)
    return _matrix(tl.load(p_side + FACTOR_PTR), s_row, s_comp, start, ALIGNED, COMPONENTS_LAST, TYPE)


@triton.jit
def side_past(p_side, start, TYPE: tl.constexpr, ALIGNED: tl.constexpr, COMPONENTS_LAST: tl.constexpr):
    """As :func:`side_factor`, for the factor of the past; a stored past has the other side's rows as components."""
    s_row, s_comp = tl.load(p_side + PAST_ROW), tl.load(p_side + PAST_COMP)
    return _matrix(tl.load(p_side + PAST_PTR), s_row, s_comp, start, ALIGNED, COMPONENTS_LAST, TYPE)


@triton.jit
def count_rows(start, stop, ALIGNED: tl.constexpr):
    """``stop - start`` as an int32; ALIGNED promises a multiple of four."""
    n_rows = (stop - start).to(tl.int32)
    if ALIGNED:
        n_rows = tl.multiple_of(n_rows, 4)
    return n_rows


@triton.jit
def side_energy(p_side, start, TYPE: tl.constexpr):
    """Pointer to the energy of row ``start``, and its stride."""
    s_row = tl.load(p_side + ENERGY_ROW)
    return tl.load(p_side + ENERGY_PTR).to(tl.pointer_type(TYPE)) + start * s_row, s_row.to(tl.int32)


@triton.jit
def side_grad(p_side, grad_base, start, TYPE: tl.constexpr):
    """Pointer to row ``start`` of the gradient, and its strides."""
    p_grad = (grad_base + tl.load(p_side + GRAD_OFFSET)).to(tl.pointer_type(TYPE))
    s_row = tl.load(p_side + GRAD_ROW)
    return p_grad + start * s_row, s_row.to(tl.int32), tl.load(p_side + GRAD_COMP).to(tl.int32)


@triton.jit
def load_tile(p_x, s_row, s_comp, o_row, m_row, o_comp, N: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr):
    """``[rows, components]`` tile, loaded so that lanes are neighbours in memory; zero outside."""
    if LAST:
        m_x = m_row[:, None] & (o_comp < N)[None, :]
        b_x = tl.load(p_x + (o_row[:, None] * s_row + o_comp[None, :] * s_comp), mask=m_x, other=0.0).to(ACC)
    else:
        m_x = m_row[None, :] & (o_comp < N)[:, None]
        b_x = tl.load(p_x + (o_row[None, :] * s_row + o_comp[:, None] * s_comp), mask=m_x, other=0.0).to(ACC)
        b_x = tl.trans(b_x)
    return b_x


@triton.jit
def add_tile(p_x, s_row, s_comp, o_row, m_row, o_comp, N: tl.constexpr, b_x, ACC: tl.constexpr):
    """Add ``b_x`` to a tile in memory: the sum is formed in the accumulator's dtype and rounded once."""
    p_out = p_x + (o_row[:, None] * s_row + o_comp[None, :] * s_comp)
    m_out = m_row[:, None] & (o_comp < N)[None, :]
    b_out = tl.load(p_out, mask=m_out, other=0.0).to(ACC) + b_x
    tl.store(p_out, b_out.to(p_out.dtype.element_ty), mask=m_out)


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
def store_value(p_layer, p_partials, n_slices, p_values, SLICES: tl.constexpr):
    """A layer's value from its partial sums, in their fixed order."""
    o_slice = tl.arange(0, SLICES)
    b_value = tl.load(p_partials + o_slice, mask=o_slice < n_slices, other=0.0)
    scaling = load_scaling(p_layer + LAYER_SCALING_BITS)
    value = tl.sum(b_value) * scaling * scaling
    tl.store(p_values + tl.load(p_layer + LAYER_VALUE), value.to(p_values.dtype.element_ty))


@triton.jit
def load_products(
    p_x, s_xr, s_xc, first_x, p_y, s_yr, s_yc, first_y, o_row, m_row, NX: tl.constexpr, NY: tl.constexpr,
    BM: tl.constexpr, TX: tl.constexpr, TY: tl.constexpr, ACC: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """``[BM, TX * TY]`` products ``x[i, a]·y[i, c]`` in column ``(a, c)``, components from ``first_x``, ``first_y``.

    Two narrow tiles are read and multiplied out in registers. ``NX``, ``NY``: how many components there are; products
    beyond are zero.
    """
    b_x = load_tile(p_x, s_xr, s_xc, o_row, m_row, first_x + tl.arange(0, TX), NX, ACC, LAST)
    b_y = load_tile(p_y, s_yr, s_yc, o_row, m_row, first_y + tl.arange(0, TY), NY, ACC, LAST)
    return tl.reshape(b_x[:, :, None] * b_y[:, None, :], (BM, TX * TY))


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
