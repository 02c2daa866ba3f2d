"""The public functions: check, normalise, choose, call.

All take LoRA factors as PEFT stores them, ``lora_A (r, in)`` and ``lora_B (out, r)``, in float32, float64, bfloat16 or
float16; arithmetic and results are float32, or float64 as soon as one operand is float64, also inside ``autocast``.
Source of the penalty: Das Biswas et al., EACL 2026, arXiv 2601.02232; formulas and letters: docs/math.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .checks import Past, check_options, checked_layers, one_of, resolve_backend
from .dispatch import ALGORITHMS
from .plan import Plan
from .recognition import Memory
from .tracing import are_constants, has_tangents, is_transformed, recorded

__all__ = [
    "add_hadamard_grad_",
    "add_spectral_grad_",
    "hadamard_penalty",
    "hadamard_penalty_grouped",
    "spectral_penalty",
    "spectral_penalty_grouped",
]

# Every call of the in-place functions shares it.
_MEMORY = Memory()


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
            or "auto", each from up to three tf32 or bf16 products on NVIDIA (relative error 1e-5, up to 5e-3 where
            terms cancel 4e5-fold) and exact fp32 elsewhere. torch follows its own settings.

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

    >>> from ella_kernels import LowRank
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
    one_of("algorithm", algorithm, ALGORITHMS)
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
    plan = Plan(algorithm=algorithm, backend=backend, precision=precision, memory=_MEMORY)
    return plan.add_grad_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight=weight)


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
    plan = Plan("spectral", backend=backend, precision=precision, memory=_MEMORY)
    return plan.add_grad_(lora_As, lora_Bs, pasts, scalings, grads_A, grads_B, weight=weight)


def _penalties(lora_As, lora_Bs, pasts, scalings, algorithm, backend, precision) -> Tensor:
    check_options(backend, precision)
    if not are_constants(scalings):
        # An op's numbers are compiled into the graph, once for each: these are multiplied in outside it.
        plain = _penalties(lora_As, lora_Bs, pasts, [1.0] * len(scalings), algorithm, backend, precision)
        return (plain.double() * recorded(scalings, plain.device).square()).to(plain.dtype)
    layers = checked_layers(lora_As, lora_Bs, pasts, scalings, algorithm)
    if not layers:
        return torch.zeros(0)
    backend = resolve_backend(backend, layers)
    with_grad = torch.is_grad_enabled() and any(x.lora_A.requires_grad or x.lora_B.requires_grad for x in layers)
    if torch.compiler.is_compiling():
        if has_tangents():
            raise RuntimeError(
                "ella_kernels: forward-mode derivatives of a penalty are not compiled; take them outside"
            )
    elif with_grad or is_transformed():
        return ops.differentiable_values(layers, backend, precision)
    return ops.values_and_grads(layers, with_grad, backend, precision)[0]
