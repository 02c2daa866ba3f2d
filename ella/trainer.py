"""ELLA inside any transformers or TRL trainer: one line, exact under accumulation, clipping and loss scaling.

Adding the penalty to the loss in ``compute_loss`` counts it once per micro-batch: at four accumulation steps it is four
times too strong. The callback writes ``p.grad`` at the start of an optimizer step instead, once, before the task's
gradients are accumulated on top, so that clipping and the scaler treat both alike.
"""

from __future__ import annotations

import torch
from transformers import Trainer, TrainerCallback

from .regularizer import EllaRegularizer

__all__ = ["EllaCallback", "attach"]


class EllaCallback(TrainerCallback):
    """Seeds the penalty's gradient once per optimizer step and logs ``ella_penalty`` beside ``loss``.

    Prefer :func:`attach`, which checks the trainer and puts the callback before the reporters, so that TensorBoard and
    others see the logged value.

    Args:
        regularizer: of the model that the trainer trains.
    """

    def __init__(self, regularizer: EllaRegularizer) -> None:
        self.regularizer = regularizer
        self._sum: torch.Tensor | None = None
        self._steps = 0

    def on_train_begin(self, args, state, control, **kwargs):
        refuse_unsupported(args)
        self._sum, self._steps = None, 0

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        # fp16: the task's gradients arrive multiplied by the scale and are divided by it before clipping.
        scaler = getattr(optimizer, "scaler", None)
        value = self.regularizer.add_gradient_(scaler.get_scale() if scaler is not None else 1.0)
        self._sum = value if self._sum is None else self._sum + value
        self._steps += 1

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs is None or "loss" not in logs or self._sum is None:
            return
        # The mean over the steps since the last log, as the loss is.
        mean = self._sum.item() / self._steps
        logs["ella_penalty"] = mean
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["ella_penalty"] = mean
        self._sum, self._steps = None, 0


def attach(trainer: Trainer, regularizer: EllaRegularizer) -> EllaCallback:
    """Make ``trainer`` train with the penalty; returns the callback that was added.

    Args:
        trainer: a transformers ``Trainer`` or one derived from it (TRL's are).
        regularizer: of the trainer's model.

    Raises:
        TypeError: not a trainer.
        ValueError: another model, a regularizer already attached, or an engine whose gradients are not on the
            parameters (DeepSpeed, FSDP), which this version does not support.
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "add_callback"):
        raise TypeError(f"trainer must be a transformers Trainer, found {type(trainer).__name__}")
    if not isinstance(regularizer, EllaRegularizer):
        raise TypeError(f"regularizer must be an EllaRegularizer, found {type(regularizer).__name__}")
    if trainer.model is not regularizer.model:
        raise ValueError("the regularizer belongs to another model than the trainer's; make it from trainer.model")
    if any(isinstance(callback, EllaCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this trainer already has an EllaCallback; a second one would double the penalty")
    refuse_unsupported(trainer.args)
    # An accelerate configuration file turns these on without a word in the arguments.
    for name, title in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            raise ValueError(f"{title} keeps gradients apart from the parameters, where the penalty would be lost")
    callback = EllaCallback(regularizer)
    trainer.add_callback(callback)
    # Reporters run in order and copy the log: ours goes first.
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
    return callback


def refuse_unsupported(args) -> None:
    """ValueError for engines that keep gradients elsewhere than in ``p.grad``, where the penalty would be lost."""
    for name, title in (("deepspeed", "DeepSpeed"), ("fsdp", "FSDP")):
        if getattr(args, name, None):
            raise ValueError(
                f"{title} keeps gradients apart from the parameters, where the penalty would be lost; this version "
                f"supports single-process and DDP training, found TrainingArguments.{name}={getattr(args, name)!r}"
            )
