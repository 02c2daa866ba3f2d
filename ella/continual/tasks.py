"""Tasks of a stream: records in, a checked :class:`Task` (texts to classify) or :class:`TextTask` (texts to write) out.

Their sources: the layouts of the O-LoRA benchmark and of TRACE on disk (:func:`read_task`, :func:`load_benchmark`), any
``datasets.Dataset`` or list of records (:meth:`Task.from_records`), and the code every Python installation
carries (:mod:`ella.continual.questions`, :mod:`ella.continual.docstrings`).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path
from typing import Any

from .checks import check_count
from .scores import METRICS

__all__ = [
    "ORDERS",
    "TRACE_METRICS",
    "AnyTask",
    "Record",
    "Task",
    "TaskError",
    "TextTask",
    "find_tasks",
    "load_benchmark",
    "read_task",
]

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
#: What TRACE scores its tasks by: names in :data:`ella.continual.scores.METRICS`.
TRACE_METRICS = {
    "C-STANCE": "exact",
    "FOMC": "exact",
    "MeetingBank": "rouge-l",
    "Py150": "edit",
    "ScienceQA": "choice",
    "NumGLUE-cm": "exact",
    "NumGLUE-ds": "exact",
    "20Minuten": "sari",
}
ANSWER_TOKENS = 256


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
        known = dict.fromkeys(self.labels)
        for split in ("train", "dev", "test"):
            records = getattr(self, split)
            if not records and split != "dev":
                raise TaskError(f"task {self.name!r} has an empty {split} split; expected at least one record")
            where = f"task {self.name!r}, {split}"
            _check_records(records, ("sentence", "label"), where)
            for i, record in enumerate(records):
                if record["label"] not in known:
                    raise TaskError(f"{where}[{i}]: label {record['label']!r} is not one of the labels {list(known)}")

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
            for label in labels:
                if not isinstance(label, str):
                    raise TaskError(
                        f"task {name!r}: label {label!r} is no text; expected the name of each class in order"
                    )
            names = list(labels)
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
        _check_limits(self.name, train, test)
        return replace(
            self,
            train=_balanced(self.train, self.labels, train, f"{self.name}/train/{seed}"),
            test=_balanced(self.test, self.labels, test, f"{self.name}/test/{seed}"),
        )

    def split_classes(self, parts: int) -> list[Task]:
        """``parts`` tasks of two classes or more: the classes are dealt to them in turn, each with all its records.

        They are called as this one and numbered from 1. Raises :class:`TaskError` for fewer than two classes a part.
        """
        check_count("parts", parts)
        if len(self.labels) < 2 * parts:
            found = f"task {self.name!r} has {len(self.labels)} classes"
            raise TaskError(f"{found}; expected at least {2 * parts} for {parts} tasks of two or more")

        def of(labels: tuple[str, ...], records: tuple[Record, ...]) -> tuple[Record, ...]:
            return tuple(record for record in records if record["label"] in labels)

        dealt = [self.labels[part::parts] for part in range(parts)]
        return [
            Task(f"{self.name} {part}", of(own, self.train), of(own, self.test), own, of(own, self.dev))
            for part, own in enumerate(dealt, 1)
        ]

    def fingerprint(self) -> str:
        """A hash of everything a run depends on: labels and all records of train and test, in order."""
        return _fingerprint([self.name, self.labels], ("sentence", "label"), self.train, self.test)


@dataclass(frozen=True)
class TextTask:
    """One task of a stream whose answers are free texts, written by a generator and scored by a metric.

    ``train``, ``dev`` and ``test`` hold records ``{"prompt": str, "answer": str}``; ``metric`` is a name in
    :data:`ella.continual.scores.METRICS`. At most ``answer_tokens`` tokens of an answer are learned and written.
    Immutable; :meth:`subset` makes a smaller one.

    Raises :class:`TaskError` when a split has a record without both keys, the metric is unknown, ``answer_tokens`` is
    not a positive integer, or ``train`` or ``test`` is empty.
    """

    name: str
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    metric: str
    dev: tuple[Record, ...] = field(default=())
    answer_tokens: int = ANSWER_TOKENS

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise TaskError(
                f"task {self.name!r} is scored by {self.metric!r}; expected a metric, one of {sorted(METRICS)}"
            )
        try:
            check_count("answer_tokens", self.answer_tokens)
        except ValueError as error:
            raise TaskError(f"task {self.name!r}: {error}") from None
        for split in ("train", "dev", "test"):
            records = getattr(self, split)
            if not records and split != "dev":
                raise TaskError(f"task {self.name!r} has an empty {split} split; expected at least one record")
            _check_records(records, ("prompt", "answer"), f"task {self.name!r}, {split}")
        if self.metric == "rouge-l" and not any(re.search("[a-zA-Z0-9]", record["answer"]) for record in self.test):
            raise TaskError(
                f"task {self.name!r} is scored by 'rouge-l', which compares words of a-z and 0-9, and no answer has "
                "one; take 'edit' or 'exact'"
            )

    def subset(self, train: int | None = None, test: int | None = None, seed: int = 0) -> TextTask:
        """At most ``train`` and ``test`` records, drawn by ``seed`` (same seed, same records)."""
        _check_limits(self.name, train, test)
        return replace(
            self,
            train=_sampled(self.train, train, f"{self.name}/train/{seed}"),
            test=_sampled(self.test, test, f"{self.name}/test/{seed}"),
        )

    def fingerprint(self) -> str:
        """A hash of everything a run depends on: metric, longest answer and all records of train and test, in order."""
        told = [self.name, self.metric, self.answer_tokens]
        return _fingerprint(told, ("prompt", "answer"), self.train, self.test)


#: What a stream is made of.
AnyTask = Task | TextTask


def read_task(folder: str | Path, metric: str | None = None) -> AnyTask:
    """Read one task folder of the O-LoRA benchmark or of TRACE; the folder's name is the task's.

    O-LoRA: ``{train,dev,test}.json`` with ``sentence`` and ``label``, and ``labels.json``; a :class:`Task`. TRACE:
    ``{train,eval,test}.json`` with ``prompt`` and ``answer``; a :class:`TextTask`, whose ``metric`` follows from the
    name for TRACE's own tasks. ``dev.json`` and ``eval.json`` may be missing. Raises :class:`TaskError` for a missing
    or unreadable file, a record without its two keys, a label that ``labels.json`` does not list, or no metric.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise TaskError(
            f"no task folder at {folder}; expected a folder with train.json, test.json and labels.json, or TRACE's "
            "train.json, eval.json and test.json"
        )
    if _is_trace(folder):
        return _read_text_task(folder, metric)
    labels = _read_json(folder / "labels.json")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise TaskError(f"{folder / 'labels.json'} holds {type(labels).__name__}; expected a list of label texts")
    splits = {}
    for split in ("train", "dev", "test"):
        path = folder / f"{split}.json"
        if split == "dev" and not path.exists():
            continue
        splits[split] = tuple(_convert(row, f"{path}, record {i}", labels) for i, row in enumerate(_read_list(path)))
    return Task(name=folder.name, labels=tuple(labels), **splits)


