"""LoRA without any method, and the bounds: what forgetting is measured from, and what could be had at best."""

from __future__ import annotations

import random

from .base import Arm, Batch, FoldingArm

__all__ = ["IncLora", "Joint", "Separate", "SeqLora"]


class SeqLora(Arm):
    """SeqLoRA: one LoRA adapter trained on through all tasks."""

    title = "SeqLoRA"


class IncLora(FoldingArm):
    """IncLoRA: a fresh adapter per task, the earlier ones kept as they were (the baseline of Wang et al. 2023)."""

    title = "IncLoRA"


class Separate(Arm):
    """An adapter per task, chosen by the task's name: no forgetting and no transfer, and a reference of both."""

    title = "an adapter per task"
    given = "task ids"

    def before_task(self, index: int) -> None:
        if index > 0:
            self.fresh_adapter(index)

    def evaluated(self, index: int, n_tasks: int, everything: bool) -> set[int]:
        return {index}

    def keeps_scores(self) -> bool:
        return True


class Joint(Arm):
    """One adapter trained on all tasks at once, its batches in one shuffled order: what a stream is compared with.

    Nothing is trained before the last task's turn, so there is a score for the end of the stream only.
    """

    title = "joint training"
    given = "earlier examples"
    begins_plain = False

    def batches(self, index: int, batch_size: int, seed: int) -> list[Batch]:
        if index < self.n_tasks - 1:
            return []
        tasks = [self.train(i) for i in range(self.n_tasks)]
        mixed = [(task, rows) for i, task in enumerate(tasks) for rows in task.batches(batch_size, seed + i)]
        random.Random(seed).shuffle(mixed)
        return mixed

    def evaluated(self, index: int, n_tasks: int, everything: bool) -> set[int]:
        return set(range(n_tasks)) if index == n_tasks - 1 else set()
