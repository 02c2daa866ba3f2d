"""Continual-learning streams: tasks, the loop over them, its metrics and its report."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .docstrings import docstring_tasks
from .metrics import AccuracyMatrix
from .questions import question_tasks
from .tasks import Task, TaskError, TextTask, load_benchmark, read_task

# What needs a model loads on first use: reading tasks imports neither PEFT nor transformers.
_HOME = {
    "EncoderClassifier": "models",
    "LabelGenerator": "generators",
    "LoraSettings": "models",
    "StreamConfig": "stream",
    "StreamResult": "stream",
    "General": "general",
    "build_classifier": "models",
    "compare_arms": "compare",
    "general_ability": "general",
    "run_stream": "stream",
}

__all__ = [
    "AccuracyMatrix",
    "EncoderClassifier",
    "General",
    "LabelGenerator",
    "LoraSettings",
    "StreamConfig",
    "StreamResult",
    "Task",
    "TaskError",
    "TextTask",
    "build_classifier",
    "compare_arms",
    "docstring_tasks",
    "general_ability",
    "load_benchmark",
    "question_tasks",
    "read_task",
    "run_stream",
]

if TYPE_CHECKING:
    from .compare import compare_arms
    from .general import General, general_ability
    from .generators import LabelGenerator
    from .models import EncoderClassifier, LoraSettings, build_classifier
    from .stream import StreamConfig, StreamResult, run_stream


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ella.continual' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
