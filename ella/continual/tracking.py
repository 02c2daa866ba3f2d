"""Losses and scores sent to tensorboard, wandb, mlflow, ... as a run goes, by transformers' own callbacks.

Each integration reads its own settings (environment variables, log-ins) as it does under a Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["Tracker", "check_integrations"]


def check_integrations(report_to: Sequence[str]) -> None:
    """Raises ValueError for an integration that transformers does not know, ImportError for one not installed."""
    _callbacks(report_to)


def _callbacks(report_to: Sequence[str]) -> list[Any]:
    if not report_to:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [kind() for kind in get_reporting_integration_callbacks(list(report_to))]
    except RuntimeError as error:  # how transformers says that a package is missing
        raise ImportError(str(error)) from error


class Tracker:
    """One run under the name ``name``; what an integration writes to disk lies below ``folder``.

    The loss of a batch and the method's term of it go out every tenth step as "loss" and "penalty", the scores in
    percent after every task as "eval_<task>", and their mean as "eval_seen". A step counts from the stream's beginning.
    """

    def __init__(self, report_to: Sequence[str], folder: str | Path, name: str) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments

        self._report_to = list(report_to)
        self._callbacks = _callbacks(report_to)
        # On a CPU: the arguments prepare no device, which is the classifier's.
        self._arguments = TrainingArguments(str(folder), run_name=name, report_to=self._report_to, use_cpu=True)
        self._state, self._control = TrainerState(), TrainerControl()
        self._model: Any = None
        self._done = 0

    def begin(self, model: Any, steps: int) -> None:
        """Training begins, or goes on after ``steps``."""
        self._model, self._done, self._state.global_step = model, steps, steps
        self._call("on_train_begin")

    def step(self, step: int, loss: float, penalty: float) -> None:
        """Step ``step`` of the present task."""
        self._state.global_step = self._done + step
        self._call("on_log", logs={"loss": loss, "penalty": penalty})

    def end_task(self, steps: int) -> None:
        """The task took ``steps``."""
        self._done += steps
        self._state.global_step = self._done

    def scores(self, tasks: Sequence[str], row: Sequence[float]) -> None:
        """Scores on the first tasks; NaN where a method leaves one out."""
        measured = {f"eval_{name}": score for name, score in zip(tasks, row, strict=False) if not math.isnan(score)}
        mean = math.fsum(measured.values()) / max(len(measured), 1)
        self._call("on_log", logs=measured | {"eval_seen": mean})

    def close(self) -> None:
        """The run is over, finished or not."""
        if self._model is None:
            return
        self._call("on_train_end")
        if "wandb" in self._report_to:  # which goes on in the next run's name otherwise
            import wandb

            wandb.finish()

    def _call(self, event: str, **told: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self._arguments, self._state, self._control, model=self._model, **told)
