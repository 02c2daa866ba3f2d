"""Continual-learning streams: tasks, the loop over them, its metrics and its report."""

from .docstrings import docstring_tasks
from .metrics import AccuracyMatrix
from .tasks import Task, TaskError, load_benchmark, read_task

__all__ = [
    "AccuracyMatrix",
    "Task",
    "TaskError",
    "docstring_tasks",
    "load_benchmark",
    "read_task",
]
