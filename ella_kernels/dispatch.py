"""Which algorithm and which backend: pure functions of sizes and device, so that a choice can be tested and read."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

__all__ = [
    "ABSENT",
    "ALGORITHMS",
    "BACKENDS",
    "PRECISIONS",
    "Cost",
    "device_key",
    "no_kernel",
    "select_algorithm",
    "select_backend",
    "warn_once",
]

ALGORITHMS = ("auto", "gram", "stream", "dense")
# What a layer without a past has in place of an algorithm.
ABSENT = "none"
BACKENDS = ("auto", "triton", "torch")
PRECISIONS = ("auto", "ieee", "tf32")
# Two fp32 blocks of this size are 8 MB, the largest work memory one layer may ask for.
MAX_GRAM_ELEMENTS = 2**20
# (r, k): beyond these a tile is rebuilt so often that dense products are faster.
MAX_STREAM_RANKS = (256, 512)
# Its (r, r) products are float64 and live in registers.
MAX_SPECTRAL_RANK = 64
# Found, not imported; once, because compiled callers cannot trace the search.
_HAS_TRITON = find_spec("triton") is not None


class Cost(NamedTuple):
    """Relative cost of one unit of work on a device; one multiply-add of the stream algorithm's matmuls is 1.

    Attributes:
        gram: one multiply-add of the gram algorithm's matmuls, which are narrower.
        pair: forming one pair product of the gram algorithm (elementwise, memory-bound).
        tile: all elementwise passes over one element of a tile of the stream algorithm.
        builds: how often a tile is built for value and gradients; the Triton kernel builds it for each side.
        past: one multiply-add of ``L·R``, in three bf16 products where the others take three tf32 ones.
        launch: what a small layer's share of gram's many operations costs beyond its arithmetic.
    """

    gram: float
    pair: float
    tile: float
    builds: int = 1
    past: float = 1.0
    launch: float = 0.0


# "cpu" is fitted to timings of two busy cores. The GPU rows follow from the instructions counted in the compiled loops
# and published rates per multiprocessor, not yet measured on a GPU; both are in bench/NOTES.md. A device not listed
# takes the default row.
COSTS = {
    "cpu": Cost(gram=1.6, pair=16.0, tile=45.0, launch=2e6),
    "sm_80": Cost(gram=2.5, pair=0.0, tile=12.0, builds=2, past=0.9),
    "sm_90": Cost(gram=2.3, pair=0.0, tile=15.0, builds=2, past=0.5),
    "sm_100": Cost(gram=2.9, pair=0.0, tile=68.0, builds=2, past=1.25),
    "gfx942": Cost(gram=2.5, pair=0.0, tile=12.0, builds=2),
    "default": Cost(gram=1.0, pair=8.0, tile=16.0),
}


def gram_cost(out: int, in_: int, r: int, k: int, cost: Cost) -> float:
    """Value and gradients by pairs: two matmuls of ``pairs · q`` per row and side, and the pair products themselves."""
    pairs, past_pairs = r * (r + 1) / 2, k * (k + 1) / 2 + 1
    return cost.launch + (out + in_) * (2 * cost.gram * pairs * past_pairs + 2 * cost.pair * (pairs + past_pairs))


def stream_cost(out: int, in_: int, r: int, k: int, cost: Cost) -> float:
    """Value and gradients by tiles: ``B·A``, ``L·R``, the two gradient products and the elementwise work."""
    return out * in_ * (cost.builds * (r + cost.past * k + cost.tile) + 2 * r)


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
    """Resolve the backend for a device and refuse a Triton backend that cannot run.

    Returns:
        "torch"; "triton"; or "auto" where Triton runs but single layers may fall back (:func:`no_kernel`).

    Raises:
        ValueError: "triton" on a device without Triton, unless ``TRITON_INTERPRET=1``.
    """
    if backend == "triton" and device_type != "cuda" and not interpreted():
        raise ValueError(
            f"backend='triton' needs tensors on a CUDA or ROCm GPU, found device type '{device_type}'; use "
            "backend='auto' or 'torch', or set TRITON_INTERPRET=1 to run the kernels on the CPU for checking"
        )
    if backend == "auto" and not (device_type == "cuda" and triton_available() and not interpreted()):
        return "torch"
    return backend


def triton_available() -> bool:
    """Whether this installation has Triton to compile the kernels with."""
    return _HAS_TRITON


def no_kernel(algorithm: str, r: int, k: int) -> str | None:
    """Why there is no Triton kernel for an algorithm at these ranks, or None if there is one."""
    if algorithm == "gram":
        elements = r * (r + 1) // 2 * (k * (k + 1) // 2 + 1)
        if elements > MAX_GRAM_ELEMENTS:
            return (
                f"the Triton gram kernel takes up to {MAX_GRAM_ELEMENTS} Gram elements (any r·k ≤ 256 has fewer), "
                f"found {elements} at r = {r}, k = {k}"
            )
        return None
    if algorithm in ("stream", "dense"):
        if r > MAX_STREAM_RANKS[0] or k > MAX_STREAM_RANKS[1]:
            return (
                f"the Triton stream kernel takes r up to {MAX_STREAM_RANKS[0]} and k up to {MAX_STREAM_RANKS[1]}, "
                f"found r = {r}, k = {k}"
            )
        return None
    if r > MAX_SPECTRAL_RANK:
        return f"the Triton spectral kernel takes r up to {MAX_SPECTRAL_RANK}, found r = {r}"
    return None


@cache
def warn_once(reason: str) -> None:
    """Say that a layer falls back to torch, once per reason."""
    warnings.warn(f"ella_kernels: {reason}; computing it with torch", RuntimeWarning, stacklevel=2)


def device_key(device: torch.device) -> str:
    """Key of a device in the tables of costs and tiles: "cpu", "sm_90", "gfx942"; others by their type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"
