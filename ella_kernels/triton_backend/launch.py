"""What every launch needs and no kernel should repeat: the device guard, the precision of dots, dtypes, limits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dispatch import device_key, interpreted
from ..layer import Layer

__all__ = [
    "FAST_FLOAT64",
    "TL_DTYPES",
    "Arithmetic",
    "arithmetic",
    "capturing",
    "check_device",
    "device_guard",
    "dot_precision",
    "multiprocessors",
    "register_limit",
    "sums_dtype",
    "target_precision",
    "weight_arguments",
]

TL_DTYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Where float64 is as fast as exact fp32, in matrix instructions Triton emits. The last is the interpreter.
FAST_FLOAT64 = ("sm_80", "sm_90", "gfx942", "cpu")
# Without a device to ask, plan as for a large one: the tests then see many chunks per layer.
_DEFAULT_MULTIPROCESSORS = 132


def check_device(tensor: Tensor) -> None:
    """Refuse operands the kernels cannot reach.

    Raises:
        ValueError: GPU tensors under the interpreter, which follows pointers of the host, or CPU tensors without it.
    """
    if interpreted() == (tensor.device.type == "cuda"):
        found = "under TRITON_INTERPRET=1" if interpreted() else "without TRITON_INTERPRET=1"
        raise ValueError(f"Triton kernels cannot run on device '{tensor.device}' {found}")


def device_guard(tensor: Tensor):
    """Context in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def _properties(index: int):
    return torch.cuda.get_device_properties(index)


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a device: how many programs run at once."""
    if device.type != "cuda":
        return _DEFAULT_MULTIPROCESSORS
    return _properties(device.index).multi_processor_count


def target_precision(precision: str, target: str) -> str:
    """``input_precision`` of the kernels' fp32 dots on a target such as "sm_90" or "gfx942".

    "auto" is compensated products (:mod:`split_dot`; stream takes bf16 for most of its own) where tensor cores have
    tf32, else exact fp32: terms cancel once training has driven the overlap down, and plain tf32 is off by a per cent.
    """
    # Triton has no compensated products for the tf32 (xf32) of gfx942, whose exact ones are matrix instructions anyway.
    if not target.startswith("sm_") or int(target[3:]) < 80:
        return "ieee"
    return {"auto": "tf32x3", "tf32": "tf32", "ieee": "ieee"}[precision]


def dot_precision(precision: str, dtype: torch.dtype, device: torch.device) -> str:
    """:func:`target_precision` of a device; float64 is always exact."""
    return "ieee" if dtype == torch.float64 else target_precision(precision, device_key(device))


# What every algorithm reads.
_MATRICES = ("lora_A", "lora_B", "left", "right")


def sums_dtype(wide: bool, layers: Sequence[Layer], read: Sequence[str] = _MATRICES) -> torch.dtype:
    """Dtype of accumulators and of what is multiplied into them: the operands', or float64 where ``wide`` asks for it.

    Half operands, of those ``read``, keep fp32: Triton 3.7 cannot compile a float64 dot of what was loaded as 16 bits.
    """
    dtype = layers[0].dtype
    operands = (getattr(layer, name) for layer in layers for name in read)
    half = any(t.dtype.itemsize == 2 for t in operands if t is not None)
    return torch.float64 if wide and not half else dtype


def register_limit(maxnreg: int | None) -> dict[str, int]:
    """The launch option, if there is a limit; AMD's compiler does not know it."""
    return {} if maxnreg is None or torch.version.hip is not None else {"maxnreg": maxnreg}


class Arithmetic(NamedTuple):
    """What a class of layers is computed in: accumulators, precision of dots, and a key of the tile tables."""

    dtype: torch.dtype
    dots: str
    products: str


def arithmetic(precision: str, layers: Sequence[Layer]) -> Arithmetic:
    """The arithmetic of the Hadamard kernels for a precision asked for.

    "ieee" takes float64 where that costs nothing: single entries of ``ΔW ⊙ W`` and the terms of gram cancel, and fp32
    products are then not exact enough for a result exact to fp32.
    """
    target = device_key(layers[0].lora_A.device)
    read = (*_MATRICES, "row_energy", "col_energy")
    dtype = sums_dtype(precision == "ieee" and target in FAST_FLOAT64, layers, read)
    dots = dot_precision(precision, dtype, layers[0].lora_A.device)
    return Arithmetic(dtype, dots, "float64" if dtype == torch.float64 else dots)


def weight_arguments(weight: Tensor | float, like: Tensor) -> tuple[Tensor, float]:
    """``(p_weight, weight)`` of a kernel: a tensor is read on the device, a number is passed by value."""
    return (weight, 1.0) if isinstance(weight, Tensor) else (like, float(weight))
