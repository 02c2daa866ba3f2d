"""Layout of the int64 tables that tell a kernel where its layers are; shared by the kernels and the host code.

A side is the rows (B with L) or the columns (A with R) of one layer: a factor, a past, an energy and a gradient, each
indexed by (row, component).
"""

from __future__ import annotations

import triton.language as tl

# One side.
SIDE = tl.constexpr(16)
FACTOR_PTR, FACTOR_ROW, FACTOR_COMP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
PAST_PTR, PAST_ROW, PAST_COMP = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
ENERGY_PTR, ENERGY_ROW = tl.constexpr(6), tl.constexpr(7)
ROWS = tl.constexpr(8)
# Byte offset from the group's first gradient: a fresh allocation of the same pattern meets the same table.
GRAD_OFFSET, GRAD_ROW, GRAD_COMP = tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
PARTNER_SLOT = tl.constexpr(12)
COMPONENTS_ARE_LAST = tl.constexpr(13)
SCALING_BITS = tl.constexpr(14)

# One unit of work: rows [start, stop) of a side, by tiles of its components.
ITEM = tl.constexpr(8)
ITEM_SIDE, ITEM_START, ITEM_STOP = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
ITEM_SLOT, ITEM_FIRST, ITEM_SECOND = tl.constexpr(3), tl.constexpr(4), tl.constexpr(5)
ITEM_PAST_FIRST, ITEM_PAST_SECOND = tl.constexpr(6), tl.constexpr(7)

# One layer: where the partial blocks of its two sides are.
LAYER = tl.constexpr(8)
ROW_SLOT, ROW_CHUNKS, COL_SLOT, COL_CHUNKS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
LAYER_SCALING_BITS, LAYER_VALUE = tl.constexpr(4), tl.constexpr(5)
