"""ELLA inside any transformers or TRL trainer: one line, exact under accumulation, clipping and loss scaling.

Adding the penalty to the loss in ``compute_loss`` counts it once per micro-batch: at four accumulation steps it is four
times too strong. The callback writes ``p.grad`` at the start of an optimizer step instead, once, before the task's
gradients are accumulated on top, so that clipping and the scaler treat both alike.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from .acting import TASK
from .checkpoint import PAST_FILE, load_past, save_past
from .distributed import agreed_missing, spread_by, whole
from .knowledge import Marker
from .lora import EmbeddingLayer
from .regularizer import EllaRegularizer
from .zero import with_penalty

__all__ = ["EllaCallback", "attach"]

_FSDP1 = (
    "FSDP1's flat parameters hold no rows of a LoRA factor, so the penalty cannot be computed: use FSDP2 "
    "(fsdp_version 2 in accelerate, fsdp_config={'version': 2} in TrainingArguments)"
)


class EllaCallback(TrainerCallback):
    """Seeds the penalty's gradient once per optimizer step and logs ``ella_penalty`` beside ``loss``.

    Prefer :func:`attach`, which checks the trainer, lets it resume and load its best model with the past, and puts the
    callback before the reporters, so that TensorBoard and others see the logged value.

    Args:
        regularizer: of the model that the trainer trains.
    """

    def __init__(self, regularizer: EllaRegularizer) -> None:
        self.regularizer = regularizer
        self._sum: torch.Tensor | None = None
        self._steps = 0
        self._attached = False
        # DeepSpeed: the penalty goes through the loss, which only attach() can see to.
        self._through_loss = False
        self._seed: _Seed | None = None
        self._looks = 0
        # Finished when training began.
        self._tasks: list[str] | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        refuse_unsupported(args, self._through_loss)
        self._sum, self._steps = None, 0
        # The first steps in which there is a seed to lose are looked at; each look waits for the device.
        self._forget_seed()
        self._looks = 20
        tasks = list(self.regularizer.tasks)
        if self._tasks not in (None, tasks) and getattr(optimizer, "state", None):
            raise ValueError(
                f"this trainer's optimizer has the moments of an earlier task (finished then: {self._tasks}, now: "
                f"{tasks}): make a new trainer for every task, or set trainer.optimizer = trainer.lr_scheduler = None"
            )
        self._tasks = tasks
        if model is not None and model is not self.regularizer.model:
            raise ValueError(
                "the trainer trains another model than the regularizer's (model_init builds a new one for every run, "
                "say): make the EllaRegularizer from trainer.model, and pass the trainer a model, not model_init"
            )
        if not self._attached and getattr(args, "load_best_model_at_end", False) and self.regularizer.adapter == TASK:
            raise ValueError(
                "load_best_model_at_end loads the finished tasks in place of the current one unless the trainer knows "
                "of ELLA: use attach(trainer, regularizer) instead of passing EllaCallback"
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._forget_seed()

    def _forget_seed(self) -> None:
        """A step that was broken off leaves one."""
        if self._seed is not None:
            self._seed.close()
        self._seed = None

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if self._through_loss:
            return
        # fp16: the task's gradients arrive multiplied by the scale and are divided by it before clipping.
        scaler = getattr(optimizer, "scaler", None)
        value = self.regularizer.add_gradient_(scaler.get_scale() if scaler is not None else 1.0)
        if self._looks > 0:
            self._seed = _Seed.of(self.regularizer)
        self._note(value)

    def _note(self, value: Tensor) -> None:
        """The penalty of an optimizer step."""
        self._sum = value if self._sum is None else self._sum + value
        self._steps += 1

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # FSDP2 with sharded state dicts: nobody saves the adapters as PEFT does, and the state with them.
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if spread_by(self.regularizer.model, self.regularizer.layers) == "FSDP2" and agreed_missing(folder / PAST_FILE):
            self.regularizer.save_pretrained(folder)
        # A checkpoint of another run that this one, in its first task, has written over: what is left must not act.
        stale = None if self.regularizer.tasks else _state_folder(self.regularizer, folder)
        if stale is not None and state.is_world_process_zero:
            save_past(stale, self.regularizer.state())
            shutil.rmtree(folder / TASK, ignore_errors=True)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seed, self._seed = self._seed, None
        arrived = None if seed is None else seed.arrived()
        if arrived is False:
            raise RuntimeError(
                "the trainer dropped the penalty's gradient between the start of the optimizer step and the optimizer "
                "(zero_grad in training_step or compute_loss, say): zero gradients after optimizer.step() only, or "
                "call regularizer.add_gradient_() yourself after the last zero_grad"
            )
        self._looks = 0 if arrived else self._looks - 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs or self._sum is None:
            return
        # The mean over the steps since the last log, as the loss is.
        mean = self._sum.item() / self._steps
        logs["ella_penalty"] = mean
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["ella_penalty"] = mean
        self._sum, self._steps = None, 0


class _Seed:
    """A seeded gradient on its way to the optimizer: a trainer must not throw it away.

    One parameter is watched, that with the largest seed. Autograd adds the micro-batches' gradients to the seed; what
    arrives at the optimizer is their sum, clipped. Without the seed it is parallel to theirs alone.
    """

    def __init__(self, parameter: nn.Parameter, seed: Tensor) -> None:
        self.parameter = parameter
        self.seed = seed.detach().clone()
        self.task: list[Tensor] = []
        self._version = parameter._version
        self._hook = parameter.register_hook(self._add)

    @classmethod
    def of(cls, regularizer: EllaRegularizer) -> _Seed | None:
        """None where there is nothing to lose yet, or where other processes' gradients are averaged in."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return None
        parameters = [p for layer in regularizer.layers for p in layer.parameters() if p.numel()]
        seeded = [(p, p.grad) for p in parameters if p.grad is not None]
        largest = max(seeded, key=lambda pair: float(pair[1].float().norm()), default=None)
        return None if largest is None or not largest[1].any() else cls(*largest)

    def _add(self, grad: Tensor) -> None:
        self.task.append(grad.detach().clone())

    def close(self) -> None:
        """Look at no more gradients."""
        self._hook.remove()

    def arrived(self) -> bool | None:
        """Whether the seed is in the gradient; None where that cannot be told.

        It is too small beside the task's, a number is not finite, or an optimizer has stepped in the backward.
        """
        self.close()
        if self.parameter.grad is None:
            return None if self.parameter._version != self._version else False
        found, seed, *task = (t.double().flatten() for t in (self.parameter.grad, self.seed, *self.task))
        if not all(t.isfinite().all() for t in (found, seed, *task)):
            return None
        gap = _distance(_sum(task), _sum(task) + seed) if task else 2.0
        if gap < 100 * torch.finfo(self.seed.dtype).eps:
            return None
        # Thrown away before any of the micro-batches, with those before it.
        without = [_sum(task[i:]) for i in range(len(task))]
        return bool(found.any()) and all(_distance(found, rest) > 0.1 * gap for rest in without)


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.add, tensors)


