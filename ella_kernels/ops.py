"""torch.library registration, fakes and autograd: the only file that knows the dispatcher.

One op per model, not per layer: crossing the dispatcher costs tens of microseconds. Operands come as parallel lists,
absent ones as empty placeholders. The gradients are closed forms computed with the value, so autograd stores two
factor-sized tensors per layer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad

from .layer import Layer
from .prepared import Prepared, prepare

__all__ = [
    "SECOND_ORDER",
    "add_penalty_grad_",
    "differentiable_penalty",
    "has_tangents",
    "is_transformed",
    "penalty",
    "prepare_group",
]

ABSENT = "none"
SECOND_ORDER = (
    "ella_kernels: second-order derivatives of a penalty are not supported, its gradient is a closed form that is not "
    "differentiated; use ella_kernels.reference for them on small layers"
)
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
    like = _widest(lora_As, lora_Bs, (lefts, rights, row_energies, col_energies), codes)
    return prepare(layers, like, backend, precision)


def _widest(lora_As, lora_Bs, pasts: Sequence[Sequence[Tensor]], codes: Sequence[int]) -> Tensor:
    """A float64 operand, if there is one: the values are then float64."""
    read = (t for column in pasts for t, code in zip(column, codes, strict=True) if CODES[code] != ABSENT)
    return next((t for t in (*lora_As, *lora_Bs, *read) if t.dtype == torch.float64), lora_As[0])


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
    like = _widest(lora_As, lora_Bs, (lefts, rights, row_energies, col_energies), codes)
    values = torch.empty(len(lora_As), dtype=_grad_dtype(like), device=like.device)
    if not with_grad:
        return values, [], []
    return values, *(
        [torch.empty(t.shape, dtype=_grad_dtype(t), device=t.device) for t in ts] for ts in (lora_As, lora_Bs)
    )


def _save(ctx, factors: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
    ctx.dtypes = [t.dtype for t in factors]
    ctx.save_for_backward(*grads)
    ctx.set_materialize_grads(False)


def _scaled_gradients(ctx, grad_values: Tensor | None) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
    n = len(ctx.dtypes) // 2
    if grad_values is None:
        return [None] * n, [None] * n
    scales = [*grad_values.unbind(), *grad_values.unbind()]
    if torch._C._functorch.peek_interpreter_stack() is None:
        scaled: Sequence[Tensor] = torch._foreach_mul(ctx.saved_tensors, scales)
    else:
        scaled = [grad * scale for grad, scale in zip(ctx.saved_tensors, scales, strict=True)]
    scaled = [grad.to(dtype) for grad, dtype in zip(scaled, ctx.dtypes, strict=True)]
    return scaled[:n], scaled[n:]


def _setup_context(ctx, inputs, output):
    _, grads_A, grads_B = output
    ctx.mark_non_differentiable(*grads_A, *grads_B)
    _save(ctx, (*inputs[0], *inputs[1]), (*grads_A, *grads_B))


def _backward(ctx, grad_values, _grads_A, _grads_B):
    grads_A, grads_B = _scaled_gradients(ctx, grad_values)
    return grads_A, grads_B, *([None] * len(grads_A) for _ in range(4)), None, None, None, None, None


# What a compiler differentiates; other callers take the Function below.
penalty.register_autograd(_backward, setup_context=_setup_context)


class _Penalty(torch.autograd.Function):
    """The op with what its registration has no room for: forward mode, and refusals of what would be zero in silence.

    The gradients are outputs like the values. Whoever differentiates them backwards, in whatever factor and by whatever
    road, arrives here with a gradient of theirs.
    """

    @staticmethod
    def forward(options: tuple, *tensors: Tensor) -> tuple[Tensor, ...]:
        n = len(tensors) // 6
        values, grads_A, grads_B = penalty(*(list(tensors[i * n : (i + 1) * n]) for i in range(6)), *options)
        return values, *grads_A, *grads_B

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        _save(ctx, inputs[1 : len(output)], output[1:])
        ctx.save_for_forward(*output[1:])
        ctx.dtype, ctx.has_tangent = output[0].dtype, False

    @staticmethod
    def backward(ctx, grad_values: Tensor | None, *grads_of_grads: Tensor | None):
        # A gradient of what has a tangent has one too.
        if (ctx.has_tangent and has_tangents()) or any(grad is not None for grad in grads_of_grads):
            raise RuntimeError(SECOND_ORDER)
        grads_A, grads_B = _scaled_gradients(ctx, grad_values)
        return None, *grads_A, *grads_B, *([None] * (4 * len(grads_A)))

    @staticmethod
    def jvp(ctx, _options, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        n = len(ctx.dtypes) // 2
        if any(tangent is not None for tangent in tangents[2 * n :]):
            raise ValueError("ella_kernels: past must not have a tangent, it is frozen; pass it detached")
        ctx.has_tangent = True
        shares = [
            None if tangent is None else (grad.double() * tangent).sum()
            for grad, tangent in zip(ctx.saved_tensors, tangents[: 2 * n], strict=True)
        ]
        zero = ctx.saved_tensors[0].new_zeros((), dtype=torch.float64)
        values = [sum((share for share in shares[i::n] if share is not None), zero) for i in range(n)]
        # Not the gradients' tangents: nobody comes by those, but autograd wants some.
        return torch.stack(values).to(ctx.dtype), *map(torch.zeros_like, ctx.saved_tensors)

    @staticmethod
    def vmap(info, in_dims, *inputs):
        raise RuntimeError("ella_kernels: a penalty cannot be vmapped; give all layers to one grouped call")


def differentiable_penalty(
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    row_energies: Sequence[Tensor],
    col_energies: Sequence[Tensor],
    *options,
) -> Tensor:
    """Values of :func:`penalty` that know their derivatives: ``options`` are its other arguments.

    Raises:
        RuntimeError: when differentiated twice.
    """
    if is_transformed() and is_forward_over():
        raise RuntimeError(SECOND_ORDER)
    return _Penalty.apply(options, *lora_As, *lora_Bs, *lefts, *rights, *row_energies, *col_energies)[0]


def is_transformed() -> bool:
    """Whether ``torch.func`` or forward mode sees this call: a registered op they would differentiate to zero."""
    return torch._C._functorch.peek_interpreter_stack() is not None or has_tangents()


def has_tangents() -> bool:
    """Whether a level of forward mode is open, by ``torch.func.jvp`` or without it."""
    return forward_ad._current_level >= 0


def is_forward_over() -> bool:
    """Whether ``torch.func`` takes tangents of a derivative that it takes inside."""
    kinds = [interpreter.key() for interpreter in retrieve_all_functorch_interpreters()]
    inner = kinds[kinds.index(TransformType.Jvp) + 1 :] if TransformType.Jvp in kinds else []
    return TransformType.Grad in inner or TransformType.Jvp in inner


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
