"""The accuracy matrix of a stream and the numbers read from it.

``R[i][j]`` is the score on task ``j`` after training on task ``i`` (in percent here, any unit elsewhere).
OA, BWT: Chaudhry et al. 2018, Lopez-Paz and Ranzato 2017. FWT has two definitions in use, both offered under names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["AccuracyMatrix"]

NAN = float("nan")


@dataclass
class AccuracyMatrix:
    """Scores of a stream of T tasks; a cell not evaluated is NaN.

    ``rows[i][j]`` is R[i][j]; rows are appended with :meth:`add_row` as tasks finish.
    ``untrained[j]`` is the score of the model before any training; ``alone[j]`` that of a fresh model trained on
    task ``j`` only. Both are optional and only forward transfer reads them.

    >>> m = AccuracyMatrix(["a", "b"], rows=[[90.0, 20.0], [80.0, 70.0]], untrained=[10.0, 15.0], alone=[90.0, 60.0])
    >>> m.overall_accuracy(), m.backward_transfer()
    (75.0, -10.0)
    >>> m.forward_transfer_zero_shot(), m.forward_transfer_learning()
    (5.0, 10.0)
    """

    tasks: list[str]
    rows: list[list[float]] = field(default_factory=list)
    untrained: list[float] | None = None
    alone: list[float] | None = None

    def __post_init__(self) -> None:
        self.tasks = list(self.tasks)
        rows, self.rows = self.rows, []
        for row in rows:
            self.add_row(row)
        for name in ("untrained", "alone"):
            row = getattr(self, name)
            if row is not None:
                setattr(self, name, self._checked(row, name))

    def add_row(self, row: Sequence[float]) -> None:
        """Append the scores after the next task; ``row`` has one entry per task, NaN where not evaluated."""
        if len(self.rows) == len(self.tasks):
            raise ValueError(f"all {len(self.tasks)} tasks already have a row; nothing to add")
        self.rows.append(self._checked(row, f"row {len(self.rows)}"))

    def _checked(self, row: Sequence[float], name: str) -> list[float]:
        if len(row) != len(self.tasks):
            raise ValueError(f"{name} has {len(row)} entries; expected one per task, {len(self.tasks)}: {self.tasks}")
        return [NAN if value is None else float(value) for value in row]

    @property
    def complete(self) -> bool:
        """Whether every task has been trained on."""
        return len(self.rows) == len(self.tasks) > 0

    def _final(self) -> list[float]:
        if not self.complete:
            raise ValueError(f"{len(self.rows)} of {len(self.tasks)} tasks are finished; the metric needs all of them")
        return self.rows[-1]

    def overall_accuracy(self) -> float:
        """OA = mean_j R[T][j], over all tasks after the last."""
        return _mean(self._final())

    def backward_transfer(self) -> float:
        """BWT = mean_{j<T} (R[T][j] - R[j][j]); negative is forgetting. NaN for a single task."""
        final = self._final()
        return _mean([final[j] - self.rows[j][j] for j in range(len(final) - 1)])

    def forward_transfer_zero_shot(self) -> float:
        """FWT against the untrained model: mean_{j>1} (R[j-1][j] - untrained[j]) (Lopez-Paz and Ranzato 2017)."""
        self._final()
        if self.untrained is None:
            return NAN
        return _mean([self.rows[j - 1][j] - self.untrained[j] for j in range(1, len(self.tasks))])

    def forward_transfer_learning(self) -> float:
        """FWT against a fresh model on each task: mean_{j>1} (R[j][j] - alone[j]) (Wang et al. 2023)."""
        self._final()
        if self.alone is None:
            return NAN
        return _mean([self.rows[j][j] - self.alone[j] for j in range(1, len(self.tasks))])

    def curve(self, task: int) -> list[tuple[int, float]]:
        """``(i, R[i][task])`` for every evaluated row from the task's own on: its forgetting curve."""
        return [(i, row[task]) for i, row in enumerate(self.rows) if i >= task and not math.isnan(row[task])]

    def summary(self) -> dict[str, float]:
        """All metrics by name; NaN where what they need was not measured."""
        return {
            "OA": self.overall_accuracy(),
            "BWT": self.backward_transfer(),
            "FWT_zero_shot": self.forward_transfer_zero_shot(),
            "FWT_learning": self.forward_transfer_learning(),
        }

    def to_dict(self) -> dict:
        """Plain json: NaN becomes null."""
        return {
            "tasks": self.tasks,
            "rows": [_plain(row) for row in self.rows],
            "untrained": _plain(self.untrained),
            "alone": _plain(self.alone),
        }

    @classmethod
    def from_dict(cls, data: dict) -> AccuracyMatrix:
        """The inverse of :meth:`to_dict`."""
        return cls(data["tasks"], data["rows"], data.get("untrained"), data.get("alone"))


def _mean(values: Sequence[float]) -> float:
    # One unevaluated cell makes the mean unknown: NaN, never a mean over fewer tasks.
    return math.fsum(values) / len(values) if values else NAN


def _plain(row: Sequence[float] | None) -> list[float | None] | None:
    return None if row is None else [None if math.isnan(value) else value for value in row]
