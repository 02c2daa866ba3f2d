"""Texts out of installed Python sources: files found and parsed, nothing imported or executed; texts to tasks."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import os
import re
import sysconfig
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from .tasks import Record, Task

__all__ = [
    "MIN_CHARACTERS",
    "MIN_TEXTS",
    "docstrings",
    "label_pattern",
    "opening",
    "package_root",
    "parse",
    "python_files",
    "rank",
    "read_source",
    "split_task",
    "texts_needed",
]

MIN_CHARACTERS = 40
MIN_TEXTS = 8  # of a class
_MAX_CHARACTERS = 360
_SKIPPED_FOLDERS = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "tests",
    "test",
    "testing_utils",
    "idle_test",
    "_vendor",
}


def package_root(package: str | None) -> Path | None:
    """The folder of an installed package, or of the standard library for None; None if it is not installed."""
    if package is None:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def python_files(path: Path) -> Iterator[Path]:
    """The Python files at or below a path, tests and vendored packages left out."""
    if path.is_file():
        if path.suffix == ".py":
            yield path
        return
    for folder, subfolders, names in os.walk(path):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in names if name.endswith(".py"))


def rank(name: str) -> str:
    """What names are ordered by: the same on every machine, and unlike any order that the sources have."""
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def read_source(path: Path) -> bytes:
    """A file's bytes; none where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def parse(source: bytes) -> ast.Module:
    """The syntax tree; an empty one for a source that this Python cannot parse."""
    try:
        with warnings.catch_warnings():  # invalid escapes in other people's sources
            warnings.simplefilter("ignore")
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.Module(body=[], type_ignores=[])


def docstrings(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(qualified symbol, docstring) of a module's classes and functions, outermost first."""
    queue: list[tuple[ast.AST, str]] = [(tree, "")]
    for node, prefix in queue:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                docstring = ast.get_docstring(child)
                if docstring:
                    yield prefix + child.name, docstring
                queue.append((child, f"{prefix}{child.name}."))


def opening(text: str, mask: re.Pattern[str]) -> str:
    """The first words of a text on one line, what ``mask`` finds replaced by ``_``."""
    text = mask.sub("_", " ".join(text.split()))
    if len(text) > _MAX_CHARACTERS:
        text = text[:_MAX_CHARACTERS].rsplit(" ", 1)[0]
    return text


def label_pattern(labels: Sequence[str]) -> re.Pattern[str]:
    """Identifiers that hold a class name; names under four letters only where they stand alone ("nn", "fx")."""
    parts = []
    for word in {word for label in labels for word in label.lower().split()}:
        stem = word[:-1] if len(word) > 4 and word.endswith("s") else word
        parts.append(rf"\w*{stem}\w*" if len(stem) >= 4 else rf"(?<![a-z0-9]){stem}(?![a-z0-9])")
    return re.compile("|".join(sorted(parts, key=len, reverse=True)), re.IGNORECASE)


def texts_needed(n_classes: int, train: int, test: int) -> int:
    """Texts that a class of a task of these sizes takes, at most."""
    return -(-train // n_classes) + -(-test // n_classes)


def split_task(
    name: str,
    texts: Mapping[str, Mapping[str, str]],
    train: int,
    test: int,
    same: Callable[[str], str] = str,
) -> Task:
    """A class-balanced task of at most ``train`` and ``test`` records from ``{label: {text: origin}}``.

    The texts of a class are ordered by the rank of their origins and the test split is the head of that order, so an
    origin is in one split only. Texts of two classes are dropped where ``same`` maps them to one.
    """
    counts = Counter(key for found in texts.values() for key in {same(text) for text in found})
    splits: dict[str, list[Record]] = {"train": [], "test": []}
    for i, (label, found) in enumerate(texts.items()):
        n_test, n_train = _share(test, len(texts), i), _share(train, len(texts), i)
        usable = sorted(
            ((origin, text) for text, origin in found.items() if counts[same(text)] == 1),
            key=lambda pair: rank(pair[0]),
        )
        # A class short of text gives up the same share of both splits.
        cut = min(n_test, round(len(usable) * n_test / max(n_test + n_train, 1)))
        tested = {origin for origin, _ in usable[:cut]}
        rest = [text for origin, text in usable[cut:] if origin not in tested]
        splits["test"] += [{"sentence": text, "label": label} for _, text in usable[:cut]]
        splits["train"] += [{"sentence": text, "label": label} for text in rest[:n_train]]
    return Task(name=name, train=tuple(splits["train"]), test=tuple(splits["test"]), labels=tuple(texts))


def _share(total: int, parts: int, index: int) -> int:
    """The size of part ``index`` when ``total`` is spread evenly; the first parts take the remainder."""
    return total // parts + (index < total % parts)
