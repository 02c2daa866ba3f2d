"""Real text that every machine has: the docstrings of the Python standard library and of installed packages.

Each task is one library, each class one part of it (``asyncio``, ``email``, ... for the standard library), each
record the opening of one symbol's docstring. Sources are parsed with :mod:`ast`; nothing is imported or executed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .sources import (
    MIN_CHARACTERS,
    MIN_TEXTS,
    docstrings,
    label_pattern,
    opening,
    package_root,
    parse,
    python_files,
    rank,
    read_source,
    split_task,
    texts_needed,
)
from .tasks import Task, TaskError

__all__ = ["AREAS", "docstring_tasks"]

#: task -> (package, or None for the standard library) and candidates (label, path patterns below its root).
#: The first ``max_classes`` candidates with enough docstrings become the classes.
AREAS: dict[str, tuple[str | None, tuple[tuple[str, tuple[str, ...]], ...]]] = {
    "python": (
        None,
        (
            ("asyncio", ("asyncio",)),
            ("email", ("email", "mailbox.py")),
            ("unittest", ("unittest",)),
            ("multiprocessing", ("multiprocessing",)),
            ("logging", ("logging",)),
            ("importlib", ("importlib",)),
            ("xml", ("xml", "xmlrpc")),
            ("decimal", ("_pydecimal.py", "fractions.py")),
            ("http", ("http", "urllib")),
            ("tkinter", ("tkinter",)),
        ),
    ),
    "transformers": (
        "transformers",
        (
            ("configuration", ("models/*/configuration_*.py",)),
            ("modeling", ("models/*/modeling_*.py",)),
            ("tokenization", ("models/*/tokenization_*.py",)),
            ("image processing", ("models/*/image_processing_*.py",)),
            ("generation", ("generation",)),
            ("integrations", ("integrations", "quantizers")),
            ("pipelines", ("pipelines",)),
            ("trainer", ("trainer*.py", "training_args*.py", "optimization.py")),
        ),
    ),
    "torch": (
        "torch",
        (
            ("distributed", ("distributed",)),
            ("fx", ("fx",)),
            ("nn", ("nn",)),
            ("distributions", ("distributions",)),
            ("onnx", ("onnx",)),
            ("cuda", ("cuda",)),
            ("utils", ("utils",)),
            ("export", ("export", "_export")),
            ("optim", ("optim",)),
        ),
    ),
    "numpy": (
        "numpy",
        (
            ("ma", ("ma",)),
            ("core", ("_core", "core")),
            ("lib", ("lib",)),
            ("polynomial", ("polynomial",)),
            ("testing", ("testing",)),
            ("linalg", ("linalg", "fft")),
        ),
    ),
}


def docstring_tasks(
    areas: Sequence[str] = ("python", "transformers", "torch", "numpy"),
    *,
    train_per_task: int = 480,
    test_per_task: int = 200,
    max_classes: int = 8,
) -> list[Task]:
    """Classification tasks from docstrings: the text is a docstring's opening, the label the module it documents.

    Deterministic for given package versions: files and symbols are ordered by a hash of their names, and the test
    split is the head of that order, so a symbol is in one split only. A text that occurs twice is dropped where its
    classes differ and kept once where they agree. Names of a task's classes are masked in all its texts.

    Args:
        areas: keys of :data:`AREAS`, in stream order.
        train_per_task: upper bound of a task's training records, spread evenly over its classes.
        test_per_task: likewise for test records.
        max_classes: at most this many classes per task.

    Raises:
        TaskError: an unknown area, a package that is not installed, or fewer than two classes with enough text.
    """
    return [_area_task(area, train_per_task, test_per_task, max_classes) for area in areas]


def _area_task(area: str, train_per_task: int, test_per_task: int, max_classes: int) -> Task:
    if area not in AREAS:
        raise TaskError(f"unknown docstring area {area!r}; expected one of {sorted(AREAS)}")
    package, candidates = AREAS[area]
    root = package_root(package)
    if root is None:
        raise TaskError(f"package {package!r} is not installed; leave its area out or install it")
    n_classes = min(max_classes, len(candidates))
    wanted = texts_needed(n_classes, train_per_task, test_per_task)
    mask = label_pattern([label for label, _ in candidates])

    texts: dict[str, dict[str, str]] = {}  # class -> text -> symbol
    for label, patterns in candidates:
        if len(texts) == n_classes:
            break
        found = _collect(root, patterns, mask, max(2 * wanted, 2 * MIN_TEXTS))
        if len(found) >= max(wanted // 2, MIN_TEXTS):
            texts[label] = found
    if len(texts) < 2:
        raise TaskError(
            f"docstring area {area!r}: only {sorted(texts)} below {root} have enough docstrings; expected two classes"
        )
    return split_task(area, texts, train_per_task, test_per_task)


def _collect(root: Path, patterns: Sequence[str], mask: re.Pattern[str], enough: int) -> dict[str, str]:
    """Up to about ``enough`` distinct texts below the patterns: ``{text: symbol}``, at most one per symbol."""
    files = {path for pattern in patterns for match in root.glob(pattern) for path in python_files(match)}
    ordered = sorted(files, key=lambda path: rank(path.relative_to(root).as_posix()))
    found: dict[str, str] = {}
    symbols: set[str] = set()
    for path in ordered:
        if len(found) >= enough:
            break
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        # One large file must not be a whole class.
        for taken, (symbol, docstring) in enumerate(docstrings(parse(read_source(path)))):
            if taken >= max(enough // 2, 8):
                break
            text = opening(docstring, mask)
            name = f"{module}.{symbol}"
            if len(text) >= MIN_CHARACTERS and name not in symbols and text not in found:
                symbols.add(name)
                found[text] = name
    return found
