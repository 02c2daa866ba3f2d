"""Losses and scores sent to tensorboard, wandb, mlflow, ... as a run goes, by transformers' own callbacks.

Each integration reads its own settings (environment variables, log-ins) as it does under a Trainer.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

__all__ = ["Tracker", "check_integrations", "make_stores"]

#: Integrations that have one run open in a process, and the package that keeps it.
_KEEPERS = {"wandb": "wandb", "mlflow": "mlflow", "dagshub": "mlflow"}


def check_integrations(report_to: Sequence[str]) -> None:
    """Raises ValueError for an integration that transformers does not know, ImportError for one not installed."""
    _callbacks(report_to)


def make_stores(report_to: Sequence[str]) -> None:
    """Make what processes that begin at once would get in each other's way making: MLflow's database and experiment.

    Raises OSError where MLflow cannot use the store.
    """
    if "mlflow" not in report_to:
        return
    import mlflow

    name = os.getenv("MLFLOW_EXPERIMENT_NAME")
    try:
        client = mlflow.MlflowClient()
        # Asking makes the database.
        if client.get_experiment_by_name(name or "Default") is None and name:
            client.create_experiment(name)
    except Exception as error:
        raise OSError(f"mlflow cannot use {mlflow.get_tracking_uri()}: {error}") from error


def _callbacks(report_to: Sequence[str]) -> list[Any]:
    if not report_to:
        return []
    from transformers.integrations import get_reporting_integration_callbacks

    try:
        return [kind() for kind in get_reporting_integration_callbacks(list(report_to))]
    except RuntimeError as error:  # how transformers says that a package is missing
        raise ImportError(str(error)) from error


class Tracker:
    """One run under the name ``name``; what TensorBoard is sent lies below ``folder``.

    The loss of a batch and the method's term of it go out every tenth step as "loss" and "penalty", the scores in
    percent after every task as "eval_<task>", and their mean as "eval_seen". A step counts from the stream's beginning.
    As a context, closed at its end. A run of W&B or MLflow that is open already is used and stays open.
    """

    def __init__(self, report_to: Sequence[str], folder: str | Path, name: str) -> None:
        from transformers import TrainerControl, TrainerState, TrainingArguments
        from transformers.integrations import TensorBoardCallback

        self._report_to = list(report_to)
        self._callbacks = _callbacks(report_to)
        for callback in self._callbacks:
            # One folder for all runs, by TENSORBOARD_LOGGING_DIR, would draw them as one line.
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir:
                callback.logging_dir = os.path.join(callback.logging_dir, name)
        # On a CPU: the arguments prepare no device, which is the classifier's.
        self._arguments = TrainingArguments(str(folder), run_name=name, report_to=self._report_to, use_cpu=True)
        self._state, self._control = TrainerState(), TrainerControl()
        self._model: Any = None
        self._done = 0
        self._others: dict[str, str | None] = {}

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close(failed=error is not None)

    def describe(self, settings: Mapping[str, Any]) -> None:
        """What is recorded of the run, beside its backbone's config; plain json. Before :meth:`begin`."""
        # Integrations record the arguments, of which a stream sets none: the defaults of a Trainer would stand there.
        vars(self._arguments)["to_dict"] = partial(dict, settings)

    def begin(self, model: Any, steps: int) -> None:
        """Training begins, or goes on after ``steps``."""
        keepers = {_KEEPERS[name] for name in self._report_to if name in _KEEPERS}
        self._others = {keeper: _open_run(keeper) for keeper in keepers}
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

    def close(self, failed: bool = False) -> None:
        """The run is over; ``failed``: by an error."""
        if self._model is None:
            return
        told = self._arguments, self._state, self._control
        # From the last to the first, and an error in one keeps none of the others open.
        with ExitStack() as ends:
            for keeper in self._others:
                ends.callback(self._end_run, keeper, failed)
            for callback in reversed(self._callbacks):
                # MLflow's would call a failed run finished, and end whatever is open when it is collected.
                if hasattr(callback, "_auto_end_run"):
                    callback._auto_end_run = False
                ends.callback(callback.on_train_end, *told, model=self._model)
        self._model = None

    def _end_run(self, keeper: str, failed: bool) -> None:
        """End what was begun here, in which the next run would go on."""
        if _open_run(keeper) in (None, self._others[keeper]):
            return
        if keeper == "wandb":
            import wandb

            wandb.finish(exit_code=int(failed))
        else:
            import mlflow

            mlflow.end_run("FAILED" if failed else "FINISHED")

    def _call(self, event: str, **told: Any) -> None:
        for callback in self._callbacks:
            getattr(callback, event)(self._arguments, self._state, self._control, model=self._model, **told)


def _open_run(keeper: str) -> str | None:
    """The run that is open in this process."""
    if keeper == "wandb":
        import wandb

        return wandb.run.id if wandb.run else None
    import mlflow

    run = mlflow.active_run()
    return run.info.run_id if run else None
