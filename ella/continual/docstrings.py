"""Real text that every machine has: the docstrings of the Python standard library and of installed packages.

Each task is one library, each class one part of it (``asyncio``, ``email``, ... for the standard library), each
record the opening of one symbol's docstring. Sources are parsed with :mod:`ast`; nothing is imported or executed.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

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

_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "tests",
    "test",
    "testing_utils",
    "idle_test",
    "_vendor",
}
_MAX_CHARACTERS = 360
_MIN_CHARACTERS = 40
_MIN_TEXTS = 8  # of a class


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
    root = _package_root(package)
    n_classes = min(max_classes, len(candidates))
    wanted = -(-train_per_task // n_classes) + -(-test_per_task // n_classes)
    mask = _mask_pattern([label for label, _ in candidates])

    texts: dict[str, dict[str, str]] = {}  # class -> text -> symbol
    for label, patterns in candidates:
        if len(texts) == n_classes:
            break
        found = _collect(root, patterns, mask, max(2 * wanted, 2 * _MIN_TEXTS))
        if len(found) >= max(wanted // 2, _MIN_TEXTS):
            texts[label] = found
    if len(texts) < 2:
        raise TaskError(
            f"docstring area {area!r}: only {sorted(texts)} below {root} have enough docstrings; expected two classes"
        )
    counts: dict[str, int] = {}
    for found in texts.values():
        for text in found:
            counts[text] = counts.get(text, 0) + 1

    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    for i, (label, found) in enumerate(texts.items()):
        n_test, n_train = _share(test_per_task, len(texts), i), _share(train_per_task, len(texts), i)
        usable = sorted(
            ((s, t) for t, s in found.items() if counts[t] == 1),
            key=lambda pair: _rank(pair[0]),
        )
        # A class short of text gives up the same share of both splits.
        cut = min(n_test, round(len(usable) * n_test / max(n_test + n_train, 1)))
        splits["test"] += [{"sentence": text, "label": label} for _, text in usable[:cut]]
        splits["train"] += [{"sentence": text, "label": label} for _, text in usable[cut : cut + n_train]]
    return Task(
        name=area,
        train=tuple(splits["train"]),
        test=tuple(splits["test"]),
        labels=tuple(texts),
    )


def _share(total: int, parts: int, index: int) -> int:
    """The size of part ``index`` when ``total`` is spread evenly; the first parts take the remainder."""
    return total // parts + (index < total % parts)


def _package_root(package: str | None) -> Path:
    if package is None:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise TaskError(f"package {package!r} is not installed; leave its area out or install it")
    return Path(next(iter(spec.submodule_search_locations)))


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _collect(root: Path, patterns: Sequence[str], mask: re.Pattern[str], enough: int) -> dict[str, str]:
    """Up to about ``enough`` distinct texts below the patterns: ``{text: symbol}``, at most one per symbol."""
    files = {path for pattern in patterns for match in root.glob(pattern) for path in _python_files(match)}
    ordered = sorted(files, key=lambda path: _rank(path.relative_to(root).as_posix()))
    found: dict[str, str] = {}
    symbols: set[str] = set()
    for path in ordered:
        if len(found) >= enough:
            break
        module = ".".join(path.relative_to(root).with_suffix("").parts)
        # One large file must not be a whole class.
        for taken, (symbol, docstring) in enumerate(_docstrings(path)):
            if taken >= max(enough // 2, 8):
                break
            text = _opening(docstring, mask)
            name = f"{module}.{symbol}"
            if len(text) >= _MIN_CHARACTERS and name not in symbols and text not in found:
                symbols.add(name)
                found[text] = name
    return found


def _python_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        if path.suffix == ".py":
            yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(qualified symbol, docstring) of a file's classes and functions, outermost first; nothing if unparsable."""
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's sources
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    queue: list[tuple[ast.AST, str]] = [(tree, "")]
    for node, prefix in queue:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(child)
                if docstring:
                    yield prefix + child.name, docstring
                queue.append((child, f"{prefix}{child.name}."))


def _opening(docstring: str, mask: re.Pattern[str]) -> str:
    text = mask.sub("_", " ".join(docstring.split()))
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS].rsplit(" ", 1)[0]
    return text


def _mask_pattern(labels: Sequence[str]) -> re.Pattern[str]:
    """Identifiers that hold a class name; names under four letters only where they stand alone ("nn", "fx")."""
    parts = []
    for word in {word for label in labels for word in label.lower().split()}:
        stem = word[:-1] if len(word) > 4 and word.endswith("s") else word
        parts.append(rf"\w*{stem}\w*" if len(stem) >= 4 else rf"(?<![a-z0-9]){stem}(?![a-z0-9])")
    return re.compile("|".join(sorted(parts, key=len, reverse=True)), re.IGNORECASE)
