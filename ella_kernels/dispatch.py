"""Which algorithm and which backend: pure functions of sizes and device, so that a choice can be tested and read."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["ALGORITHMS", "BACKENDS", "PRECISIONS", "Cost", "select_algorithm", "select_backend"]

ALGORITHMS = ("auto", "gram", "stream", "dense")
BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("auto", "ieee", "tf32")


class Cost(NamedTuple):
    """Relative cost of one unit of work on a device; one multiply-add of the stream algorithm's matmuls is 1.

    Attributes:
        gram: one multiply-add of the gram algorithm's matmuls, which are narrower.
        pair: forming one pair product of the gram algorithm (elementwise, memory-bound).
        tile: all elementwise passes over one element of a tile of the stream algorithm.
    """

    gram: float
    pair: float
    tile: float


# Measured crossovers of value and gradients, see bench/NOTES.md; a device not listed takes the default row.
COSTS = {"cpu": Cost(gram=1.35, pair=16.0, tile=60.0), "default": Cost(gram=1.0, pair=8.0, tile=16.0)}


def gram_cost(out: int, in_: int, r: int, k: int, cost: Cost) -> float:
    """Value and gradients by pairs: two matmuls of ``P·Q`` per row and side, and the pair products themselves."""
    pairs, past_pairs = r * (r + 1) / 2, k * (k + 1) / 2 + 1
    return (out + in_) * (2 * cost.gram * pairs * past_pairs + 2 * cost.pair * (pairs + past_pairs))


def stream_cost(out: int, in_: int, r: int, k: int, cost: Cost) -> float:
    """Value and gradients by tiles: ``B·A``, ``L·R``, the two gradient products and the elementwise work."""
    return out * in_ * (3 * r + k + cost.tile)


def select_algorithm(out: int, in_: int, r: int, k: int | None, device: str = "cpu") -> str:
    """The cheapest exact algorithm for a Hadamard penalty with gradients.

    Args:
        out, in_: weight shape. r: LoRA rank. k: components of the past, or None for a stored dense past.
        device: a key of :data:`COSTS`; unknown ones take the default row.

    Returns:
        "gram" or "stream"; "dense" exactly when ``k`` is None.

    >>> select_algorithm(4096, 4096, 8, 8), select_algorithm(4096, 4096, 64, 64), select_algorithm(64, 64, 8, None)
    ('gram', 'stream', 'dense')
    """
    if k is None:
        return "dense"
    cost = COSTS.get(device, COSTS["default"])
    return "gram" if gram_cost(out, in_, r, k, cost) <= stream_cost(out, in_, r, k, cost) else "stream"


def interpreted() -> bool:
    """Whether Triton kernels run under the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def select_backend(backend: str, device_type: str) -> str:
    """Resolve "auto" and refuse a Triton backend that cannot run.

    Raises:
        ValueError: "triton" on a device without Triton, unless ``TRITON_INTERPRET=1``.
    """
    if backend == "torch":
        return "torch"
    if backend == "triton":
        if device_type != "cuda" and not interpreted():
            raise ValueError(
                f"backend='triton' needs tensors on a CUDA or ROCm GPU, found device type '{device_type}'; use "
                "backend='auto' or 'torch', or set TRITON_INTERPRET=1 to run the kernels on the CPU for checking"
            )
        return "triton"
    return "triton" if device_type == "cuda" and triton_available() else "torch"


def triton_available() -> bool:
    """Whether this installation has Triton kernels to launch."""
    from importlib.util import find_spec

    return find_spec("triton") is not None and find_spec("ella_kernels.kernels") is not None
