"""Experience replay: a few examples of every earlier task are trained on again in every step."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_count, check_number
from ..classifier import EncodedTask
from .base import Arm, Batch, task_seed

__all__ = ["Replay", "ReplaySettings", "balanced_rows"]


@dataclass(frozen=True)
class ReplaySettings:
    """``buffer`` examples are kept of a task, ``batch`` of all tasks' replayed in a step, weighted by ``strength``."""

    buffer: int = 50
    batch: int = 16
    strength: float = 1.0

    def __post_init__(self) -> None:
        check_count("buffer", self.buffer)
        check_count("batch", self.batch)
        check_number("strength", self.strength, least=0)


class Replay(Arm):
    """One adapter, with a batch of earlier examples in every step (experience replay, Chaudhry et al. 2019, arXiv
    1902.10486).

    From task 2 on ``strength`` times the mean loss of ``batch`` examples, drawn uniformly from the buffers of all
    earlier tasks, is added to the task's loss. The buffers are not saved: they are drawn again from the training
    records, by seed and task, as many of each class as there are. What is carried, the tokens and the class of every
    buffered example, grows with the tasks, and a step costs a forward more per task that the batch is of.

    Left out: the paper sees every example once and fills one buffer of fixed size as they come (reservoir, ring,
    k-means).
    """

    title = "replay"
    given = "earlier examples"
    Settings: ClassVar[type] = ReplaySettings

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.buffers: list[Batch] = []
        self._random = random.Random()

    def before_task(self, index: int) -> None:
        self._random.seed(task_seed(self.seed, index))

    def extra_gradient(self, index: int) -> Tensor | None:
        if index == 0:
            return None
        memory = [(j, row) for j, (_, rows) in enumerate(self.buffers) for row in rows]
        drawn = self._random.sample(memory, min(self.settings.batch, len(memory)))
        terms = []
        for j in sorted({j for j, _ in drawn}):
            rows = [row for of, row in drawn if of == j]
            term = self.settings.strength * len(rows) / len(drawn) * self.classifier.loss(self.buffers[j][0], rows)
            term.backward()
            terms.append(term.detach())
        return torch.stack(terms).sum()

    def after_task(self, index: int, name: str) -> None:
        task = self.train(index)
        self.buffers.append((task, balanced_rows(task, self.settings.buffer, task_seed(self.seed, index))))

    def restore(self, finished: list[str], tensors: Mapping[str, Tensor]) -> None:
        for index, name in enumerate(finished):
            self.after_task(index, name)

    def state_bytes(self) -> int:
        """A token, and a class, in four bytes."""
        return sum(4 * task.stored(row) for task, rows in self.buffers for row in rows)


def balanced_rows(task: EncodedTask, n: int, seed: int) -> list[int]:
    """``n`` rows of ``task`` (all where it has fewer), of its classes in turn while they last; the same for a seed."""
    rng = random.Random(seed)
    order = list(range(len(task)))
    rng.shuffle(order)
    classes: dict[int, list[int]] = {}
    for row in order:
        classes.setdefault(task.targets[row], []).append(row)
    return [row for turn in zip_longest(*classes.values()) for row in turn if row is not None][:n]
