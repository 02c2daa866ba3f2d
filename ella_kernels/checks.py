"""The checks of all that is passed in, and the layers that come of it. Errors name the argument and the layer."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor

from .dispatch import ABSENT, BACKENDS, PRECISIONS, device_key, no_kernel, select_algorithm, select_backend
from .layer import Layer
from .lowrank import LowRank, split_evenly
from .targets import check_apart, check_writable
from .tracing import are_constants, is_traced, wants_derivative

__all__ = [
    "Past",
    "check_options",
    "check_weight",
    "checked_layers",
    "is_converted",
    "one_of",
    "resolve_backend",
    "with_targets",
]

Past = LowRank | Tensor | None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Its square enters the penalty.
_MAX_SCALING = math.sqrt(sys.float_info.max)


def one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse an option that is not ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, found {value!r}")


def check_options(backend: str, precision: str) -> None:
    """Refuse options that no call takes."""
    one_of("backend", backend, BACKENDS)
    one_of("precision", precision, PRECISIONS)


def checked_layers(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[Past],
    scalings: Sequence[float],
    algorithm: str,
) -> list[Layer]:
    """The layers of a call, without targets, each with its algorithm: "auto" resolved, "none" without a past.

    Raises:
        TypeError, ValueError: naming the argument and the layer, what was found and what was expected.
    """
    lora_As = _entries("lora_As", lora_As)
    n = len(lora_As)
    lora_Bs, pasts, scalings = (
        _entries(name, given, n) for name, given in (("lora_Bs", lora_Bs), ("pasts", pasts), ("scalings", scalings))
    )
    where = (lambda name, i: name) if n == 1 else (lambda name, i: f"{name} of layer {i}")
    layers = []
    for i in range(n):
        a, b, past = lora_As[i], lora_Bs[i], pasts[i]
        _matrix(where("lora_A", i), a)
        _matrix(where("lora_B", i), b)
        _check_scaling(where("scaling", i), scalings[i])
        if b.shape[1] != a.shape[0]:
            raise ValueError(
                f"{where('lora_B', i)} must have shape (out, {a.shape[0]}) to match lora_A {tuple(a.shape)}, "
                f"found {tuple(b.shape)}"
            )
        if b.device != a.device or a.device != lora_As[0].device:
            raise ValueError(
                f"{where('lora_A', i)} and lora_B must be on one device, that of the first layer "
                f"({lora_As[0].device}); found {a.device} and {b.device}"
            )
        if is_converted([past], algorithm):
            past = _even_split(past, where("past", i), a, b)
        _check_past(past, where("past", i), a, b, algorithm)
        parts = past if isinstance(past, LowRank) else (past, None, None, None)
        layers.append(Layer(a, b, *parts, float(scalings[i]), _choose(past, a, b, algorithm)))
    return layers


def is_converted(pasts: Sequence[Past], algorithm: str) -> bool:
    """Whether a past is decomposed in every call."""
    return algorithm == "spectral" and any(isinstance(past, Tensor) for past in pasts)


def _choose(past: Past, a: Tensor, b: Tensor, algorithm: str) -> str:
    if past is None:
        return ABSENT
    if algorithm != "auto":
        return algorithm
    k = None if isinstance(past, Tensor) else past.right.shape[0]
    return select_algorithm(b.shape[0], a.shape[1], a.shape[0], k, device_key(a.device))


def with_targets(layers: list[Layer], grads_A: Sequence[Tensor], grads_B: Sequence[Tensor], weight) -> list[Layer]:
    """The layers with the tensors that their gradients are added to.

    Raises:
        TypeError, ValueError: a target or the weight is not what can be added, or memory is shared.
        RuntimeError: somebody waits for a derivative of the call.
    """
    n = len(layers)
    grads_A, grads_B = _entries("grads_A", grads_A, n), _entries("grads_B", grads_B, n)
    lora_As, lora_Bs = [layer.lora_A for layer in layers], [layer.lora_B for layer in layers]
    for name, grads, factors in (("grads_A", grads_A, lora_As), ("grads_B", grads_B, lora_Bs)):
        for i, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
            _floating(f"{name}[{i}]", grad)
            if grad.shape != factor.shape or grad.device != factor.device:
                raise ValueError(
                    f"{name}[{i}] must have shape {tuple(factor.shape)} on {factor.device}, "
                    f"found {tuple(grad.shape)} on {grad.device}"
                )
            check_writable(f"{name}[{i}]", grad)
    check_weight(weight)
    pasts = [t for layer in layers for t in layer.past if t is not None]
    # The in-place form records nothing: who waits for a derivative of it would take its absence for a zero.
    if wants_derivative([*lora_As, *lora_Bs, *pasts, *grads_A, *grads_B, weight]):
        raise RuntimeError(
            "ella_kernels: gradients added in place cannot be differentiated; use the penalty's value, and backward() "
            "or torch.func.grad"
        )
    if layers and not is_traced():
        columns = [("pasts", column) for column in zip(*(layer.past for layer in layers), strict=True)]
        check_apart(
            [("grads_A", grads_A, lora_As), ("grads_B", grads_B, lora_Bs)],
            [("lora_As", lora_As), ("lora_Bs", lora_Bs), *columns],
        )
    return [
        layer._replace(grad_A=grad_a, grad_B=grad_b)
        for layer, grad_a, grad_b in zip(layers, grads_A, grads_B, strict=True)
    ]


def check_weight(weight: float | Tensor) -> None:
    """Refuse what is no finite real number or 0-dim tensor of one."""
    if not isinstance(weight, Tensor):
        _finite("weight", weight)
        return
    if weight.ndim != 0:
        raise ValueError(f"weight must be a number or a 0-dim tensor, found shape {tuple(weight.shape)}")
    if weight.dtype.is_complex or weight.is_quantized:
        raise TypeError(f"weight must be real, found {weight.dtype}")
    if weight.layout is not torch.strided or weight.device.type == "meta":
        raise ValueError(f"weight must hold a number, found a tensor on {weight.device} with layout {weight.layout}")


def resolve_backend(backend: str, layers: Sequence[Layer]) -> str:
    """:func:`dispatch.select_backend` for checked layers.

    Raises:
        ValueError: "triton" where it cannot run or has no kernel for a layer.
    """
    resolved = select_backend(backend, layers[0].lora_A.device.type)
    if backend == "triton":
        for i, layer in enumerate(layers):
            _, _, r, k = layer.sizes
            reason = None if layer.algorithm == ABSENT else no_kernel(layer.algorithm, r, k)
            if reason is not None:
                raise ValueError(f"layer {i}: {reason}; use backend='auto' or 'torch'")
    return resolved


def _check_past(past: Past, name: str, a: Tensor, b: Tensor, algorithm: str) -> None:
    out, in_ = b.shape[0], a.shape[1]
    if past is None:
        return
    if isinstance(past, Tensor):
        _matrix(name, past)
        _expect(name, past, (out, in_), a)
        if algorithm == "gram":
            raise ValueError(f"algorithm='gram' needs {name} as LowRank factors, found a dense tensor; use 'dense'")
        return
    if not isinstance(past, LowRank):
        raise TypeError(f"{name} must be LowRank, a tensor or None, found {type(past).__name__}")
    _matrix(f"{name}.left", past.left)
    _matrix(f"{name}.right", past.right)
    _expect(f"{name}.left", past.left, (out, past.right.shape[0]), a)
    _expect(f"{name}.right", past.right, (past.right.shape[0], in_), a)
    if (past.row_energy is None) != (past.col_energy is None):
        raise ValueError(f"{name} must have both row_energy and col_energy or neither, found only one")
    if past.row_energy is not None:
        _check_energy(f"{name}.row_energy", past.row_energy, out, a)
        _check_energy(f"{name}.col_energy", past.col_energy, in_, a)


def _check_energy(name: str, energy: Tensor, size: int, like: Tensor) -> None:
    _floating(name, energy)
    _expect(name, energy, (size,), like)
    # Where looking at values makes nobody wait.
    if like.device.type == "cpu" and not is_traced() and (energy < 0).any():
        raise ValueError(f"{name} must not be negative, found {energy.min().item()}: it sums squares")


def _even_split(past: Tensor, name: str, a: Tensor, b: Tensor) -> LowRank:
    _matrix(name, past)
    _expect(name, past, (b.shape[0], a.shape[1]), a)
    if past.device.type != "meta" and not is_traced() and not torch.isfinite(past).all():
        raise ValueError(f"{name} must be finite to be decomposed, found nan or inf in it")
    dtype = torch.float64 if torch.float64 in (past.dtype, a.dtype, b.dtype) else torch.float32
    return split_evenly(*torch.linalg.svd(past.double(), full_matrices=False), min(past.shape), dtype)


def _entries(name: str, given: Sequence, n: int | None = None) -> list:
    """What is given per layer, as a list; of ``n`` entries, if that is known."""
    entries = given
    if not isinstance(given, (list, tuple)):
        try:
            entries = None if isinstance(given, Mapping) else [given[i] for i in range(len(given))]
        except (TypeError, LookupError):
            entries = None
    if entries is None:
        raise TypeError(f"{name} must be a sequence with one entry per layer, found {type(given).__name__}")
    if n is not None and len(entries) != n:
        raise ValueError(f"{name} must have one entry per layer, found {len(entries)} for {n} layers")
    return list(entries)


def _floating(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, found {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, float64, bfloat16 or float16, found {tensor.dtype}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise TypeError(f"{name} must be a dense tensor, found {'nested' if tensor.is_nested else tensor.layout}")


def _matrix(name: str, tensor: Tensor) -> None:
    _floating(name, tensor)
    if tensor.ndim != 2:
        raise ValueError(f"{name} must have 2 dimensions, found shape {tuple(tensor.shape)}")


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, found {tuple(tensor.shape)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} with the factors, found {tensor.device}")
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require grad: the past is frozen; pass {name}.detach()")


def _finite(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {type(value).__name__}")
    if not are_constants([value]):
        return
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, found a larger number") from None
    if not is_finite:
        raise ValueError(f"{name} must be finite, found {value}")


def _check_scaling(name: str, value: float) -> None:
    _finite(name, value)
    if abs(float(value)) > _MAX_SCALING:
        raise ValueError(f"{name} must be at most {_MAX_SCALING:.1e} in size, found {float(value)}")
