"""The public functions: check, normalise, choose, call.

All take LoRA factors as PEFT stores them, ``lora_A (r, in)`` and ``lora_B (out, r)``, in float32, float64, bfloat16 or
float16; arithmetic and results are float32, or float64 as soon as one operand is float64, also inside ``autocast``.
Source of the penalty: Das Biswas et al., EACL 2026, arXiv 2601.02232; formulas and letters: docs/math.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from numbers import Real

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, repeats
from .dispatch import ALGORITHMS, BACKENDS, PRECISIONS, device_key, no_kernel, select_algorithm, select_backend
from .lowrank import LowRank
from .targets import check_apart, check_writable

__all__ = [
    "add_hadamard_grad_",
    "add_spectral_grad_",
    "hadamard_penalty",
    "hadamard_penalty_grouped",
    "spectral_penalty",
    "spectral_penalty_grouped",
]

Past = LowRank | Tensor | None
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# Its square enters the penalty.
_MAX_SCALING = math.sqrt(sys.float_info.max)


def hadamard_penalty(
    lora_A: Tensor,
    lora_B: Tensor,
    past: Past,
    scaling: float = 1.0,
    *,
    algorithm: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """ELLA's penalty ``‖ΔW ⊙ W_past‖_F²`` with ``ΔW = scaling · lora_B @ lora_A``, never forming ``ΔW``.

    Args:
        lora_A: ``(r, in)``. lora_B: ``(out, r)``. Any strides.
        past: :class:`LowRank`, a dense ``(out, in)`` tensor, or None for no past (penalty 0).
        scaling: LoRA scaling, e.g. ``alpha / r``.
        algorithm: "gram", "stream", "dense" or "auto" (by cost). A dense past takes "auto", "dense" or "stream".
        backend: "torch", "triton" or "auto".
        precision: matrix products of the Triton kernels: "ieee" exact fp32, and float64 where that is as fast; "tf32";
            or "auto", each from up to three tf32 or bf16 products on NVIDIA (relative error 1e-5, at most 1e-3 where
            terms cancel) and exact fp32 elsewhere. torch follows its own settings.

    Returns:
        0-dim tensor, differentiable once in ``lora_A`` and ``lora_B``, backwards or forwards, by ``torch.func`` too.

    Raises:
        TypeError, ValueError: naming the argument, what was found and what was expected.
        RuntimeError: second-order derivatives, and ``vmap``.

    >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
    >>> hadamard_penalty(a, b, torch.full((2, 3), 2.0)).item()
    24.0
    """
    return hadamard_penalty_grouped(
        [lora_A], [lora_B], [past], [scaling], algorithm=algorithm, backend=backend, precision=precision
    )[0]


def spectral_penalty(
    lora_A: Tensor, lora_B: Tensor, past: Past, scaling: float = 1.0, *, backend: str = "auto", precision: str = "auto"
) -> Tensor:
    """Projected norm ``scaling² ‖(LᵀB)(A Rᵀ)‖_F²`` (docs/math.md); arguments as :func:`hadamard_penalty`.

    ``past.left`` and ``past.right`` must split the SVD evenly (:func:`truncate` does); energies do not enter. A dense
    past is decomposed on every call, which is slow: ``truncate`` it once instead.

    >>> past = LowRank(torch.tensor([[2.0], [0.0]]), torch.tensor([[1.0, 0.0]]))
    >>> spectral_penalty(torch.ones(1, 2), torch.ones(2, 1), past).item()
    4.0
    """
    return spectral_penalty_grouped([lora_A], [lora_B], [past], [scaling], backend=backend, precision=precision)[0]


def hadamard_penalty_grouped(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[Past],
    scalings: Sequence[float],
    *,
    algorithm: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """:func:`hadamard_penalty` of many layers at once, ``(n_layers,)``; shapes, ranks, dtypes and pasts may differ."""
    _one_of("algorithm", algorithm, ALGORITHMS)
    return _penalties(lora_As, lora_Bs, pasts, scalings, algorithm, backend, precision)


def spectral_penalty_grouped(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[Past],
    scalings: Sequence[float],
    *,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """:func:`spectral_penalty` of many layers at once, ``(n_layers,)``."""
    return _penalties(lora_As, lora_Bs, pasts, scalings, "spectral", backend, precision)


def add_hadamard_grad_(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[Past],
    scalings: Sequence[float],
    grads_A: Sequence[Tensor],
    grads_B: Sequence[Tensor],
    *,
    weight: float | Tensor,
    algorithm: str = "auto",
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """Add ``weight · ∂P/∂A`` and ``weight · ∂P/∂B`` of every layer to existing gradients in place, without autograd.

    Args:
        grads_A, grads_B: tensors or views of the factors' shapes, any floating dtype and strides, each with memory of
            its own; one that is listed again for the same factor has the gradients added up. The sum is formed in fp32
            and rounded once. Nothing is added when anything is refused.
        weight: λ (times a gradient scaler's scale), a finite number or a real 0-dim tensor of any dtype on any device.
            One on the layers' device is not read on the host.
        others: as :func:`hadamard_penalty_grouped`.

    Returns:
        The unweighted penalties ``(n_layers,)``.

    >>> a, b = torch.ones(1, 3), torch.ones(2, 1)
    >>> grad_a, grad_b = torch.zeros(1, 3), torch.zeros(2, 1)
    >>> add_hadamard_grad_([a], [b], [torch.ones(2, 3)], [1.0], [grad_a], [grad_b], weight=0.5)
    tensor([6.])
    >>> grad_a, grad_b
    (tensor([[2., 2., 2.]]), tensor([[3.],
            [3.]]))
    """
    _one_of("algorithm", algorithm, ALGORITHMS)
    return _add_grads_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, algorithm, backend, precision)


def add_spectral_grad_(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    pasts: Sequence[Past],
    scalings: Sequence[float],
    grads_A: Sequence[Tensor],
    grads_B: Sequence[Tensor],
    *,
    weight: float | Tensor,
    backend: str = "auto",
    precision: str = "auto",
) -> Tensor:
    """:func:`add_hadamard_grad_` for the spectral penalty."""
    return _add_grads_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, "spectral", backend, precision)


def _penalties(lora_As, lora_Bs, pasts, scalings, algorithm, backend, precision) -> Tensor:
    _one_of("backend", backend, BACKENDS)
    _one_of("precision", precision, PRECISIONS)
    if not _are_constants(scalings):
        # An op's numbers are compiled into the graph, once for each: these are multiplied in outside it.
        plain = _penalties(lora_As, lora_Bs, pasts, [1.0] * len(scalings), algorithm, backend, precision)
        return (plain.double() * _traced(scalings, plain.device).square()).to(plain.dtype)
    operands = _operands(lora_As, lora_Bs, pasts, scalings, algorithm)
    if operands is None:
        return torch.zeros(0)
    backend = _resolve(backend, operands)
    with_grad = torch.is_grad_enabled() and any(t.requires_grad for t in (*operands[0], *operands[1]))
    if torch.compiler.is_compiling():
        if ops.has_tangents():
            raise RuntimeError(
                "ella_kernels: forward-mode derivatives of a penalty are not compiled; take them outside"
            )
    elif with_grad or ops.is_transformed():
        return ops.differentiable_penalty(*operands, True, backend, precision)
    return ops.penalty(*operands, with_grad, backend, precision)[0]


def _add_grads_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, algorithm, backend, precision) -> Tensor:
    _one_of("backend", backend, BACKENDS)
    _one_of("precision", precision, PRECISIONS)
    options = (algorithm, backend, precision)
    signature = repeats.signature(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, options)
    choice = repeats.find(signature)
    if choice is None:
        return _add_checked_grads_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, *options, signature)
    _check_weight(weight)
    if choice.prepared is not None:
        return _run_prepared(choice.prepared, grads_A, grads_B, weight, signature.grad_base - choice.grad_base)
    operands = _lists(lora_As, lora_Bs, pasts, scalings, choice.codes)
    return _run_op(operands, grads_A, grads_B, weight, choice.backend, precision)


@torch.no_grad()
def _run_op(operands, grads_A, grads_B, weight, backend, precision) -> Tensor:
    tensor, factor = (weight, 1.0) if isinstance(weight, Tensor) else (None, float(weight))
    return ops.add_penalty_grad_(*operands, list(grads_A), list(grads_B), tensor, factor, backend, precision)


def _run_prepared(prepared, grads_A, grads_B, weight, moved_by: int = 0) -> Tensor:
    values = prepared.run(weight, moved_by)
    # The kernels write through addresses; around the registered op the dispatcher tells autograd so.
    torch.autograd.graph.increment_version([*grads_A, *grads_B])
    return values


@torch.no_grad()
def _add_checked_grads_(
    lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight, algorithm, backend, precision, signature
) -> Tensor:
    """All checks, then the registered op, or for a call with a signature its kernels, which are kept for the next."""
    scalings, traced = ([1.0] * len(scalings), scalings) if not _are_constants(scalings) else (scalings, None)
    operands = _operands(lora_As, lora_Bs, pasts, scalings, algorithm)
    lora_As, lora_Bs = ([], []) if operands is None else operands[:2]
    grads_A, grads_B = _entries("grads_A", grads_A, len(lora_As)), _entries("grads_B", grads_B, len(lora_Bs))
    for name, grads, factors in (("grads_A", grads_A, lora_As), ("grads_B", grads_B, lora_Bs)):
        for i, (grad, factor) in enumerate(zip(grads, factors, strict=True)):
            _floating(f"{name}[{i}]", grad)
            if grad.shape != factor.shape or grad.device != factor.device:
                raise ValueError(
                    f"{name}[{i}] must have shape {tuple(factor.shape)} on {factor.device}, "
                    f"found {tuple(grad.shape)} on {grad.device}"
                )
            check_writable(f"{name}[{i}]", grad)
    _check_weight(weight)
    if operands is None:
        return torch.zeros(0)
    _refuse_derivatives((*(t for column in operands[:6] for t in column), *grads_A, *grads_B, weight))
    if not _is_traced():
        read = zip(("lora_As", "lora_Bs", *["pasts"] * 4), operands[:6], strict=True)
        check_apart([("grads_A", grads_A, lora_As), ("grads_B", grads_B, lora_Bs)], list(read))
    backend = _resolve(backend, operands)
    if not _are_constants([weight]):
        (weight,) = _traced([weight], lora_As[0].device)
    if traced is not None:
        values, *grads = ops.penalty(*operands, True, backend, precision)
        squares = _traced(traced, values.device).square()
        factors = (squares * weight).unbind()
        torch._foreach_add_([*grads_A, *grads_B], torch._foreach_mul([*grads[0], *grads[1]], [*factors, *factors]))
        return (values.double() * squares).to(values.dtype)
    if signature is None or _is_converted(pasts, algorithm):
        return _run_op(operands, grads_A, grads_B, weight, backend, precision)
    # torch's own operators are left to the op: below the dispatcher they are cheaper.
    prepared = None if backend == "torch" else ops.prepare_group(*operands, grads_A, grads_B, backend, precision)
    if prepared is None or prepared.holds_operands:
        repeats.remember(signature, operands[-1], backend, None)
        return _run_op(operands, grads_A, grads_B, weight, backend, precision)
    repeats.remember(signature, operands[-1], backend, prepared)
    return _run_prepared(prepared, grads_A, grads_B, weight)


def _refuse_derivatives(tensors: Sequence) -> None:
    """The in-place form records nothing: who waits for a derivative of it would take its absence for a zero."""
    if torch.compiler.is_compiling():
        is_asked_for = ops.has_tangents()
    else:
        is_asked_for = ops.is_transformed() and any(
            torch._C._functorch.is_gradtrackingtensor(t) or forward_ad.unpack_dual(t).tangent is not None
            for t in tensors
            if isinstance(t, Tensor)
        )
    if is_asked_for:
        raise RuntimeError(
            "ella_kernels: gradients added in place cannot be differentiated; use the penalty's value, and backward() "
            "or torch.func.grad"
        )


def _check_weight(weight: float | Tensor) -> None:
    if not isinstance(weight, Tensor):
        _finite("weight", weight)
        return
    if weight.ndim != 0:
        raise ValueError(f"weight must be a number or a 0-dim tensor, found shape {tuple(weight.shape)}")
    if weight.dtype.is_complex or weight.is_quantized:
        raise TypeError(f"weight must be real, found {weight.dtype}")
    if weight.layout is not torch.strided or weight.device.type == "meta":
        raise ValueError(f"weight must hold a number, found a tensor on {weight.device} with layout {weight.layout}")


def _operands(lora_As, lora_Bs, pasts, scalings, algorithm: str) -> tuple | None:
    """The parallel lists ``ops`` takes, checked; None for an empty group."""
    lora_As = _entries("lora_As", lora_As)
    n = len(lora_As)
    lora_Bs, pasts, scalings = (
        _entries(name, given, n) for name, given in (("lora_Bs", lora_Bs), ("pasts", pasts), ("scalings", scalings))
    )
    if n == 0:
        return None
    checked, codes = [], []
    where = (lambda name, i: name) if n == 1 else (lambda name, i: f"{name} of layer {i}")
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
        if _is_converted([past], algorithm):
            past = _even_split(past, where("past", i), a, b)
        _check_past(past, where("past", i), a, b, algorithm)
        checked.append(past)
        codes.append(ops.CODES.index(_choose(past, a, b, algorithm)))
    return _lists(lora_As, lora_Bs, checked, scalings, codes)


def _is_converted(pasts: Sequence[Past], algorithm: str) -> bool:
    return algorithm == "spectral" and any(isinstance(past, Tensor) for past in pasts)


def _lists(lora_As, lora_Bs, pasts, scalings, codes: list[int]) -> tuple:
    # One placeholder for all that is absent: the dispatcher has no lists with gaps.
    absent = lora_As[0].new_empty(0)
    parts = [past if isinstance(past, LowRank) else (past, None, None, None) for past in pasts]
    columns = ([absent if t is None else t for t in column] for column in zip(*parts, strict=True))
    return list(lora_As), list(lora_Bs), *columns, [float(s) for s in scalings], codes


def _choose(past: Past, a: Tensor, b: Tensor, algorithm: str) -> str:
    if past is None:
        return ops.ABSENT
    if algorithm != "auto":
        return algorithm
    k = None if isinstance(past, Tensor) else past.right.shape[0]
    return select_algorithm(b.shape[0], a.shape[1], a.shape[0], k, device_key(a.device))


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
    if like.device.type == "cpu" and not _is_traced() and (energy < 0).any():
        raise ValueError(f"{name} must not be negative, found {energy.min().item()}: it sums squares")


def _even_split(past: Tensor, name: str, a: Tensor, b: Tensor) -> LowRank:
    from .lowrank import split_evenly

    _matrix(name, past)
    _expect(name, past, (b.shape[0], a.shape[1]), a)
    if past.device.type != "meta" and not _is_traced() and not torch.isfinite(past).all():
        raise ValueError(f"{name} must be finite to be decomposed, found nan or inf in it")
    dtype = torch.float64 if torch.float64 in (past.dtype, a.dtype, b.dtype) else torch.float32
    return split_evenly(*torch.linalg.svd(past.double(), full_matrices=False), min(past.shape), dtype)


def _resolve(backend: str, operands: tuple) -> str:
    lora_As, _, _, rights, *_, codes = operands
    resolved = select_backend(backend, lora_As[0].device.type)
    if backend == "triton":
        for i, code in enumerate(codes):
            k = rights[i].shape[0] if rights[i].ndim == 2 else 0
            reason = None if ops.CODES[code] == ops.ABSENT else no_kernel(ops.CODES[code], lora_As[i].shape[0], k)
            if reason is not None:
                raise ValueError(f"layer {i}: {reason}; use backend='auto' or 'torch'")
    return resolved


def _is_traced() -> bool:
    """Whether operands may be stand-ins, without values or addresses to look at."""
    return torch.compiler.is_compiling() or repeats.is_intercepted()


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


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, found {value!r}")


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


def _are_constants(numbers: Sequence[float | Tensor]) -> bool:
    """Whether none of these is a Python number that a compiled caller may change from call to call."""
    if not torch.compiler.is_compiling():
        return True
    from torch.fx.experimental.symbolic_shapes import has_static_value

    return not isinstance(numbers, (list, tuple)) or all(
        not isinstance(number, (int, float)) or has_static_value(number) for number in numbers
    )


def _traced(numbers: Sequence[float], device: torch.device) -> Tensor:
    """``(n,)`` float64 of a compiled caller's numbers: a product is recorded where a conversion would be a constant."""
    return torch.stack([torch.ones((), dtype=torch.float64, device=device) * number for number in numbers])


def _finite(name: str, value: float) -> None:
    if not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, found {type(value).__name__}")
    if not _are_constants([value]):
        return
    try:
        is_finite = math.isfinite(value)
    except OverflowError:
        raise ValueError(f"{name} must fit a float, found a larger number") from None
    if not is_finite:
        raise ValueError(f"{name} must be finite, found {value}")


def _check_scaling(name: str, value: float) -> None:
    _finite(name, value)
    if abs(value) > _MAX_SCALING:
        raise ValueError(f"{name} must be at most {_MAX_SCALING:.1e} in size, found {float(value)}")
