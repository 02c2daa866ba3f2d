"""Products of components, formed in registers, and the numbering of unordered pairs of them."""

from __future__ import annotations

import triton
import triton.language as tl

from .sides import load_tile

__all__ = ["load_products", "n_pairs", "pair_index"]


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
