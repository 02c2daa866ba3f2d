"""What a model can do beside the tasks of a stream: benchmarks of lm-eval, before the stream and after it.

General ability, GA, is the mean change over the benchmarks (ΔGA of TRACE, Wang et al. 2023, arXiv:2310.06762, eq. 3).
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
import torch

from .checks import check_count
from .classifier import TextClassifier, evaluating

__all__ = ["General", "check_general", "general_ability"]

#: Metrics of lm-eval that are shares from 0 to 1, the one of a task that comes first here is its score.
SHARES = ("acc", "exact_match", "em", "f1", "prompt_level_strict_acc", "pass@1", "acc_norm", "score")


@dataclass(frozen=True)
class General:
    """``tasks`` are names of lm-eval's tasks and groups; ``limit`` examples of each are asked, None for all."""

    tasks: tuple[str, ...]
    limit: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the setting."""
        object.__setattr__(self, "tasks", tuple(self.tasks) if isinstance(self.tasks, (list, tuple)) else self.tasks)
        if not isinstance(self.tasks, tuple) or not self.tasks or not all(isinstance(t, str) and t for t in self.tasks):
            raise ValueError(f"general.tasks is {self.tasks!r}; expected names of lm-eval's tasks")
        if len(set(self.tasks)) != len(self.tasks):
            raise ValueError(f"general.tasks names a task more than once: {list(self.tasks)}")
        if self.limit is not None:
            check_count("general.limit", self.limit)

    def measure(self, classifier: TextClassifier, batch_size: int) -> dict[str, float]:
        """See :func:`general_ability`."""
        return general_ability(classifier.model, classifier.tokenizer, self.tasks, self.limit, batch_size=batch_size)


def check_general(general: General | None, kind: str | None = None) -> None:
    """Raises ImportError without lm-eval, ValueError for a ``kind`` of model that writes no text; nothing for None."""
    if general is None:
        return
    if kind == "encoder":
        raise ValueError("general ability is measured of models that write text, found an encoder; leave 'general' out")
    _lm_eval()


def general_ability(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    limit: int | None = None,
    *,
    batch_size: int = 8,
    **options: Any,
) -> dict[str, float]:
    """Scores of a live model on tasks or groups of lm-eval, in percent by name.

    A score is the first metric of :data:`SHARES` that the task has, of its first filter. The model is in eval mode
    meanwhile; it, the tokenizer and the random number generators are left as they were.

    Args:
        model: causal or seq2seq, with whatever adapters it has.
        tokenizer: the model's.
        tasks: names, as ``lm_eval --tasks`` takes them.
        limit: examples of each task, the first ones; None for all.
        batch_size: of the model's calls.
        options: of ``lm_eval.simple_evaluate``, e.g. ``num_fewshot``.

    Raises ImportError where lm-eval is missing, ValueError for a task without a score of its own or in other units.
    """
    lm_eval, wrapper = _lm_eval()
    quiet = {"bootstrap_iters": 0, "log_samples": False}
    with evaluating(model), _same_draws():
        # A copy: the wrapper sets what it pads with, and where.
        wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = lm_eval.simple_evaluate(model=wrapped, tasks=list(tasks), limit=limit, **{**quiet, **options})
    if found is None:
        raise ValueError("lm-eval gave no results in this process; measure general ability in one process")
    return {task: _percent(task, found["results"]) for task in tasks}


def _lm_eval() -> tuple[Any, Any]:
    """(the package, its wrapper of models)"""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError(
            f"general ability is measured by lm-eval, which cannot be imported ({error}); run: "
            "pip install 'ella-kernels[general]'"
        ) from error
    return lm_eval, HFLM


def _percent(task: str, results: Mapping[str, Mapping[str, Any]]) -> float:
    if task not in results:
        raise ValueError(f"lm-eval has no score of {task!r} itself, but of {sorted(results)}; name one of these")
    metrics = results[task]
    for share in SHARES:
        for key, value in metrics.items():
            # "acc,none", "exact_match,strict-match": metric and filter.
            if key.partition(",")[0] == share and isinstance(value, Real):
                return 100.0 * float(value)
    raise ValueError(f"lm-eval scores {task!r} by {sorted(metrics)}; expected one of the shares {list(SHARES)}")


@contextmanager
def _same_draws() -> Iterator[None]:
    """lm-eval seeds every generator: they go on from where they were."""
    drawn, drawn_by_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []):
            yield
    finally:
        random.setstate(drawn)
        np.random.set_state(drawn_by_numpy)
