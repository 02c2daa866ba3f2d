"""Four questions about the installed code, as unlike each other as text tasks can be: for streams that interfere.

Which library a docstring is from, which exception an error message belongs to, which type a documented parameter has,
which section of a docstring a passage stands in. Sources are parsed with :mod:`ast`; nothing is imported or executed.
"""

from __future__ import annotations

import ast
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .sections import SECTIONS, entries, sections, summary
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

__all__ = ["LIBRARIES", "QUESTIONS", "Question", "Source", "question_tasks"]

#: Library -> its package, None for the standard library.
LIBRARIES: dict[str, str | None] = {
    "torch": "torch",
    "transformers": "transformers",
    "sympy": "sympy",
    "python": None,
    "numpy": "numpy",
}
_MAX_FILE_BYTES = 40_000  # parsing is what takes the time, and a large file gives no more texts than a small one
_MAX_PER_FILE = 6  # texts of a class


@dataclass(frozen=True)
class Source:
    """A parsed file: its library, its path below the library's root, its text."""

    library: str
    path: str
    data: bytes = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        return parse(self.data)

    @cached_property
    def docstrings(self) -> list[str]:
        return [docstring for _, docstring in docstrings(self.tree)]


@dataclass(frozen=True)
class Question:
    """``read`` finds (label, text) in a source. Where ``may_have`` says no, hardly a source has one."""

    labels: tuple[str, ...]
    read: Callable[[Source], Iterator[tuple[str, str]]]
    may_have: Callable[[Source, str], bool]


