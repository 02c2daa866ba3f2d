"""The error of each precision, by the real kernels under the interpreter with tensor cores' operands and sums.

An fp32 operand of a tf32 product is read to 10 bits of mantissa, and the sum of a few exact products and an accumulator
is cut off toward zero: the interpreter's dot is made to do both. What the kernels split by hand is split here as on a
GPU. ``python -m tests.kernels.test_precision`` prints the table of bench/NOTES.md.

Source of the rounding: Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before the kernels are decorated; in a test run conftest.py does it.
    os.environ["TRITON_INTERPRET"] = "1"

import sys

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

import ella_kernels as ek
from ella_kernels import functional
from ella_kernels.triton_backend import launch, schedule, spectral, split_dot
from tests.kernels.cases import exact, factors, relative_error, vanishing_overlap

# What "auto" promises on a GPU on ordinary data, and where terms cancel; "ieee" is tested where it runs.
ORDINARY, CANCELLING, PLAIN = 1e-5, 1e-3, 1e-1
HARD = ("outliers", "outliers, 96x130", "vanishing")
# Outlier channels that miss each other: terms of gram cancel 4.5e5-fold, and exact fp32 products are off by up to 2e-3
# themselves. What tensor cores cut off within a step of 32 rows comes on top: "ieee" is for such data.
EXTREME = {("gram", "outliers, 96x130"): 1e-2}
KINDS = ("random", "correlated", "tiny", "outliers", "disjoint", "k 120", "outliers, 96x130", "vanishing")
# Thousands of rows or columns in one loop: (out, in, r, k, energy). A tensor core that adds inside it is off by more.
LONG = {"gram": (2560, 24, 8, 16, True), "stream": (16, 3072, 8, 120, False)}


def case(kind):
    if kind == "vanishing":
        return vanishing_overlap()
    if kind == "k 120":
        return factors(128, 192, 8, 120)
    if kind == "outliers, 96x130":
        return factors(96, 130, 8, 8, kind="outliers")
    return factors(256, 384, 8, 8, kind=kind)


def holds(x, n_bits):
    """Whether the last ``n_bits`` of every fp32 are zero."""
    return not (x.view(np.int32) & np.int32(2**n_bits - 1)).any()


def tensor_core_dot(x, y, acc):
    """``acc + x @ y`` in fp32 as tensor cores do it: tf32 operands, 8 products a step, or 16 if all are bf16.

    The sum of a step's exact products and the accumulator is cut off toward zero.
    """
    x, y = np.ascontiguousarray(x), np.ascontiguousarray(y)
    step = 16 if holds(x, 16) and holds(y, 16) else 8
    x, y = ((t.view(np.int32) & np.int32(-(2**13))).view(np.float32).astype(np.float64) for t in (x, y))
    acc = acc.astype(np.float64)
    for i in range(0, x.shape[-1], step):
        # float64 has 29 bits of mantissa more than fp32.
        total = acc + x[..., i : i + step] @ y[..., i : i + step, :]
        acc = (total.view(np.int64) & np.int64(-(2**29))).view(np.float64)
    return acc.astype(np.float32)


def emulate(monkeypatch, precision):
    """The kernels compute in ``precision``, a dot's, as tensor cores do."""
    plain = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, input_precision, *rest):
        if "TF32" not in str(input_precision) or a.data.dtype != np.float32:
            return plain(self, a, b, d, input_precision, *rest)
        return interpreter.TensorHandle(tensor_core_dot(a.data, b.data, d.data), d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    for module in (launch, spectral):
        monkeypatch.setattr(module, "dot_precision", lambda *_: precision)
    # An equal call before was prepared in another precision.
    functional._MEMORY.clear()


@triton.jit
def dot_inside(b_x, b_y, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """``split_dot.dot``, but for where it adds: to ``b_acc`` on the tensor cores."""
    if b_acc is None:
        b_acc = tl.zeros((b_x.shape[0], b_y.shape[1]), dtype=ACC)
    if PRECISION == "tf32x3":
        b_xh, b_xl = split_dot._split_tf32(b_x)
        b_yh, b_yl = split_dot._split_tf32(b_y)
    else:
        b_xh, b_xl = split_dot._split_bf16(b_x)
        b_yh, b_yl = split_dot._split_bf16(b_y)
    b_acc = tl.dot(b_xl, b_yh, b_acc, out_dtype=ACC)
    b_acc = tl.dot(b_xh, b_yl, b_acc, out_dtype=ACC)
    return tl.dot(b_xh, b_yh, b_acc, out_dtype=ACC)


@triton.jit
def dot_self_inside(b_x, b_acc, PRECISION: tl.constexpr, ACC: tl.constexpr):
    """As :func:`dot_inside`, of ``split_dot.dot_self``."""
    b_high, b_low = split_dot._split_tf32(b_x)
    b_acc = tl.dot(tl.trans(b_high), 2.0 * b_low, b_acc, out_dtype=ACC)
    return tl.dot(tl.trans(b_high), b_high, b_acc, out_dtype=ACC)


def add_inside(monkeypatch):
    """Every kernel adds up its long sums on the tensor cores."""
    for name, module in list(sys.modules.items()):
        if name.startswith("ella_kernels.triton_backend.") and module is not split_dot:
            for own, other in (("dot", dot_inside), ("dot_self", dot_self_inside)):
                if hasattr(module, own):
                    monkeypatch.setattr(module, own, other)


def error(kind, algorithm):
    """Largest relative error of value and gradients."""
    return error_of(*case(kind), algorithm)


def error_of(a, b, past, algorithm):
    expected = exact(a, b, past, 1.5)
    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    value = ek.add_hadamard_grad_(
        [a], [b], [past], [1.5], [grad_a], [grad_b], weight=1.0, algorithm=algorithm, backend="triton"
    )
    return max(relative_error(found, want) for found, want in zip((value[0], grad_a, grad_b), expected, strict=True))


def cases(algorithm):
    """Gram with 120 components would take the interpreter minutes, and "auto" takes stream there."""
    return [kind for kind in KINDS if (algorithm, kind) != ("gram", "k 120")]


@pytest.mark.parametrize("algorithm, kind", [(name, kind) for name in ("gram", "stream") for kind in cases(name)])
def test_auto_on_tensor_cores_stays_within_its_bound(algorithm, kind, monkeypatch):
    emulate(monkeypatch, "tf32x3")
    assert error(kind, algorithm) < EXTREME.get((algorithm, kind), CANCELLING if kind in HARD else ORDINARY)


def long_case(monkeypatch, algorithm):
    # One multiprocessor: as few chunks as there may be.
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: 1)
    *shape, energy = LONG[algorithm]
    return factors(*shape[:3], shape[3] * (1 + energy), energy=energy)


@pytest.mark.parametrize("algorithm", list(LONG))
def test_auto_keeps_its_digits_in_long_sums(algorithm, monkeypatch):
    emulate(monkeypatch, "tf32x3")
    assert error_of(*long_case(monkeypatch, algorithm), algorithm) < ORDINARY


@pytest.mark.parametrize("algorithm", list(LONG))
def test_emulation_shows_what_adding_on_tensor_cores_loses(algorithm, monkeypatch):
    """The bound above can fail: the same products, added up where they are formed."""
    emulate(monkeypatch, "tf32x3")
    add_inside(monkeypatch)
    assert ORDINARY < error_of(*long_case(monkeypatch, algorithm), algorithm) < CANCELLING


@pytest.mark.parametrize("algorithm", ["gram", "stream"])
def test_emulation_shows_what_plain_tf32_loses(algorithm, monkeypatch):
    """The bounds can fail: one product instead of three does, where the overlap vanishes."""
    emulate(monkeypatch, "tf32")
    assert CANCELLING < error("vanishing", algorithm) < PLAIN


def main() -> None:
    print("| products | algorithm | " + " | ".join(KINDS) + " |\n|---|---|" + "---|" * len(KINDS))
    for precision in ("ieee", "tf32x3", "tf32"):
        for algorithm in ("gram", "stream"):
            with pytest.MonkeyPatch.context() as monkeypatch:
                emulate(monkeypatch, precision)
                cells = [f"{error(kind, algorithm):.0e}" if kind in cases(algorithm) else "–" for kind in KINDS]
            print(f"| {precision} | {algorithm} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
