"""Questions about installed code: what is found in sources, what is masked, how splits are kept apart."""

from __future__ import annotations

from collections import Counter

import pytest

import ella.continual.questions as module
from ella.continual import TaskError, question_tasks
from ella.continual.questions import LIBRARIES, QUESTIONS, Source
from ella.continual.sections import sections, summary

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "heath", "islet", "joker", "kayak", "lemon"]


def words(i: int) -> str:
    """Twelve words, different ones for every i below 12**3."""
    return " ".join(WORDS[i // 12**k % 12] for k in range(3)) + " and something more that is long enough"


def read(name: str, text: str, library: str = "torch") -> list[tuple[str, str]]:
    return list(QUESTIONS[name].read(Source(library, "file.py", text.encode())))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Two small libraries; every file has two docstrings and errors of two kinds."""
    for start, library in ((0, "torch"), (500, "sympy")):
        (tmp_path / library).mkdir()
        for i in range(start, start + 20):
            body = "".join(
                f'def f{j}():\n    """Text of {library}, {words(2 * i + j)}."""\n'
                f'    raise ValueError(f"bad {{x}}: {words(2 * i + j)}")\n'
                f'    raise TypeError("no {words(1000 + 2 * i + j)}")\n'
                for j in range(2)
            )
            (tmp_path / library / f"file{i}.py").write_text(body)
        (tmp_path / library / "broken.py").write_text('def f(:\n    """Text"""\n    raise ValueError("x")\n')
    monkeypatch.setattr(module, "package_root", lambda p: tmp_path / p if p in ("torch", "sympy") else None)
    return tmp_path


def test_splits_are_balanced_and_share_no_file(installed):
    library, exception = question_tasks(["library", "exception"], train_per_task=16, test_per_task=7)
    assert (library.labels, exception.labels) == (("torch", "sympy"), ("ValueError", "TypeError"))
    for task in (library, exception):
        assert (len(task.train), len(task.test)) == (16, 7)
        for split in (task.train, task.test):
            counts = Counter(record["label"] for record in split)
            assert max(counts.values()) - min(counts.values()) <= 1
    files = [path.read_text() for path in installed.rglob("file*.py")]
    for label in library.labels:
        split_files = [
            {i for r in split if r["label"] == label for i, text in enumerate(files) if r["sentence"][10:] in text}
            for split in (library.train, library.test)
        ]
        assert all(split_files) and not split_files[0] & split_files[1]
    assert question_tasks(["exception"], train_per_task=16, test_per_task=7) == [exception]


def test_same_texts_are_kept_once_and_dropped_across_classes(installed):
    for path in installed.rglob("file*.py"):
        twice = "every one of these texts is the same, but for a name"
        path.write_text(path.read_text() + f'class Same:\n    """{twice} {path.stem}_."""\n')
    (task,) = question_tasks(["library"], train_per_task=200, test_per_task=8)
    texts = [record["sentence"] for record in (*task.train, *task.test)]
    assert texts and not any("every one" in text for text in texts)
    assert len(set(texts)) == len(texts)


def test_errors(installed):
    with pytest.raises(TaskError, match=r"unknown question 'author'; expected one of \['exception', 'library'"):
        question_tasks(["author"])
    with pytest.raises(
        TaskError, match=r"question 'type': only \[\] have 8 texts or more in torch, sympy; expected two"
    ):
        question_tasks(["type"], train_per_task=12, test_per_task=6)
    with pytest.raises(TaskError, match="question 'library': only"):
        question_tasks(["library"], train_per_task=6000)


def test_library_texts():
    text = '''def f():
    """Like numpy.add and PyTorch's own, but for `sympy` and np arrays.

    Args:
        x (int): torch
    """
def g():
    """x (`int`): a list of parameters is no summary of anything at all"""
'''
    assert read("library", text) == [("torch", "Like _.add and _'s own, but for `_` and _ arrays.")]


def test_exception_texts():
    text = """
raise ValueError(f"expected {n} heads of a ValueError, " + name)
try: pass
finally:
    raise TypeError("%s is no %5.2f of these kinds" % (a, b))
match x:
    case 1: raise NotImplementedError("{} is not implemented for the kind {x!r} yet".format(a, x=1))
raise RuntimeError
raise RuntimeError(message)
raise RuntimeError("too short")
raise KeyError("not one of the five that are asked for")
"""
    assert read("exception", text) == [
        ("ValueError", "expected _ heads of a _, _"),
        ("TypeError", "_ is no _ of these kinds"),
        ("NotImplementedError", "_ is not _ for the kind _ yet"),
    ]


def test_type_texts():
    text = '''def f():
    """Two styles.

    Args:
        width (`int`, *optional*, defaults to 64): An integer width of all of the hidden layers. Defaults to 64.
        names (List[str]):
            How the columns of the whole table are called.
        either (int or float): Not one type, so it is left out of this.
        mask (`torch.Tensor` of shape `(n, m)`): Where the tensor is padded, True or False for each.
    """
def g():
    """Numpy.

    Parameters
    ----------
    rate : float, optional
        The share of units that are dropped (default 0.1).
    flag : {True, False}
        Not a type that is asked for, whatever it may say.

    Returns
    -------
    x : int
        A result is no parameter, and not taken for one.
    """
'''
    assert read("type", text) == [
        ("int", "width: An _ width of all of the hidden layers."),
        ("list", "names: How the columns of the whole table are called."),
        ("tensor", "mask: Where the _ is padded, _ or _ for each."),
        ("float", "rate: The share of units that are dropped."),
    ]


def test_section_texts():
    text = '''def f():
    """Summary.

    Args:
        x (int): The first of the two arguments, which are added.

    Returns:
        `torch.Tensor` of shape `(n,)`: The sum of both of the two numbers that were given, returned.

    Raises:
        ValueError: If the two have not the same sign, or none.

    Example::

        >>> add(1, 2) + add(3, 4) + add(5, 6) + add(7, 8)
        36
    """
def g():
    """Summary.

    Notes
    -----
    This is done in place where that can be done at all.

    References
    ----------
    .. [1] A. Author, "On the sum of two numbers", 1999.
    """
'''
    assert read("section", text) == [
        ("parameters", "The first of the two _, which are added."),
        ("returns", "The sum of both of the two numbers that were given, _."),
        ("raises", "If the two have not the same sign, or none."),
        ("examples", "add(1, 2) + add(3, 4) + add(5, 6) + add(7, 8) 36"),
        ("notes", "This is done in place where that can be done at all."),
        ("references", 'A. Author, "On the sum of two numbers", 1999.'),
    ]


def test_sections_end_where_the_indentation_does():
    found = list(sections("Summary.\n\nArgs:\n    x: one\n\nProse that follows.\n\nNotes\n-----\nlast"))
    assert [tuple(section) for section in found] == [("parameters", "x: one"), ("notes", "last")]
    assert summary("Summary.\n\nArgs:\n    x: one").strip() == "Summary."


def test_what_is_installed():
    (task,) = question_tasks(["library"], train_per_task=40, test_per_task=10)
    assert {"torch", "transformers", "python", "numpy"} <= set(task.labels) <= set(LIBRARIES)
    assert {len(task.train), len(task.test)} == {40, 10}
    for record in (*task.train, *task.test):
        assert not any(name in record["sentence"].lower() for name in LIBRARIES), record