def _is_trace(folder: Path) -> bool:
    """Whether a task folder holds prompts and answers; one that lacks a file is known by the others."""
    if (folder / "labels.json").exists():
        return False
    if (folder / "eval.json").exists() or not (folder / "train.json").exists():
        return (folder / "eval.json").exists()
    records = _read_list(folder / "train.json")
    return bool(records) and isinstance(records[0], dict) and {"prompt", "answer"} <= records[0].keys()


def _read_text_task(folder: Path, metric: str | None) -> TextTask:
    metrics = {name.casefold(): known for name, known in TRACE_METRICS.items()}
    metric = metric or metrics.get(folder.name.casefold())
    if metric is None:
        raise TaskError(
            f"{folder} holds prompts and answers, and no metric is known for a task {folder.name!r}; expected one of "
            f"{sorted(TRACE_METRICS)}, or read_task(folder, metric=...)"
        )
    splits: dict[str, Any] = {}
    for split, name in (("train", "train"), ("dev", "eval"), ("test", "test")):
        path = folder / f"{name}.json"
        if split == "dev" and not path.exists():
            continue
        records = _read_list(path)
        _check_records(records, ("prompt", "answer"), str(path))
        splits[split] = tuple({key: record[key] for key in ("prompt", "answer")} for record in records)
    return TextTask(name=folder.name, metric=metric, **splits)


