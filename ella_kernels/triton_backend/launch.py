"""What every launch needs and no kernel should repeat: the device guard, the precision of dots, dtypes, limits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..dispatch import interpreted
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
    "launch",
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


def device_guard(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Context in which launches go to the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def _properties(index: int) -> Any:
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


def dot_precision(precision: str, dtype: torch.dtype, target: str) -> str:
    """:func:`target_precision` for operands of ``dtype``; float64 is always exact."""
    return "ieee" if dtype == torch.float64 else target_precision(precision, target)


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


def arithmetic(precision: str, layers: Sequence[Layer], target: str) -> Arithmetic:
    """The arithmetic of the Hadamard kernels for a precision asked for, on a target such as "sm_90" or "cpu".

    "ieee" takes float64 where that costs nothing: single entries of ``ΔW ⊙ W`` and the terms of gram cancel, and fp32
    products are then not exact enough for a result exact to fp32.
    """
    read = (*_MATRICES, "row_energy", "col_energy")
    dtype = sums_dtype(precision == "ieee" and target in FAST_FLOAT64, layers, read)
    dots = dot_precision(precision, dtype, target)
    return Arithmetic(dtype, dots, "float64" if dtype == torch.float64 else dots)


# Compiled kernels by all that is compiled into them.
_compiled: dict[tuple, Any] = {}
# Arguments that no kernel is compiled for.
_NUMBERS = frozenset({"weight", "grad_base", "n_layers"})


def launch(kernel: Any, grid: tuple[int, ...], options: dict[str, int], **arguments: Any) -> None:
    """Launch a kernel on the current stream of the current device, where the tensors are.

    Triton's own dispatch binds, specialises and hashes all arguments again at every launch, tens of microseconds of
    Python. What it found for equal dtypes, alignments and constants is launched directly here.

    Args:
        options: Triton's, as ``num_warps``. arguments: all of the kernel's, by name; the first is a tensor.
    """
    if interpreted():
        kernel[grid](**arguments, **options)
        return
    ordered = [arguments[name] for name in kernel.arg_names]
    key = [kernel.__name__, ordered[0].device, *options.values()]
    for name, value in zip(kernel.arg_names, ordered, strict=True):
        if isinstance(value, Tensor):
            key += value.dtype, value.data_ptr() % 16 == 0
        elif name not in _NUMBERS:
            key.append(value)
    compiled = _compiled.get(tuple(key))
    if compiled is None:
        compiled = kernel.warmup(**arguments, **options, grid=grid)
        if compiled is None:
            # A hook of Triton's forbade the compilation.
            return
        _compiled[tuple(key)] = compiled
    compiled[(*grid, 1, 1)[:3]](*ordered)


def weight_arguments(weight: Tensor | float, like: Tensor) -> dict[str, Any]:
    """A kernel's arguments of the weight: a tensor is read on the device, a number is passed by value."""
    if isinstance(weight, Tensor):
        return {"p_weight": weight, "weight": 1.0, "WEIGHT_IS_TENSOR": True}
    return {"p_weight": like, "weight": float(weight), "WEIGHT_IS_TENSOR": False}
