"""Matrix products on tensor cores at the precision asked for.

``"tf32x3"`` and ``"bf16x3"`` write an fp32 operand as the sum of a high and a low part and leave out the product of the
low ones. They are written out instead of left to Triton's options of these names, which also repair infinities and keep
a second accumulator: a quarter of the instructions of a loop here. An infinite operand gives NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..dispatch import interpreted

__all__ = ["dot", "dot_self"]

# The interpreter multiplies bf16 as integers: there the two parts are fp32 numbers that bf16 holds.
_INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def _split_tf32(b_x):
    # x = high + low, exactly; high has the 10 bits of mantissa that tensor cores read of an fp32 operand.
    b_high = (b_x.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
    return b_high, b_x - b_high


@triton.jit
def _round_bf16(b_x):
    # By an integer sum: conversions one at a time would be bound by their own, slow, pipe.
    return ((b_x.to(tl.int32, bitcast=True) + 32768) & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _split_bf16(b_x):
    b_high = _round_bf16(b_x)
    b_low = b_x - b_high
    if _INTERPRETED:
        return b_high, _round_bf16(b_low)
    else:
        b_bits = b_high.to(tl.int32, bitcast=True) >> 16
        return b_bits.to(tl.int16).to(tl.bfloat16, bitcast=True), b_low.to(tl.bfloat16)


@triton.jit
def dot(b_x, b_y, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``b_acc + b_x @ b_y``, fp32 or float64 operands; ``b_acc`` None is zero.

    Besides Triton's "ieee" and "tf32": "tf32x3", relative error up to 3·2⁻²⁰ of ``Σ|x||y|``, and "bf16x3", twice as
    fast, up to 3·2⁻¹⁶. Both add to ``b_acc`` outside the tensor cores, whose sums are cut off toward zero: over a long
    loop that costs digits.
    """
    if PRECISION == "tf32x3":
        b_xh, b_xl = _split_tf32(b_x)
        b_yh, b_yl = _split_tf32(b_y)
        b_xy = tl.dot(b_xl, b_yh, input_precision="tf32", out_dtype=ACC)
        b_xy = tl.dot(b_xh, b_yl, b_xy, input_precision="tf32", out_dtype=ACC)
        b_xy = tl.dot(b_xh, b_yh, b_xy, input_precision="tf32", out_dtype=ACC)
    elif PRECISION == "bf16x3":
        b_xh, b_xl = _split_bf16(b_x)
        b_yh, b_yl = _split_bf16(b_y)
        b_xy = tl.dot(b_xl, b_yh, out_dtype=ACC)
        b_xy = tl.dot(b_xh, b_yl, b_xy, out_dtype=ACC)
        b_xy = tl.dot(b_xh, b_yh, b_xy, out_dtype=ACC)
    else:
        b_xy = tl.dot(b_x, b_y, b_acc, input_precision=PRECISION, out_dtype=ACC)
    if b_acc is not None and (PRECISION == "tf32x3" or PRECISION == "bf16x3"):  # noqa: PLR1714
        b_xy = b_acc + b_xy
    return b_xy


@triton.jit
def dot_self(b_x, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``b_acc`` plus a matrix whose symmetric part is ``b_xᵀ @ b_x``: two tf32 products, not three."""
    if PRECISION == "tf32x3":
        b_high, b_low = _split_tf32(b_x)
        b_xx = tl.dot(tl.trans(b_high), 2.0 * b_low, input_precision="tf32", out_dtype=ACC)
        b_xx = tl.dot(tl.trans(b_high), b_high, b_xx, input_precision="tf32", out_dtype=ACC)
        b_acc += b_xx
    else:
        b_acc = tl.dot(tl.trans(b_x), b_x, b_acc, input_precision=PRECISION, out_dtype=ACC)
    return b_acc