def _distance(a: Tensor, b: Tensor) -> float:
    """Between the directions of ``a`` and ``b``; 2 where one has none."""
    sizes = a.norm(), b.norm()
    return float((a / sizes[0] - b / sizes[1]).norm()) if min(sizes) > 0 else 2.0


def attach(trainer: Trainer, regularizer: EllaRegularizer) -> EllaCallback:
    """Make ``trainer`` train with the penalty; returns the callback that was added.

    ``trainer.train(resume_from_checkpoint=...)`` restores the finished tasks from the checkpoint, in a fresh process
    too, and ``load_best_model_at_end`` loads the current task of the best checkpoint; every checkpoint has ELLA's state
    beside the adapter.

    Args:
        trainer: a transformers ``Trainer`` or one derived from it (TRL's are).
        regularizer: of the trainer's model.

    Raises:
        TypeError: not a trainer.
        ValueError: another model, a regularizer already attached, or FSDP1.

    DDP and FSDP2: the gradient is written to ``.grad`` at the start of an optimizer step. DeepSpeed: it goes through
    the loss of the last micro-batch (:func:`ella.with_penalty`).
    """
    if not hasattr(trainer, "callback_handler") or not hasattr(trainer, "add_callback"):
        raise TypeError(f"trainer must be a transformers Trainer, found {type(trainer).__name__}")
    if not isinstance(regularizer, EllaRegularizer):
        raise TypeError(f"regularizer must be an EllaRegularizer, found {type(regularizer).__name__}")
    if trainer.model is not regularizer.model:
        if isinstance(trainer.model, nn.Module) and any(m is regularizer.model for m in trainer.model.modules()):
            raise ValueError(
                f"the trainer's model, a {type(trainer.model).__name__}, wraps the regularizer's, and would be saved "
                "and loaded without what PEFT and ELLA write: give the trainer the PeftModel itself, or call "
                "regularizer.add_gradient_() from a callback's on_step_begin and save regularizer.model"
            )
        raise ValueError("the regularizer belongs to another model than the trainer's; make it from trainer.model")
    if getattr(trainer, "model_init", None) is not None:
        raise ValueError(
            "model_init builds a new model for every run, which the regularizer does not know; pass the trainer a model"
        )
    if any(isinstance(callback, EllaCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("this trainer already has an EllaCallback; a second one would double the penalty")
    # An accelerate configuration file turns engines on without a word in the arguments.
    through_loss = bool(trainer.args.deepspeed or getattr(trainer, "is_deepspeed_enabled", False))
    refuse_unsupported(trainer.args, through_loss)
    if getattr(trainer, "is_fsdp_enabled", False) and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise ValueError(_FSDP1)
    _complete_reference(regularizer, trainer)
    callback = EllaCallback(regularizer)
    callback._attached, callback._through_loss = True, through_loss
    trainer.add_callback(callback)
    # Reporters run in order and copy the log: ours goes first.
    callbacks = trainer.callback_handler.callbacks
    callbacks.insert(0, callbacks.pop(callbacks.index(callback)))
    # No callback is asked before a checkpoint's adapters are loaded, and the best model's are loaded into whatever
    # adapter is active: both need the past first, on this trainer.
    trainer._load_from_checkpoint = functools.partial(_load_checkpoint, trainer._load_from_checkpoint, regularizer)
    trainer._load_best_model = functools.partial(_load_best, trainer._load_best_model, regularizer, trainer)
    if through_loss or getattr(trainer, "is_fsdp_enabled", False):
        prepare = trainer._prepare_for_training
        trainer._prepare_for_training = functools.partial(_prepare, prepare, regularizer, trainer)
    if through_loss:
        trainer.compute_loss = functools.partial(_compute_loss, trainer.compute_loss, callback, trainer)
        trainer._save = functools.partial(_save, trainer._save, regularizer)
    return callback


def _compute_loss(
    compute: Any, callback: EllaCallback, trainer: Trainer, model: nn.Module, inputs: Any,
    return_outputs: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    found = compute(model, inputs, return_outputs=return_outputs, **kwargs)
    if not torch.is_grad_enabled() or trainer.model_wrapped is not model:
        return found
    loss, *outputs = found if return_outputs else (found,)
    callback.regularizer.__dict__["_engine"] = model
    loss, value = with_penalty(loss, callback.regularizer, model, trainer.accelerator.sync_gradients)
    if value is not None:
        callback._note(value)
    return (loss, *outputs) if return_outputs else loss


def _prepare(
    prepare: Any, regularizer: EllaRegularizer, trainer: Trainer, max_steps: int, loader: Any, checkpoint: str | None
) -> Any:
    if trainer.is_deepspeed_enabled:
        # The last task's engine would go on taking gradients off the parameters.
        engine = regularizer.__dict__.pop("_engine", None)
        if engine is not None and spread_by(regularizer.model, regularizer.layers) == "ZeRO-3":
            raise ValueError(
                "under ZeRO-3 a model is for one trainer: a second DeepSpeed engine does not follow the adapter of the "
                "finished tasks. Save after end_task (regularizer.save_pretrained(folder)) and go on with a fresh "
                "model: EllaRegularizer.from_pretrained(model, folder)"
            )
        if engine is not None:
            engine.destroy()
        if checkpoint is not None:
            # It is loaded into the parameters that the engine is made with: the past must be there before.
            _restore(regularizer, checkpoint)
    if trainer.is_fsdp_enabled and spread_by(regularizer.model, regularizer.layers) == "FSDP2":
        # A later task's trainer: accelerate looks for the blocks to wrap under names that fully_shard has changed.
        trainer.accelerator.state.fsdp_plugin.auto_wrap_policy = None
    return prepare(max_steps, loader, checkpoint)


def _save(save: Any, regularizer: EllaRegularizer, folder: str | None = None, state_dict: dict | None = None) -> None:
    """ZeRO-3 saves a PEFT model without frozen parameters: the finished tasks are gathered here, on every rank."""
    knowledge = regularizer.config.adapter_name
    if regularizer.adapter == TASK and spread_by(regularizer.model, regularizer.layers) == "ZeRO-3":
        held = {id(p) for layer in regularizer.layers for p in layer.all_parameters(knowledge)}
        for name, parameter in regularizer.model.named_parameters():
            if id(parameter) in held:
                found = whole(parameter).cpu()
                if state_dict is not None:  # the first rank's
                    state_dict[name] = found
    save(folder, state_dict=state_dict)


def _complete_reference(regularizer: EllaRegularizer, trainer: Trainer) -> None:
    """TRL copies parameters with ".default." in their names to "ref"; an embedding's factors have it at the end."""
    configs, knowledge = regularizer.model.peft_config, regularizer.config.adapter_name
    if regularizer.adapter != TASK or configs.get("ref") is not configs[knowledge]:
        return
    embeddings = [layer.name for layer in regularizer.layers if isinstance(layer, EmbeddingLayer)]
    if embeddings and getattr(trainer.args, "precompute_ref_log_probs", False):
        raise ValueError(
            "the trainer has scored its reference already, and its copy of the adapter leaves out the embedding "
            f"{embeddings[0]}: set precompute_ref_log_probs=False"
        )
    for layer in regularizer.layers:
        for held, copy in zip(layer.all_parameters(knowledge), layer.all_parameters("ref"), strict=True):
            copy.data.copy_(held.data)


def _load_checkpoint(load: Any, regularizer: EllaRegularizer, checkpoint: str, model: nn.Module | None = None) -> None:
    _restore(regularizer, checkpoint)
    load(checkpoint, model)
    if regularizer.config.keep_past == "merge":
        _silence_copies(regularizer)


def _silence_copies(regularizer: EllaRegularizer) -> None:
    """A copy of the knowledge (TRL's "ref") was loaded as the plain LoRA it is in its file: the base holds the past."""
    knowledge = regularizer.config.adapter_name
    for name, config in regularizer.model.peft_config.items():
        if name != knowledge and Marker.of(config) is not None:
            for layer in regularizer.layers:
                layer.module.set_scale(name, 0)


def _load_best(load: Any, regularizer: EllaRegularizer, trainer: Trainer) -> None:
    best = trainer.state.best_model_checkpoint
    place = _state_folder(regularizer, best)
    # Restoring compares them in a later task; in the first one it takes up whatever is there.
    if not regularizer.tasks and place is not None and (tasks := load_past(place).tasks):
        raise ValueError(
            f"the best checkpoint {best} has finished the tasks {tasks}, this run {regularizer.tasks}: it is another "
            "run's; train into an empty output_dir"
        )
    _restore(regularizer, best)
    if regularizer.adapter != TASK or getattr(trainer, "is_fsdp_enabled", False) or trainer.is_deepspeed_enabled:
        load()
        return
    regularizer.model.load_adapter(str(Path(best) / TASK), TASK, is_trainable=True)


def _restore(regularizer: EllaRegularizer, checkpoint: str) -> None:
    """Bring the regularizer's model to the past of a checkpoint."""
    folder, place = Path(checkpoint), _state_folder(regularizer, checkpoint)
    if place is not None:
        regularizer.restore(place)
    elif regularizer.tasks or (folder / TASK).is_dir():
        has = f"this model has finished {regularizer.tasks}" if regularizer.tasks else "it was saved in a later task"
        raise ValueError(
            f"{checkpoint} holds no state of ELLA, but {has}: resuming would mix tasks. Resume from a checkpoint that "
            "was written with the regularizer attached"
        )


def _state_folder(regularizer: EllaRegularizer, checkpoint: str | Path) -> Path | None:
    """Where a checkpoint has ELLA's state; None without one."""
    folders = Path(checkpoint), Path(checkpoint) / regularizer.config.adapter_name
    return next((folder for folder in folders if (folder / PAST_FILE).is_file()), None)


def refuse_unsupported(args: Any, through_loss: bool = False) -> None:
    """ValueError for engines in which the penalty would be lost; ``through_loss``: it is not written to ``.grad``."""
    if getattr(args, "deepspeed", None) and not through_loss:
        raise ValueError(
            "DeepSpeed keeps gradients apart from the parameters, where the callback's would be lost: use "
            "attach(trainer, regularizer) instead of passing EllaCallback"
        )
    if getattr(args, "fsdp", None):
        config = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
        if int(config.get("version", 2)) == 1 or config.get("xla"):
            raise ValueError(_FSDP1)
