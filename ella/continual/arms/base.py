"""What a method is to a stream: what it does before a task, in a step, and after a task."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, ClassVar

import torch
from torch import Tensor

from ella.config import EllaConfig
from ella.knowledge import parameters_of, past_of, trained_adapter
from ella.lora import adapted_layers
from ella.regularizer import EllaRegularizer

from ..classifier import EncodedTask, TextClassifier

__all__ = ["Arm", "Batch", "FoldingArm", "NoSettings", "task_seed"]

#: Rows of a task: one training step.
Batch = tuple[EncodedTask, list[int]]


@dataclass(frozen=True)
class NoSettings:
    """A method without settings of its own."""


def task_seed(seed: int, index: int) -> int:
    """The seed of task ``index``: a 63-bit hash of the pair, the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Arm:
    """One LoRA adapter trained on through all tasks, and the base of all methods.

    The model, tasks, batches and seeds of a stream are the same for all of them. A subclass says in its docstring which
    paper and equations it is of and what it leaves out.

    Args:
        classifier: its model has one LoRA adapter, initialised by :meth:`before_task`.
        seed: of the run.
        settings: a ``Settings`` of the class.
        ella: of the run; :attr:`ella_fields` names what of it the method reads.
        train: the encoded training records of task i. A method without replay asks for those of the current task only.

    Attributes:
        regularizer: the past that the method keeps, saved by the stream; None without one.
    """

    #: What people call it, in tables and curves.
    title: ClassVar[str] = ""
    #: What it is given that a continual stream does not have: "task ids", "earlier examples", or nothing.
    given: ClassVar[str] = ""
    #: Whether its first task is plain LoRA, which is then trained once for all such methods.
    begins_plain: ClassVar[bool] = True
    ella_fields: ClassVar[tuple[str, ...]] = ()
    Settings: ClassVar[type] = NoSettings

    def __init__(
        self,
        classifier: TextClassifier,
        seed: int,
        settings: Any,
        ella: EllaConfig,
        train: Callable[[int], EncodedTask],
    ) -> None:
        self.classifier, self.seed, self.settings, self.ella, self.train = classifier, seed, settings, ella, train
        self.regularizer: EllaRegularizer | None = None
        self.n_tasks = 1  # of the stream

    def begin(self) -> None:
        """A new run: nothing has been learned. The adapter of the first task is initialised here."""
        self.fresh_adapter(0)

    def resume(self, finished: list[str], regularizer: EllaRegularizer | None, tensors: Mapping[str, Tensor]) -> None:
        """A saved run after its tasks ``finished``; the adapter's weights are restored after this."""
        self.regularizer = regularizer
        self.restore(finished, tensors)

    def before_task(self, index: int) -> None:
        """Make ready what is trained. What a task starts from follows from (seed, index) and what was saved."""

    def batches(self, index: int, batch_size: int, seed: int) -> list[Batch]:
        """The steps of one epoch of task ``index``."""
        task = self.train(index)
        return [(task, rows) for rows in task.batches(batch_size, seed)]

    def extra_gradient(self, index: int) -> Tensor | None:
        """Add to ``.grad``, after the task's gradient and before clipping; returns the term of the loss, 0-dim."""
        return None

    def interference(self, index: int) -> dict[str, float] | None:
        """``‖ΔW ⊙ W_past‖_F²`` of the trained task by layer, before :meth:`after_task`; None without a past."""
        return None

    def after_task(self, index: int, name: str) -> None:
        """The task is trained: keep what the next ones need."""

    def evaluated(self, index: int, n_tasks: int, everything: bool) -> set[int]:
        """The tasks to be scored after task ``index``: those seen and the next, or all."""
        return set(range(n_tasks if everything else min(index + 2, n_tasks)))

    def keeps_scores(self) -> bool:
        """Whether earlier tasks are scored by models of their own, so that their scores stay."""
        return False

    # --- what it carries from task to task ---------------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """What is saved beside the adapter and the past, by name."""
        return {}

    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`tensors`."""

    def state_bytes(self) -> int:
        """Bytes carried from task to task beside the base model and the adapter in training."""
        past = past_of(self.model, self.classifier.adapter_name)
        layers = adapted_layers(self.model, self.adapter) if past else []
        held = [*parameters_of(layers, self.classifier.adapter_name), *self.tensors().values()]
        return sum(t.numel() * t.element_size() for t in held)

    # --- for subclasses ----------------------------------------------------------------------------------------------

    @property
    def model(self) -> Any:
        return self.classifier.model

    @property
    def adapter(self) -> str:
        """The adapter in training."""
        return trained_adapter(self.model, self.classifier.adapter_name)

    def fresh_adapter(self, index: int) -> None:
        """Initialise the trained adapter (A random, B zero) from (seed, index)."""
        torch.manual_seed(task_seed(self.seed, index))
        for layer in adapted_layers(self.model, self.adapter):
            layer.reset(True)

    def sample(self, index: int, count: int, size: int) -> list[Batch]:
        """At most ``count`` batches of ``size`` training records of task ``index``."""
        task = self.train(index)
        return [(task, rows) for rows in islice(task.batches(size, task_seed(self.seed, index)), count)]

    def dense_bytes(self) -> tuple[int, int]:
        """(bytes, layers) of a float32 (out, in) past of every layer the adapter is on."""
        layers = adapted_layers(self.model, self.classifier.adapter_name)
        return sum(4 * layer.n_parts * math.prod(layer.shape) for layer in layers), len(layers)

    @classmethod
    def check(cls, ella: EllaConfig) -> None:
        """Raises ValueError for what the method cannot run with."""

    @classmethod
    def identity(cls, settings: Any, ella: EllaConfig) -> dict[str, Any]:
        """What the method's numbers depend on: a run continues under another λ if its method has none."""
        values = ella.to_dict()
        return {"settings": asdict(settings), "ella": {name: values[name] for name in cls.ella_fields}}


class FoldingArm(Arm):
    """A fresh adapter per task, folded at its end into the past that acts on in the forward."""

    ella_fields: ClassVar[tuple[str, ...]] = ("past_rank", "keep_past")

    @classmethod
    def check(cls, ella: EllaConfig) -> None:
        if ella.keep_past == "external":
            raise ValueError(
                "keep_past is 'external', which leaves the adapter's merge into the model to its user: a stream scores "
                "the model after every task; expected 'adapter' or 'merge'"
            )

    def begin(self) -> None:
        super().begin()
        self.regularizer = EllaRegularizer(self.model, self.ella)

    def before_task(self, index: int) -> None:
        if index > 0:
            self.fresh_adapter(index)

    def interference(self, index: int) -> dict[str, float] | None:
        return self.past.values()

    def after_task(self, index: int, name: str) -> None:
        self.past.end_task(name)

    @property
    def past(self) -> EllaRegularizer:
        assert self.regularizer is not None, "begin() or resume() comes first"
        return self.regularizer
