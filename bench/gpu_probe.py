"""How this device rounds the accumulator of a matrix product: to nearest, as fp32 adds do, or toward zero."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["probe", "rounding"]

ULP = 2.0**-23
_INNER = 32


@triton.jit(do_not_specialize=["steps"])
def probe_kernel(
    p_x, p_y, p_out, steps, M: tl.constexpr, N: tl.constexpr, INNER: tl.constexpr, PRECISION: tl.constexpr,
    BF16: tl.constexpr,
):  # fmt: skip
    rows, cols, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, INNER)
    acc = tl.zeros((M, N), dtype=tl.float32)
    for i in range(steps):
        at = i * INNER + inner
        x = tl.load(p_x + rows[:, None] * (steps * INNER) + at[None, :])
        y = tl.load(p_y + at[:, None] * N + cols[None, :])
        if BF16:
            acc = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), acc)
        else:
            acc = tl.dot(x, y, acc, input_precision=PRECISION)
    tl.store(p_out + rows[:, None] * N + cols[None, :], acc)


def triton_product(x: Tensor, y: Tensor, products: str) -> Tensor:
    """``x @ y`` with fp32 accumulators; products in "ieee" (exact fp32), "tf32" or "bf16"."""
    out = torch.empty(x.shape[0], y.shape[1], device=x.device)
    steps = x.shape[1] // _INNER
    precision = "ieee" if products == "bf16" else products
    probe_kernel[(1,)](x, y, out, steps, x.shape[0], y.shape[1], _INNER, precision, products == "bf16", num_warps=4)
    return out


def library_product(x: Tensor, y: Tensor, products: str) -> Tensor:
    """``torch.mm`` in the same products; bf16 with fp32 results."""
    if products == "bf16":
        return torch.mm(x.bfloat16(), y.bfloat16(), out_dtype=torch.float32)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
    try:
        return torch.mm(x, y)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def rounding(above: float, below: float) -> str:
    """The rounding that turns 1 + ¾ulp into ``above`` and its negative into ``below``."""
    names = {
        (1.0, -1.0): "toward zero",
        (1.0 + ULP, -1.0 - ULP): "to nearest",
        (1.0, -1.0 - ULP): "down",
        (1.0 + ULP, -1.0): "up",
    }
    return names.get((above, below), f"neither: {above!r}, {below!r}")


def probe(device: str, launch_on: str | None = None) -> Iterator[dict]:
    """A row for every way to multiply; one that fails is a row with its failure.

    ``between`` is how 1 + ¾ulp is rounded where the small term comes with a later step than the 1, ``within`` where
    both are terms of one step. ``bias`` is the mean relative error of sums of 4096 positive products, and
    ``share_below`` how many of them are less than the exact sum: about a half if rounding is to nearest.

    Args:
        launch_on: where operands are, if not on ``device``: for compiling without it.
    """
    ways = [("tl.dot", tile, products) for tile in (64, 16) for products in ("tf32", "bf16", "ieee")]
    ways += [("torch.mm", 128, products) for products in ("tf32", "bf16", "ieee")]
    for what, tile, products in ways:
        if device == "cpu" and products == "bf16":
            # The interpreter cannot multiply it, and torch.mm has no fp32 results there.
            continue
        product = triton_product if what == "tl.dot" else library_product
        row = {"kind": "probe", "what": what, "tile": tile, "products": products}
        try:
            row |= _probe_one(lambda x, y, by=product, how=products: by(x, y, how), tile, launch_on or device)
        except Exception as error:
            row |= {"passed": False, "failure": f"{type(error).__name__}: {error}"[:300]}
        yield row


def _probe_one(product, tile: int, device: str) -> dict:
    found = {}
    for name, place in (("between", _INNER), ("within", 1)):
        ends = []
        for sign in (1.0, -1.0):
            x, y = torch.zeros(tile, 2 * _INNER, device=device), torch.zeros(2 * _INNER, tile, device=device)
            x[:, 0], y[0] = sign, 1.0
            x[:, place], y[place] = sign * 1.5 * 2.0**-12, 2.0**-12
            result = product(x, y)
            ends.append(result[0, 0].item() if (result == result[0, 0]).all() else float("nan"))
        found[name] = rounding(*ends)
    generator = torch.Generator(device).manual_seed(0)
    # Eight bits: exact in bf16 and tf32, and so are the products in fp32.
    x, y = (
        torch.randint(128, 256, shape, generator=generator, device=device).float() / 256
        for shape in ((tile, 4096), (4096, tile))
    )
    exact = x.double() @ y.double()
    error = (product(x, y).double() - exact) / exact
    return found | {"bias": error.mean().item(), "share_below": (error < 0).double().mean().item()}
