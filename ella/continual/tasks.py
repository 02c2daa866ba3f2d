"""Text classification tasks: records in, a checked :class:`Task` out.

Its sources: the O-LoRA benchmark layout on disk (:func:`read_task`, :func:`load_benchmark`), any
``datasets.Dataset`` or list of records (:meth:`Task.from_records`), and the code every Python installation
carries (:mod:`ella.continual.questions`, :mod:`ella.continual.docstrings`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

__all__ = ["ORDERS", "Record", "Task", "TaskError", "find_tasks", "load_benchmark", "read_task"]

Record = dict[str, str]

_ORDER_TEXT = {
    "standard-1": "dbpedia amazon yahoo agnews",
    "standard-2": "dbpedia amazon agnews yahoo",
    "standard-3": "yahoo amazon agnews dbpedia",
    "long-4": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "long-5": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "long-6": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    "trace-7": "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
}
#: Task orders of the literature, by folder name: orders 1 to 6 of O-LoRA (Wang et al. 2023, arXiv:2310.14152) and the
#: order of TRACE (Wang et al. 2023, arXiv:2310.06762).
ORDERS: dict[str, tuple[str, ...]] = {name: tuple(text.split()) for name, text in _ORDER_TEXT.items()}


class TaskError(ValueError):
    """A task that cannot be read: says which file or record, what was found and what was expected."""


@dataclass(frozen=True)
class Task:
    """One classification task of a stream.

    ``train``, ``dev`` and ``test`` hold records ``{"sentence": str, "label": str}``; every label is one of ``labels``,
    whose order is the class index. Immutable; :meth:`subset` makes a smaller one.

    Raises :class:`TaskError` when a split has a record without both keys, a label outside ``labels``, no labels at
    all, a repeated label, or when ``train`` or ``test`` is empty.
    """

    name: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    labels: tuple[str, ...]
    dev: tuple[Record, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.labels:
            raise TaskError(f"task {self.name!r} has no labels; expected a list of at least one label text")
        if len(set(self.labels)) != len(self.labels):
            repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
            raise TaskError(f"task {self.name!r} lists labels more than once: {repeated}")
        for split in ("train", "dev", "test"):
            records = getattr(self, split)
            if not records and split != "dev":
                raise TaskError(f"task {self.name!r} has an empty {split} split; expected at least one record")
            _check_records(records, self.labels, f"task {self.name!r}, {split}")

    @classmethod
    def from_records(
        cls,
        name: str,
        train: Iterable[Any],
        test: Iterable[Any],
        dev: Iterable[Any] = (),
        labels: Sequence[str] | None = None,
        *,
        sentence_column: str = "sentence",
        label_column: str = "label",
    ) -> Task:
        """A task from lists of dicts or ``datasets.Dataset`` objects.

        The integers of a split stand for the ``names`` of its own ``ClassLabel`` feature, else for ``labels``, else
        for the names of ``train``. Without ``labels`` the names of ``train`` are the labels, and without those the
        sorted texts found there. ``labels`` that hold the names in another order fix the order of the classes; ones
        that keep or replace each name in its place rename it.
        """
        given = {"train": train, "dev": dev, "test": test}
        own = {split: _class_names(rows, label_column) for split, rows in given.items()}
        names = own["train"]
        if labels is not None:
            names = [str(label) for label in labels]
            own = _renamed(own, names)
        splits = {
            split: tuple(
                _convert(
                    row,
                    f"task {name!r}, {split}[{i}]",
                    own[split] or names,
                    sentence_column,
                    label_column,
                    names,
                    None if own[split] else own["train"],
                )
                for i, row in enumerate(rows)
            )
            for split, rows in given.items()
        }
        if names is None:
            names = sorted({record["label"] for record in splits["train"]})
        return cls(name=name, labels=tuple(names), **splits)

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> Task:
        """At most ``train`` and ``test`` records, class-balanced, drawn by ``seed`` (same seed, same records)."""
        for what, limit in (("train", train), ("test", test)):
            if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
                raise TaskError(
                    f"task {self.name!r}, {what}: a split of {limit!r} records was asked for; "
                    "expected an integer of at least 1, or None for all"
                )
        return replace(
            self,
            train=_balanced(self.train, self.labels, train, f"{self.name}/train/{seed}"),
            test=_balanced(self.test, self.labels, test, f"{self.name}/test/{seed}"),
        )

    def fingerprint(self) -> str:
        """A hash of everything a run depends on: labels and all records of train and test, in order."""
        digest = hashlib.sha256(json.dumps([self.name, self.labels]).encode())
        for split in (self.train, self.test):
            for record in split:
                digest.update(json.dumps([record["sentence"], record["label"]]).encode())
            digest.update(b"|")
        return digest.hexdigest()[:16]


def read_task(folder: str | Path) -> Task:
    """Read ``{train,dev,test}.json`` and ``labels.json`` of one O-LoRA task folder; the folder's name is the task's.

    ``dev.json`` may be missing. Raises :class:`TaskError` for a missing or unreadable file, a record without
    ``sentence`` and ``label``, or a label that ``labels.json`` does not list.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(f"no task folder at {folder}; expected a folder with train.json, test.json and labels.json")
    labels = _read_json(folder / "labels.json")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TaskError(f"{folder / 'labels.json'} holds {type(labels).__name__}; expected a list of label texts")
    splits = {}
    for split in ("train", "dev", "test"):
        path = folder / f"{split}.json"
        if split == "dev" and not path.exists():
            continue
        records = _read_json(path)
        if not isinstance(records, list):
            raise TaskError(f"{path} holds {type(records).__name__}; expected a list of records")
        splits[split] = tuple(_convert(row, f"{path}, record {i}", labels) for i, row in enumerate(records))
    return Task(name=folder.name, labels=tuple(labels), **splits)


