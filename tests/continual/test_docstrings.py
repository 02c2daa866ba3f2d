"""Tasks made of docstrings: the same every time, splits apart, class names masked."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ella.continual import TaskError, docstring_tasks
from ella.continual.docstrings import AREAS


@pytest.fixture(scope="module")
def tasks():
    return docstring_tasks(train_per_task=48, test_per_task=24)


def test_areas_and_classes(tasks):
    assert [task.name for task in tasks] == ["python", "transformers", "torch", "numpy"]
    for task in tasks:
        candidates = [label for label, _ in AREAS[task.name][1]]
        # Candidates in order, those with too little text left out.
        assert list(task.labels) == [label for label in candidates if label in task.labels]
        assert 5 <= len(task.labels) <= 8


def test_sizes_and_balance(tasks):
    for task in tasks:
        assert 40 <= len(task.train) <= 48 and 20 <= len(task.test) <= 24, task.name
        for split in (task.train, task.test):
            counts = Counter(record["label"] for record in split)
            assert set(counts) == set(task.labels)
            assert max(counts.values()) <= 1 + -(-len(split) // len(task.labels))


def test_deterministic(tasks):
    again = docstring_tasks(["python", "numpy"], train_per_task=48, test_per_task=24)
    assert again == [tasks[0], tasks[3]]


def test_splits_are_disjoint(tasks):
    for task in tasks:
        texts = [record["sentence"] for record in (*task.train, *task.test)]
        assert len(set(texts)) == len(texts), task.name


def test_symbols_are_disjoint(monkeypatch):
    """Two docstrings of one symbol never stand on both sides."""
    import ella.continual.docstrings as module

    collected = []
    original = module._collect

    def spy(*arguments):
        found = original(*arguments)
        collected.append(found)
        return found

    monkeypatch.setattr(module, "_collect", spy)
    (task,) = docstring_tasks(["python"], train_per_task=48, test_per_task=24)
    symbol_of = {text: symbol for found in collected for text, symbol in found.items()}
    train, test = ({symbol_of[r["sentence"]] for r in split} for split in (task.train, task.test))
    assert train and test and not train & test


def test_labels_are_masked(tasks):
    for task in tasks:
        words = [word for label in task.labels for word in label.split()]
        for record in (*task.train, *task.test):
            for word in words:
                assert not re.search(rf"(?<![A-Za-z0-9]){word}(?![A-Za-z0-9])", record["sentence"], re.IGNORECASE), (
                    word,
                    record,
                )
    assert any("_" in record["sentence"].split() for record in tasks[0].train)


def test_texts_are_openings(tasks):
    for task in tasks:
        for record in task.train:
            assert 40 <= len(record["sentence"]) <= 360
            assert "\n" not in record["sentence"]


def test_small_sizes_are_kept_to():
    (task,) = docstring_tasks(["numpy"], train_per_task=7, test_per_task=3)
    assert len(task.train) == 7 and len(task.test) == 3
    (small,) = docstring_tasks(["python"], train_per_task=8, test_per_task=8)
    assert len(small.labels) == len(small.test) == 8


def test_fewer_classes():
    (task,) = docstring_tasks(["torch"], train_per_task=8, test_per_task=4, max_classes=2)
    assert task.labels == ("distributed", "fx")


def test_errors(monkeypatch):
    with pytest.raises(TaskError, match="unknown docstring area 'rust'; expected one of"):
        docstring_tasks(["rust"])
    monkeypatch.setitem(AREAS, "gone", ("no_such_package_here", AREAS["numpy"][1]))
    with pytest.raises(TaskError, match="package 'no_such_package_here' is not installed"):
        docstring_tasks(["gone"])
    monkeypatch.setitem(AREAS, "empty", ("numpy", (("a", ("nothing_here",)), ("lib", ("lib",)))))
    with pytest.raises(TaskError, match=r"only \['lib'\] below .* have enough docstrings; expected two classes"):
        docstring_tasks(["empty"], train_per_task=8, test_per_task=4)


def test_a_broken_source_file_is_passed_over(tmp_path, monkeypatch):
    import ella.continual.docstrings as module

    for part in ("one", "two"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "broken.py").write_text("def f(:\n")
        body = "".join(f'def f{i}():\n    r"""Text {i} of part {part}, {"long enough " * 4}"""\n\n' for i in range(20))
        (tmp_path / part / "whole.py").write_text(body)
    monkeypatch.setitem(AREAS, "own", ("own", (("first", ("one",)), ("second", ("two",)))))
    monkeypatch.setattr(module, "package_root", lambda package: tmp_path)
    (task,) = docstring_tasks(["own"], train_per_task=8, test_per_task=4)
    assert (len(task.train), len(task.test)) == (8, 4)