def find_tasks(directory: str | Path) -> dict[str, list[Path]]:
    """The task folders of a ``<task>`` or ``<group>/<task>`` tree by lower-case name.

    Raises :class:`TaskError` for no folder.
    """
    root = Path(directory)
    if not root.is_dir():
        raise TaskError(f"no benchmark folder at {root}; expected <group>/<task>/train.json below it")
    found: dict[str, list[Path]] = {}
    # A folder that lacks one of its files is found by the other, so that the missing one is named.
    patterns = [f"{depth}/{name}.json" for depth in ("*", "*/*") for name in ("train", "labels", "eval")]
    for folder in sorted({path.parent for pattern in patterns for path in root.glob(pattern)}):
        found.setdefault(folder.name.lower(), []).append(folder)
    return found


def load_benchmark(directory: str | Path, order: Sequence[str]) -> list[AnyTask]:
    """The tasks of ``order`` from a ``<group>/<task>`` tree, found by name (any case) in whatever group holds them.

    Each is read by :func:`read_task`.

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


def _read_list(path: Path) -> list[Any]:
    records = _read_json(path)
    if not isinstance(records, list):
        raise TaskError(f"{path} holds {type(records).__name__}; expected a list of records")
    return records


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


def _check_records(records: Sequence[Record], keys: tuple[str, str], where: str) -> None:
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not set(keys) <= record.keys():
            found = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise TaskError(f"{where}[{i}]: expected keys {keys[0]!r} and {keys[1]!r}, found {found}")
        for key in keys:
            if not isinstance(record[key], str):
                raise TaskError(f"{where}[{i}]: expected text in {key!r}, found {type(record[key]).__name__}")


def _check_limits(name: str, train: int | None, test: int | None) -> None:
    for what, limit in (("train", train), ("test", test)):
        if limit is not None and (not isinstance(limit, Integral) or isinstance(limit, bool) or limit < 1):
            raise TaskError(
                f"task {name!r}, {what}: a split of {limit!r} records was asked for; "
                "expected an integer of at least 1, or None for all"
            )


def _fingerprint(told: list[Any], keys: tuple[str, str], *splits: Sequence[Record]) -> str:
    digest = hashlib.sha256(json.dumps(told).encode())
    for split in splits:
        for record in split:
            digest.update(json.dumps([record[key] for key in keys]).encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def _draws(key: str) -> random.Random:
    # A seed of bytes is the same on every machine and under every PYTHONHASHSEED; a folder's name may not be UTF-8.
    return random.Random(key.encode("utf-8", "surrogatepass"))


def _sampled(records: Sequence[Record], limit: int | None, key: str) -> tuple[Record, ...]:
    return tuple(records) if limit is None or limit >= len(records) else tuple(_draws(key).sample(records, limit))


def _balanced(records: Sequence[Record], labels: Sequence[str], limit: int | None, key: str) -> tuple[Record, ...]:
    if limit is None or limit >= len(records):
        return tuple(records)
    rng = _draws(key)
    groups = {label: [record for record in records if record["label"] == label] for label in labels}
    for group in groups.values():
        rng.shuffle(group)
    depth = max(len(group) for group in groups.values())
    turns = [group[i] for i in range(depth) for group in groups.values() if i < len(group)]
    return tuple(turns[:limit])
