"""DeepSpeed: the penalty's gradient on its way through the loss.

ZeRO takes gradients off the parameters as backward makes them, so that what is written to ``.grad`` is lost. Here it
enters backward itself, once per optimizer step: the gradient is computed when the last micro-batch's loss is known and
handed to autograd as if the loss depended on the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .distributed import gathered
from .regularizer import EllaRegularizer

__all__ = ["with_penalty"]


def with_penalty(
    loss: Tensor, regularizer: EllaRegularizer, engine: Any, is_last: bool | None = None
) -> tuple[Tensor, Tensor | None]:
    """``loss`` with the penalty's gradient behind it, for a DeepSpeed engine of any ZeRO stage; all ranks call it.

    Args:
        loss: of a micro-batch, before ``engine.backward`` (or ``accelerator.backward``); divided by the number of
            accumulated batches or not. Its value stays what it is.
        regularizer: of the model inside the engine.
        engine: the ``DeepSpeedEngine``.
        is_last: whether this is the last micro-batch of an optimizer step, the only one that is changed; by default
            what the engine says. With accelerate give ``accelerator.sync_gradients``.

    Returns:
        The loss to go on with, and ``λ · reduce(P)``, 0-dim, or None where nothing was added.

    Raises ValueError for an engine that was used before the last ``end_task``.

    Under reentrant gradient checkpointing a factor's gradient would arrive twice, which DeepSpeed refuses: use
    ``gradient_checkpointing_kwargs={"use_reentrant": False}``.
    """
    finished = tuple(regularizer.tasks)
    if engine.__dict__.setdefault("_ella_tasks", finished) != finished:
        raise ValueError(
            f"this DeepSpeed engine was made before the task {finished[-1]!r} ended and would write the old weights "
            "back over the fresh adapter: make a new engine (deepspeed.initialize, a new Trainer) for every task"
        )
    if not (engine.is_gradient_accumulation_boundary() if is_last is None else is_last):
        return loss, None
    with gathered(regularizer.spread_parameters()):
        value, parameters, gradients = regularizer.gradients()
        # fp16: the loss is multiplied by the scale on its way, and what arrives divided by it.
        scale = getattr(engine.optimizer, "loss_scale", 1.0)
        return _Through.apply(loss, [scale * g for g in gradients] if scale != 1 else gradients, *parameters), value


class _Through(torch.autograd.Function):
    """The identity of a loss, with fixed gradients for ``parameters``.

    Whatever the loss is multiplied by afterwards (an accumulation's share, say) is not for them.
    """

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *parameters: nn.Parameter) -> Tensor:
        ctx.gradients = gradients
        return loss.view_as(loss)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        return grad, None, *gradients