def find_tasks(directory: str | Path) -> dict[str, list[Path]]:
    """The task folders of a ``<group>/<task>`` tree by lower-case name. Raises :class:`TaskError` for no folder."""
    root = Path(directory)
    if not root.is_dir():
        raise TaskError(f"no benchmark folder at {root}; expected <group>/<task>/train.json below it")
    found: dict[str, list[Path]] = {}
    # A folder that lacks one of its files is found by the other, so that the missing one is named.
    patterns = ("*/train.json", "*/labels.json", "*/*/train.json", "*/*/labels.json")
    for folder in sorted({path.parent for pattern in patterns for path in root.glob(pattern)}):
        found.setdefault(folder.name.lower(), []).append(folder)
    return found


def load_benchmark(directory: str | Path, order: Sequence[str]) -> list[Task]:
    """The tasks of ``order`` from a ``<group>/<task>`` tree, found by name (any case) in whatever group holds them.

    Raises :class:`TaskError` naming the tasks there are when one is not found, and when two groups hold one name.
    """
    found = find_tasks(directory)
    tasks = []
    for name in order:
        folders = found.get(name.lower(), [])
        if not folders:
            raise TaskError(f"no task {name!r} below {directory}; found {sorted(found) or 'no task folders'}")
        if len(folders) > 1:
            raise TaskError(f"task {name!r} stands in {len(folders)} folders: {', '.join(map(str, folders))}")
        tasks.append(read_task(folders[0]))
    return tasks


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TaskError(f"missing file {path}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise TaskError(f"{path} is not readable as UTF-8 json: {error}") from error


def _class_names(rows: Any, label_column: str) -> list[str] | None:
    """The ``names`` of a data set's ``ClassLabel``, which its integers stand for; None where it has none."""
    features = getattr(rows, "features", None)
    names = getattr(features.get(label_column), "names", None) if features else None
    return None if names is None else list(names)


def _renamed(own: dict[str, list[str] | None], labels: Sequence[str]) -> dict[str, list[str] | None]:
    """Every split's names with ``labels`` in their place, where ``labels`` are other words for the first names."""
    first = next((names for names in own.values() if names), [])
    pairs = list(zip(first, labels, strict=False))
    # A name that stands elsewhere among the labels is that label: another order, not another word.
    if len(first) != len(labels) or not all(a == b or (a not in labels and b not in first) for a, b in pairs):
        return own
    new = dict(pairs)
    return {split: names and [new.get(name, name) for name in names] for split, names in own.items()}


def _convert(
    row: Any,
    where: str,
    names: Sequence[str] | None,
    sentence_column: str = "sentence",
    label_column: str = "label",
    labels: Sequence[str] | None = None,
    names_of_train: Sequence[str] | None = None,
) -> Record:
    try:
        sentence, label = row[sentence_column], row[label_column]
    except (KeyError, TypeError, IndexError):
        found = sorted(row) if isinstance(row, dict) else type(row).__name__
        raise TaskError(f"{where}: expected keys {sentence_column!r} and {label_column!r}, found {found}") from None
    if isinstance(label, int) and not isinstance(label, bool):
        if names is None:
            raise TaskError(f"{where}: label {label} is a number; pass labels=[...] to say what it stands for")
        if not 0 <= label < len(names):
            raise TaskError(f"{where}: label {label} is outside the {len(names)} labels {list(names)}")
        number, label = label, names[label]
        if names_of_train is not None and number < len(names_of_train) and names_of_train[number] != label:
            raise TaskError(
                f"{where}: label {number} is {label!r} by the labels {list(names)}, {names_of_train[number]!r} by the "
                f"names of train {list(names_of_train)}, and the split has no names of its own; give it texts as labels"
            )
        if labels is not None and label not in labels:
            raise TaskError(
                f"{where}: label {number} is {label!r} by the split's own names {list(names)}, which is not one of the "
                f"labels {list(labels)}; pass labels=[...] that hold the names of every split"
            )
    if not isinstance(sentence, str) or not isinstance(label, str):
        raise TaskError(
            f"{where}: expected text in {sentence_column!r} and {label_column!r}, "
            f"found {type(sentence).__name__} and {type(label).__name__}"
        )
    return {"sentence": sentence, "label": label}


def _check_records(records: Sequence[Record], labels: Sequence[str], where: str) -> None:
    known = set(labels)
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not {"sentence", "label"} <= record.keys():
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise TaskError(f"{where}[{i}]: expected keys 'sentence' and 'label', found {found}")
        for key in ("sentence", "label"):
            if not isinstance(record[key], str):
                raise TaskError(f"{where}[{i}]: expected text in {key!r}, found {type(record[key]).__name__}")
        if record["label"] not in known:
            raise TaskError(f"{where}[{i}]: label {record['label']!r} is not one of the labels {list(labels)}")


def _balanced(records: Sequence[Record], labels: Sequence[str], limit: int | None, key: str) -> tuple[Record, ...]:
    if limit is None or limit >= len(records):
        return tuple(records)
    # A seed of bytes is the same on every machine and under every PYTHONHASHSEED; a folder's name may not be UTF-8.
    rng = random.Random(key.encode("utf-8", "surrogatepass"))
    groups = {label: [record for record in records if record["label"] == label] for label in labels}
    for group in groups.values():
        rng.shuffle(group)
    depth = max(len(group) for group in groups.values())
    turns = [group[i] for i in range(depth) for group in groups.values() if i < len(group)]
    return tuple(turns[:limit])
