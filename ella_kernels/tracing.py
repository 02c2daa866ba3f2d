"""Who watches a call: a compiler, a function transform, forward mode, a dispatch mode."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

__all__ = [
    "are_constants",
    "has_tangents",
    "is_forward_over",
    "is_intercepted",
    "is_traced",
    "is_transformed",
    "recorded",
    "wants_derivative",
]


def has_tangents() -> bool:
    """Whether a level of forward mode is open, by ``torch.func.jvp`` or without it."""
    return forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward mode sees this call: a registered op they would differentiate to zero."""
    return torch._C._functorch.peek_interpreter_stack() is not None or has_tangents()


def is_forward_over() -> bool:
    """Whether ``torch.func`` takes tangents of a derivative that it takes inside."""
    kinds = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    inner = kinds[kinds.index(TransformType.Jvp) + 1 :] if TransformType.Jvp in kinds else []
    return TransformType.Grad in inner or TransformType.Jvp in inner


def is_intercepted() -> bool:
    """Whether a dispatch mode, a function transform or forward mode wants to see the operators of this call."""
    return torch._C._len_torch_dispatch_stack() > 0 or is_transformed()


def is_traced() -> bool:
    """Whether operands may be stand-ins, without values or addresses to look at."""
    return torch.compiler.is_compiling() or is_intercepted()


def wants_derivative(tensors: Sequence) -> bool:
    """Whether a transform or forward mode waits for a derivative in one of ``tensors``."""
    if torch.compiler.is_compiling():
        return has_tangents()
    return is_transformed() and any(
        torch._C._functorch.is_gradtrackingtensor(t) or forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
        if isinstance(t, Tensor)
    )


def are_constants(numbers: Sequence[float | Tensor]) -> bool:
    """Whether none of these is a Python number that a compiled caller may change from call to call."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not isinstance(numbers, (list, tuple)) or all(
        not isinstance(number, (int, float)) or has_static_value(number) for number in numbers
    )


def recorded(numbers: Sequence[float], device: torch.device) -> Tensor:
    """``(n,)`` float64 of a compiled caller's numbers: a product is recorded where a conversion would be a constant."""
    return torch.stack([torch.ones((), dtype=torch.float64, device=device) * number for number in numbers])