def question_tasks(
    names: Sequence[str] = ("library", "exception", "type", "section"),
    *,
    train_per_task: int = 600,
    test_per_task: int = 160,
) -> list[Task]:
    """One task per question; what gives an answer away is masked in its texts.

    Deterministic for given package versions: files are ordered by a hash of their names, a few texts are taken of
    each, and the test split is the head of that order, so a file's texts are in one split of a class only. Texts that
    differ in names and numbers only count as one: kept once in a class, dropped where classes differ. A class with
    too little text is left out; a library that is not installed is not read.

    Args:
        names: keys of :data:`QUESTIONS`, in stream order.
        train_per_task: upper bound of a task's training records, spread evenly over its classes.
        test_per_task: likewise for test records.

    Raises:
        TaskError: an unknown question, or fewer than two classes with enough text.
    """
    for name in names:
        if name not in QUESTIONS:
            raise TaskError(f"unknown question {name!r}; expected one of {sorted(QUESTIONS)}")
    roots = {library: root for library, package in LIBRARIES.items() if (root := package_root(package)) is not None}
    needed = {name: texts_needed(len(QUESTIONS[name].labels), train_per_task, test_per_task) for name in names}
    found = _collect(
        roots, {name: max(count + count // 8 + _MAX_PER_FILE, MIN_TEXTS) for name, count in needed.items()}
    )
    tasks = []
    for name in names:
        least = max(needed[name] // 2, MIN_TEXTS)
        texts = {label: found[name][label] for label in QUESTIONS[name].labels if len(found[name][label]) >= least}
        if len(texts) < 2:
            raise TaskError(
                f"question {name!r}: only {list(texts)} have {least} texts or more in {', '.join(roots)}; "
                "expected two classes"
            )
        tasks.append(split_task(name, texts, train_per_task, test_per_task, _same))
    return tasks


def _collect(roots: Mapping[str, Path], enough: Mapping[str, int]) -> dict[str, dict[str, dict[str, str]]]:
    """``{question: {label: {text: file}}}``, at most ``enough[question]`` texts per label."""
    found: dict[str, dict[str, dict[str, str]]] = {n: {label: {} for label in QUESTIONS[n].labels} for n in enough}
    known: dict[tuple[str, str], set[str]] = {(n, label): set() for n in enough for label in QUESTIONS[n].labels}
    for source in _sources(roots):
        missing = [(n, label) for n, label in known if len(found[n][label]) < enough[n]]
        if not missing:
            break
        # Most files are not parsed: what they could add to is full.
        hoped = [(n, label) for n, label in missing if QUESTIONS[n].may_have(source, label)]
        for name in {n for n, _ in hoped}:
            taken: dict[str, int] = {}
            for label, text in QUESTIONS[name].read(source):
                texts, key = found[name][label], _same(text)
                full = len(texts) >= enough[name] or taken.get(label, 0) >= _MAX_PER_FILE
                if not full and key not in known[name, label]:
                    known[name, label].add(key)
                    texts[text] = f"{source.library}/{source.path}"
                    taken[label] = taken.get(label, 0) + 1
    return found


def _sources(roots: Mapping[str, Path]) -> Iterator[Source]:
    """A file of each library in turn, the files of a library in the order of a hash of their names."""
    lists = []
    for library, root in roots.items():
        paths = sorted((path.relative_to(root).as_posix() for path in python_files(root)), key=rank)
        lists.append([(library, path) for path in paths])
    for entry in itertools.chain.from_iterable(itertools.zip_longest(*lists)):
        if entry is None:  # of a library that has no more files
            continue
        library, path = entry
        data = read_source(roots[library] / path)
        if len(data) <= _MAX_FILE_BYTES:
            yield Source(library, path, data)


def _same(text: str) -> str:
    """The plain words of a text: what is left of two that differ in names and numbers only."""
    words = re.findall(r"(?<!\w)[A-Za-z]?[a-z]+(?!\w)", text)
    return " ".join(words).lower() if len(words) >= 3 else text


# --- which library a docstring is from --------------------------------------------------------------------------------

_LIBRARY_MASK = label_pattern(["torch", "transformer", "sympy", "sympif", "python", "numpy", "np", "huggingface"])


def _library_texts(source: Source) -> Iterator[tuple[str, str]]:
    for docstring in source.docstrings:
        text = opening(summary(docstring), _LIBRARY_MASK)
        if len(text) >= MIN_CHARACTERS:
            yield source.library, text


# --- which exception a message belongs to -----------------------------------------------------------------------------

EXCEPTIONS = ("ValueError", "AssertionError", "RuntimeError", "TypeError", "NotImplementedError")
_EXCEPTION_MASK = re.compile(r"\w*(?:Error|Exception)\b|\w*implement\w*|\bassertions?\b|\bruntime\b", re.IGNORECASE)
_PERCENT_FORMAT = re.compile(r"%(?:\(\w+\))?[-+ #0]*[\d.*]*[a-zA-Z]")
_BRACE_FORMAT = re.compile(r"\{[^{}]*\}")
_MIN_MESSAGE = 24


def _exception_texts(source: Source) -> Iterator[tuple[str, str]]:
    for node in _statements(source.tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args):
            continue
        name, message = node.exc.func, _message(node.exc.args[0])
        if isinstance(name, ast.Name) and name.id in EXCEPTIONS and message is not None:
            text = opening(message, _EXCEPTION_MASK)
            if len(text) >= _MIN_MESSAGE and len(re.findall(r"[A-Za-z]{2,}", text)) >= 3:
                yield name.id, text


def _statements(tree: ast.Module) -> Iterator[ast.stmt]:
    """All statements, in a tenth of the time that :func:`ast.walk` takes for all nodes."""
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.stmt):
            yield node
        blocks = (getattr(node, name, ()) for name in ("finalbody", "orelse", "handlers", "cases", "body"))
        stack += [child for block in blocks for child in reversed(block)]


def _message(node: ast.expr) -> str | None:
    """The text of a message with ``_`` for what it is filled with; None where there is none."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else None
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "_" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _message(node.left), _message(node.right)
        return None if left is None and right is None else (left or "_") + (right or "_")
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mod):
        text = _message(node.left)
        return text and _PERCENT_FORMAT.sub("_", text)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "format":
        text = _message(node.func.value)
        return text and _BRACE_FORMAT.sub("_", text)
    return None


# --- which type a documented parameter has ----------------------------------------------------------------------------

_TYPES = {
    "int": ("int", "integer"),
    "str": ("str", "string"),
    "bool": ("bool", "boolean"),
    "tensor": ("tensor", "torch.tensor", "torch.longtensor", "torch.floattensor", "torch.booltensor", "longtensor"),
    "list": ("list",),
    "float": ("float",),
}
_LABEL_OF_TYPE = {name: label for label, names in _TYPES.items() for name in names}
_TYPE_MASK = label_pattern(["int ints integer str string bool bools boolean tensor list float true false"])
_DEFAULT = re.compile(
    r"\s*[(\[]defaults?\b[^()\[\]]*[)\]]|\b(?:the )?defaults?(?: value)?(?:\s+is|\s+to|\s*[:=])\s*[^\s,;]+",
    re.IGNORECASE,
)
_OPTIONAL = re.compile(r"^(?:optional|\*optional\*|defaults?\b.*|required|\*required\*|keyword-only)$", re.IGNORECASE)


def _type_texts(source: Source) -> Iterator[tuple[str, str]]:
    for docstring in source.docstrings:
        for section in sections(docstring):
            if section.name != "parameters":
                continue
            for name, kind, description in entries(section.body):
                label = _label_of_type(kind)
                text = opening(f"{name}: {_DEFAULT.sub('', description)}", _TYPE_MASK)
                if label is not None and name and len(text) >= MIN_CHARACTERS:
                    yield label, text


def _label_of_type(kind: str) -> str | None:
    """The class of a type as written ("`int`, *optional*"); None for other types and for unions."""
    kind = re.sub(r"(?::\w+)*:?`([^`]*)`", r"\1", kind).replace("~", "")
    kind = re.sub(r"\s+of (?:shape|size|dimension).*", "", kind)
    first, *rest = (part.strip() for part in re.split(r",(?![^\[(]*[\])])", kind))
    if not all(_OPTIONAL.match(part) or "=" in part for part in rest):
        return None
    first = re.sub(r"^(?:typing\.)?Optional\[(.*)\]$", r"\1", first, flags=re.IGNORECASE)
    first = re.sub(r"\s*\|\s*None$|\s+or\s+None$|\s*=.*$", "", first).lower()
    if re.match(r"^list(\[[^|]*\]| of \w+)$", first):
        return "list"
    return _LABEL_OF_TYPE.get(first)


# --- which section of a docstring a passage is from -------------------------------------------------------------------

_SECTION_LABELS = tuple(name for name in SECTIONS if name)
_SECTION_MASK = re.compile(
    r"\b(?:\w+(?:Error|Exception|Warning)|parameters?|params?|arg(?:ument)?s?|kwargs|return(?:s|ed|ing)?|rais(?:es?|ed|ing)"
    r"|examples?|notes?|noted|references?)\b",
    re.IGNORECASE,
)
_PROMPT = re.compile(r"^\s*(?:>>>|\.\.\.)\s?|^\s*```\w*", re.MULTILINE)

_RESULT = re.compile(r"^[^.\n]{0,20}`[^\n]{1,200}?`?: +|^[\w.\[\], |]{1,40}: +")  # "`Tensor` of shape `(n,)`: "


def _section_texts(source: Source) -> Iterator[tuple[str, str]]:
    for docstring in source.docstrings:
        for name, body in sections(docstring):
            if name:
                text = opening(_passage(name, body), _SECTION_MASK)
                if len(text) >= MIN_CHARACTERS:
                    yield name, text


def _passage(name: str, body: str) -> str:
    """A section's text without the layout that tells which section it is: names and types of lists, prompts."""
    if name == "examples":
        return _PROMPT.sub("", body)
    if name == "references":
        return re.sub(r"(?:^|\n)\s*(?:\.\. )?\[\w+\]_?", " ", body)
    if name in ("parameters", "returns", "raises"):
        text = " ".join(entry.text or entry.kind for entry in entries(body))
        return text or _RESULT.sub("", body)
    return body


# --- the questions ----------------------------------------------------------------------------------------------------


def _has_type(source: Source, label: str) -> bool:
    """Whether there is " (int", " (`int`", " : int" or the like."""
    names = ("torch.Tensor", "Tensor", "torch.LongTensor", "torch.FloatTensor") if label == "tensor" else _TYPES[label]
    names += ("List[", "Optional[List") if label == "list" else (f"Optional[{names[0]}",)
    hits = (source.data.count(f"{before}{name}".encode()) for before in (" (", " (`", " : ") for name in names)
    return sum(hits) >= 3


def _has_heading(source: Source, label: str) -> bool:
    return any(heading.capitalize().encode() in source.data for heading in SECTIONS[label])


QUESTIONS: dict[str, Question] = {
    "library": Question(tuple(LIBRARIES), _library_texts, lambda source, label: source.library == label),
    "exception": Question(
        EXCEPTIONS, _exception_texts, lambda source, label: f"raise {label}(".encode() in source.data
    ),
    "type": Question(tuple(_TYPES), _type_texts, _has_type),
    "section": Question(_SECTION_LABELS, _section_texts, _has_heading),
}
