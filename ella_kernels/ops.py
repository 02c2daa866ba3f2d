"""torch.library registration, fakes and autograd: the only file that knows the dispatcher.

One op per model, not per layer: crossing the dispatcher costs tens of microseconds. Operands come as parallel lists,
absent ones as empty placeholders. The gradients are closed forms computed with the value, so autograd stores two
factor-sized tensors per layer and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import ABSENT
from .layer import Layer
from .prepared import Prepared, prepare
from .recognition import Memory, layout
from .tracing import has_tangents, is_forward_over, is_transformed

__all__ = [
    "SECOND_ORDER",
    "add_grads_",
    "add_penalty_grad_",
    "differentiable_values",
    "penalty",
    "values_and_grads",
]

SECOND_ORDER = (
    "ella_kernels: second-order derivatives of a penalty are not supported, its gradient is a closed form that is not "
    "differentiated; use ella_kernels.reference for them on small layers"
)
# Ops take ints; this is their meaning. "spectral" is a penalty, not an algorithm, but takes the same road.
CODES = (ABSENT, "gram", "stream", "dense", "spectral")


# What was made for the last few calls that arrived through the dispatcher.
_MEMORY = Memory()


def _lists(layers: Sequence[Layer]) -> tuple:
    """Operands as the ops take them, in parallel lists; one placeholder of three dimensions for all that is absent."""
    absent = layers[0].lora_A.new_empty(0, 0, 0)
    pasts = ([absent if t is None else t for t in column] for column in zip(*(x.past for x in layers), strict=True))
    return (
        [layer.lora_A for layer in layers],
        [layer.lora_B for layer in layers],
        *pasts,
        [layer.scaling for layer in layers],
        [CODES.index(layer.algorithm) for layer in layers],
    )


def _layers(lists: Sequence, grads_A: Sequence[Tensor], grads_B: Sequence[Tensor]) -> list[Layer]:
    """What :func:`_lists` was given, with targets where there are any."""
    lora_As, lora_Bs, *pasts, scalings, codes = lists
    return [
        Layer(
            lora_As[i],
            lora_Bs[i],
            *(column[i] if column[i].ndim < 3 else None for column in pasts),
            scalings[i],
            CODES[code],
            grads_A[i] if len(grads_A) else None,
            grads_B[i] if len(grads_B) else None,
        )
        for i, code in enumerate(codes)
    ]


def _run(lists: Sequence, grads_A: Sequence[Tensor], grads_B: Sequence[Tensor], weight, *options: str) -> Tensor:
    if options[0] == "torch":
        return prepare(_layers(lists, grads_A, grads_B), *options).run(weight)
    *operands, scalings, codes = lists
    read = [t for column in operands for t in column]
    found = layout([*grads_A, *grads_B], read, len(grads_A), tuple(scalings), tuple(codes), options)
    prepared: Prepared | None
    prepared, moved_by = _MEMORY.find(found)
    if prepared is None:
        prepared = prepare(_layers(lists, grads_A, grads_B), *options)
        if not prepared.holds_operands:
            _MEMORY.add(found, prepared)
    return prepared.run(weight, moved_by)


def _widest(lora_As, lora_Bs, pasts: Sequence[Sequence[Tensor]], codes: Sequence[int]) -> torch.dtype:
    """float64 as soon as an operand is: the dtype of the values."""
    read = (t for column in pasts for t, code in zip(column, codes, strict=True) if CODES[code] != ABSENT)
    is_wide = any(t.dtype == torch.float64 for t in (*lora_As, *lora_Bs, *read))
    return torch.float64 if is_wide else torch.float32


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
    lists = (lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes)
    return _run(lists, grads_A, grads_B, 1.0, backend, precision), grads_A, grads_B


def _grad_dtype(factor: Tensor) -> torch.dtype:
    # Half factors keep fp32 gradients until λ has multiplied them: entries near 1e-8 underflow in fp16.
    return torch.float64 if factor.dtype == torch.float64 else torch.float32


@penalty.register_fake
def _(
    lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, with_grad, backend, precision
):  # fmt: skip
    dtype = _widest(lora_As, lora_Bs, (lefts, rights, row_energies, col_energies), codes)
    values = torch.empty(len(lora_As), dtype=dtype, device=lora_As[0].device)
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


def differentiable_values(layers: Sequence[Layer], backend: str, precision: str) -> Tensor:
    """Values ``(n,)`` that know their derivatives.

    Raises:
        RuntimeError: when differentiated twice.
    """
    if is_transformed() and is_forward_over():
        raise RuntimeError(SECOND_ORDER)
    *operands, scalings, codes = _lists(layers)
    tensors = [t for column in operands for t in column]
    return _Penalty.apply((scalings, codes, True, backend, precision), *tensors)[0]


def values_and_grads(
    layers: Sequence[Layer], with_grad: bool, backend: str, precision: str
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """:func:`penalty` of checked layers."""
    return penalty(*_lists(layers), with_grad, backend, precision)


@torch.no_grad()
def add_grads_(layers: Sequence[Layer], weight: Tensor | float, backend: str, precision: str) -> Tensor:
    """:func:`add_penalty_grad_` of checked layers with targets."""
    targets = [layer.grad_A for layer in layers], [layer.grad_B for layer in layers]
    tensor, factor = (weight, 1.0) if isinstance(weight, Tensor) else (None, float(weight))
    return add_penalty_grad_(*_lists(layers), *targets, tensor, factor, backend, precision)


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
    lists = (lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes)
    return _run(lists, grads_A, grads_B, factor if weight is None else weight, backend, precision)


@add_penalty_grad_.register_fake
def _(
    lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, grads_A, grads_B, weight, factor,
    backend, precision,
):  # fmt: skip
    return penalty._abstract_fn(
        lora_As, lora_Bs, lefts, rights, row_energies, col_energies, scalings, codes, False, backend, precision
    )[0]
