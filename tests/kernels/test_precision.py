"""The error of each precision, by the real kernels under the interpreter with tensor cores' operands.

An fp32 operand of a tf32 product is read to 10 bits of mantissa: the interpreter's dot is made to read it so. What the
kernels split by hand is split here as on a GPU. ``python -m tests.kernels.test_precision`` prints the table of
bench/NOTES.md.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before the kernels are decorated; in a test run conftest.py does it.
    os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

import ella_kernels as ek
from ella_kernels import functional
from ella_kernels.triton_backend import launch, spectral
from tests.kernels.cases import exact, factors, relative_error, vanishing_overlap

# What "auto" promises on a GPU, on every kind of data; "ieee" is tested where it runs.
BOUNDS = {"tf32x3": 1e-3, "tf32": 1e-1}
KINDS = ("random", "correlated", "tiny", "outliers", "disjoint", "k 120", "outliers, 96x130", "vanishing")


def case(kind):
    if kind == "vanishing":
        return vanishing_overlap()
    if kind == "k 120":
        return factors(128, 192, 8, 120)
    if kind == "outliers, 96x130":
        return factors(96, 130, 8, 8, kind="outliers")
    return factors(256, 384, 8, 8, kind=kind)


def emulate(monkeypatch, precision):
    """The kernels compute in ``precision``, a dot's, on operands as tensor cores read them."""
    plain = interpreter.InterpreterBuilder.create_dot

    def read(handle):
        if handle.data.dtype != np.float32:
            return handle
        bits = np.ascontiguousarray(handle.data).view(np.int32) & np.int32(-8192)
        return interpreter.TensorHandle(bits.view(np.float32), handle.dtype)

    def create_dot(self, a, b, d, input_precision, *rest):
        if "TF32" in str(input_precision):
            a, b = read(a), read(b)
        return plain(self, a, b, d, input_precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    for module in (launch, spectral):
        monkeypatch.setattr(module, "dot_precision", lambda *_: precision)
    # An equal call before was prepared in another precision.
    functional._MEMORY.clear()


def error(kind, algorithm):
    """Largest relative error of value and gradients."""
    a, b, past = case(kind)
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
    assert error(kind, algorithm) < BOUNDS["tf32x3"]


@pytest.mark.parametrize("algorithm", ["gram", "stream"])
def test_emulation_shows_what_plain_tf32_loses(algorithm, monkeypatch):
    """The bound above can fail: one product instead of three does, where the overlap vanishes."""
    emulate(monkeypatch, "tf32")
    assert BOUNDS["tf32x3"] < error("vanishing", algorithm) < BOUNDS["tf32"]


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
