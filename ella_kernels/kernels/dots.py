"""Matrix products on tensor cores at the precision asked for.

``"tf32x3"`` is written out instead of left to Triton's option of that name, which also repairs infinities and keeps a
second accumulator: a quarter of the instructions of a loop here. An infinite operand gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["dot", "dot_self"]


@triton.jit
def _split(b_x):
    # x = high + low, exactly; high has the 10 bits of mantissa that tensor cores read of an fp32 operand.
    b_high = (b_x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return b_high, b_x - b_high


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``b_acc + b_x @ b_y``; "tf32x3" leaves out the product of the two low parts, 2⁻²⁰ of the result at most."""
    if PRECISION == "tf32x3":
        b_xh, b_xl = _split(b_x)
        b_yh, b_yl = _split(b_y)
        b_acc = tl.dot(b_xl, b_yh, b_acc, input_precision="tf32", out_dtype=ACC)
        b_acc = tl.dot(b_xh, b_yl, b_acc, input_precision="tf32", out_dtype=ACC)
        b_acc = tl.dot(b_xh, b_yh, b_acc, input_precision="tf32", out_dtype=ACC)
    else:
        b_acc = tl.dot(b_x, b_y, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc


@triton.jit
def dot_self(b_x, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``b_acc`` plus a matrix whose symmetric part is ``b_xᵀ @ b_x``: two tf32 products where :func:`dot` needs three."""
    if PRECISION == "tf32x3":
        b_high, b_low = _split(b_x)
        b_acc = tl.dot(tl.trans(b_high), b_high, b_acc, input_precision="tf32", out_dtype=ACC)
        b_acc = tl.dot(tl.trans(b_high), 2.0 * b_low, b_acc, input_precision="tf32", out_dtype=ACC)
    else:
        b_acc = tl.dot(tl.trans(b_x), b_x, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc
