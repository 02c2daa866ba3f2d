"""Unordered pairs of components, formed in registers: what the gram kernels multiply."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_pairs", "pair_index"]


@triton.jit
def load_pairs(
    p_x, s_row, s_comp, o_row, m_row, o_pair, p_energy, s_energy, N: tl.constexpr, ENERGY: tl.constexpr,
    ACC: tl.constexpr, COMPONENTS_LAST: tl.constexpr,
):  # fmt: skip
    """``[BM, T]`` products ``x[i, a]·x[i, a']`` of the pairs ``o_pair``, zero outside; pair N(N+1)/2 is the energy.

    Pairs run along cyclic diagonals: pair ``p`` is ``(p % N, (p % N + p // N) % N)``, so the first N are the squares.
    Two gathers per product hit the same few cache lines; the tile is loaded in the order in which lanes are neighbours
    in memory.
    """
    PAIRS: tl.constexpr = N * (N + 1) // 2
    M: tl.constexpr = N if N > 0 else 1
    o_first = o_pair % M
    o_second = (o_first + o_pair // M) % M
    m_pair = o_pair < PAIRS
    if COMPONENTS_LAST:
        o_x = o_row[:, None] * s_row
        m_x = m_row[:, None] & m_pair[None, :]
        b_x = tl.load(p_x + o_x + o_first[None, :] * s_comp, mask=m_x, other=0.0).to(ACC)
        b_x *= tl.load(p_x + o_x + o_second[None, :] * s_comp, mask=m_x, other=0.0).to(ACC)
    else:
        o_x = o_row[None, :] * s_row
        m_x = m_row[None, :] & m_pair[:, None]
        b_x = tl.load(p_x + o_x + o_first[:, None] * s_comp, mask=m_x, other=0.0).to(ACC)
        b_x *= tl.load(p_x + o_x + o_second[:, None] * s_comp, mask=m_x, other=0.0).to(ACC)
        b_x = tl.trans(b_x)
    if ENERGY:
        b_energy = tl.load(p_energy + o_row * s_energy, mask=m_row, other=0.0).to(ACC)
        b_x = tl.where((o_pair == PAIRS)[None, :], b_energy[:, None], b_x)
    return b_x


@triton.jit
def pair_index(o_a, o_b, N: tl.constexpr):
    """Index of the unordered pair ``(a, b)``, elementwise; inverse of the numbering in :func:`load_pairs`."""
    o_step = (o_b - o_a + N) % N
    swap = (2 * o_step > N) | ((2 * o_step == N) & (o_b < o_a))
    o_first = tl.where(swap, o_b, o_a)
    return tl.where(swap, N - o_step, o_step) * N + o_first
