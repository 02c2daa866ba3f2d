"""torch.library registration, fakes and autograd: the only file that knows the dispatcher.

One op per model, not per layer: crossing the dispatcher costs tens of microseconds. Operands come as parallel lists,
absent ones as empty placeholders. The gradients are closed forms computed with the value, so autograd stores two
factor-sized tensors per layer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .grouped import Layer
from .prepared import Prepared, prepare

__all__ = ["add_penalty_grad_", "penalty", "prepare_group"]

ABSENT = "none"
# Ops take ints; this is their meaning. "spectral" is a penalty, not an algorithm, but takes the same road.
CODES = (ABSENT, "gram", "stream", "dense", "spectral")


def prepare_group(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    row_energies: Sequence[Tensor],
    col_energies: Sequence[Tensor],
    scalings: Sequence[float],
    codes: Sequence[int],
    grads_A: Sequence[Tensor],
    grads_B: Sequence[Tensor],
    backend: str,
    precision: str,
) -> Prepared:
    """The operands of an op up to its launches; empty ``grads_A``, ``grads_B`` where only values are wanted."""
    layers = [
        None
        if CODES[code] == ABSENT
        else Layer(
            lora_As[i],
            lora_Bs[i],
            lefts[i],
            rights[i] if rights[i].ndim == 2 else None,
            row_energies[i] if row_energies[i].numel() else None,
            col_energies[i] if col_energies[i].numel() else None,
            scalings[i],
            CODES[code],
            grads_A[i] if len(grads_A) else None,
            grads_B[i] if len(grads_B) else None,
        )
        for i, code in enumerate(codes)
    ]
    widest = next((t for t in (*lora_As, *lora_Bs) if t.dtype == torch.float64), lora_As[0])
    return prepare(layers, widest, backend, precision)


@torch.library.custom_op("ella_kernels::penalty", mutates_args=())
def penalty(
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    row_energies: list[Tensor],
    col_energies: list[Tensor],
    scalings: list[float],
    codes: list[int],
    with_grad: bool,
    backend: str,
    precision: str,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Values ``(n,)`` and, if wanted, their gradients in the factors' shapes, float32 or float64."""
    factors = (lora_As, lora_Bs) if with_grad else ([], [])
    grads_A, grads_B = ([torch.empty(t.shape, dtype=_grad_dtype(t), device=t.device) for t in ts] for ts in factors)
    if with_grad:
        # A launch for many tensors, not one for each; outputs of an op may not share one allocation.
        torch._foreach_zero_([*grads_A, *grads_B])
    prepared = prepare_group(
        lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, grads_A, grads_B,
        backend, precision,
    )  # fmt: skip
    return prepared.run(1.0), grads_A, grads_B


def _grad_dtype(factor: Tensor) -> torch.dtype:
    # Half factors keep fp32 gradients until λ has multiplied them: entries near 1e-8 underflow in fp16.
    return torch.float64 if factor.dtype == torch.float64 else torch.float32


@penalty.register_fake
def _(
    lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, with_grad, backend, precision
):  # fmt: skip
    operands = (*lora_As, *lora_Bs, *(t for t, c in zip((*lefts, *rights), (*codes, *codes), strict=True) if c))
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32
    values = torch.empty(len(lora_As), dtype=dtype, device=lora_As[0].device)
    if not with_grad:
        return values, [], []
    return values, *(
        [torch.empty(t.shape, dtype=_grad_dtype(t), device=t.device) for t in ts] for ts in (lora_As, lora_Bs)
    )


def _setup_context(ctx, inputs, output):
    lora_As, lora_Bs = inputs[:2]
    _, grads_A, grads_B = output
    ctx.n_layers = len(lora_As)
    # The factors are parameters and cost nothing to keep; a second differentiation is traced to them and refused.
    ctx.save_for_backward(*grads_A, *grads_B, *lora_As, *lora_Bs)
    ctx.mark_non_differentiable(*grads_A, *grads_B)
    ctx.set_materialize_grads(False)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity on a gradient, connected to its factor so that a second differentiation meets an error, not a zero."""

    @staticmethod
    def forward(ctx, grad: Tensor, factor: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "second-order derivatives of an ELLA penalty are not supported: its gradient is a closed form that "
            "autograd does not record; use ella_kernels.reference for double backward on small layers"
        )


def _backward(ctx, grad_values, _grads_A, _grads_B):
    n = ctx.n_layers
    result: list[Tensor | None] = [None] * (2 * n)
    if grad_values is not None:
        grads, factors = ctx.saved_tensors[: 2 * n], ctx.saved_tensors[2 * n :]
        scaled = torch._foreach_mul(grads, [*grad_values.unbind(), *grad_values.unbind()])
        for i, (grad, factor) in enumerate(zip(scaled, factors, strict=True)):
            wanted = grad.to(factor.dtype)
            result[i] = _FirstOrderOnly.apply(wanted, factor) if torch.is_grad_enabled() else wanted
    return result[:n], result[n:], *([None] * n for _ in range(4)), None, None, None, None, None


penalty.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("ella_kernels::add_penalty_grad_", mutates_args=("grads_A", "grads_B"))
def add_penalty_grad_(
    lora_As: list[Tensor],
    lora_Bs: list[Tensor],
    lefts: list[Tensor],
    rights: list[Tensor],
    row_energies: list[Tensor],
    col_energies: list[Tensor],
    scalings: list[float],
    codes: list[int],
    grads_A: list[Tensor],
    grads_B: list[Tensor],
    weight: Tensor | None,
    factor: float,
    backend: str,
    precision: str,
) -> Tensor:
    """Adds ``weight · ∂P`` (``factor · ∂P`` if no tensor is given) in place; returns the unweighted values ``(n,)``."""
    prepared = prepare_group(
        lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, grads_A, grads_B,
        backend, precision,
    )  # fmt: skip
    return prepared.run(factor if weight is None else weight)


@add_penalty_grad_.register_fake
def _(
    lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, grads_A, grads_B, weight, factor,
    backend, precision,
):  # fmt: skip
    return penalty._abstract_fn(
        lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, False, backend, precision
    )[0]
