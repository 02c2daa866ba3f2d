"""Sections of Google and numpy-style docstrings, and the entries of those that list parameters, results or errors."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["SECTIONS", "Entry", "Section", "entries", "sections", "summary"]

#: Section -> the headings it goes by.
SECTIONS: dict[str, tuple[str, ...]] = {
    "parameters": ("args", "arguments", "parameters", "keyword args", "keyword arguments", "other parameters"),
    "returns": ("returns", "return"),
    "raises": ("raises",),
    "examples": ("example", "examples", "usage"),
    "notes": ("note", "notes", "explanation"),
    "references": ("reference", "references"),
    "": ("attributes", "inputs", "outputs", "shape", "see also", "yields", "warning", "warnings", "todo", "methods"),
}
_NAMES = {heading: name for name, headings in SECTIONS.items() for heading in headings}
_GOOGLE = re.compile(r"^(\s*)([A-Z][A-Za-z ]+?)\s*::?\s*$")
_UNDERLINE = re.compile(r"^\s*(-{3,}|={3,})\s*$")
# "name (`int`, *optional*): text", "- **name** (int): text", "name: text"
_GOOGLE_ENTRY = re.compile(r"^[-*\s]*`*(\*{0,2}[A-Za-z_][\w.]*)[*`]*\s*(?:\((.*?)\)\s*)?(?:--|:)(?:\s+(.*))?$")
_NUMPY_ENTRY = re.compile(r"^`*(\*{0,2}[A-Za-z_][\w.]*(?:, ?[*\w.]+)*)`*\s+:\s+(\S.*)$")  # "x, y : int"


class Section(NamedTuple):
    """``name`` is a key of :data:`SECTIONS`, or "" for another one; ``body`` is dedented and without the heading."""

    name: str
    body: str


class Entry(NamedTuple):
    """One item of a list of parameters, results or errors; ``kind`` is its type as written, "" where none is."""

    name: str
    kind: str
    text: str


def summary(docstring: str) -> str:
    """What stands before a docstring's first section or doctest."""
    lines = docstring.splitlines()
    for i, line in enumerate(lines):
        if line.lstrip().startswith((">>>", "```", ".. ")) or _heading(lines, i) is not None:
            return "\n".join(lines[:i])
    return docstring


def sections(docstring: str) -> Iterator[Section]:
    """The sections of a cleaned docstring (:func:`ast.get_docstring`) in order."""
    lines = docstring.splitlines()
    starts = [(i, found) for i in range(len(lines)) if (found := _heading(lines, i)) is not None]
    for at, (start, (name, skipped, indent)) in enumerate(starts):
        end = starts[at + 1][0] if at + 1 < len(starts) else len(lines)
        body = lines[start + skipped : end]
        if skipped == 1:  # a Google section ends where the text is not indented any more
            length = next((n for n, line in enumerate(body) if line.strip() and _indent(line) <= indent), len(body))
            body = body[:length]
        yield Section(name, textwrap.dedent("\n".join(body)).strip("\n"))


def entries(body: str) -> Iterator[Entry]:
    """The entries of a section's body; nothing for a body of prose."""
    blocks: list[tuple[str, list[str]]] = []
    for line in body.splitlines():
        if line.strip() and _indent(line) == 0:
            blocks.append((line, []))
        elif blocks:
            blocks[-1][1].append(line.strip())
    for head, rest in blocks:
        text = " ".join(rest).strip()
        if found := _NUMPY_ENTRY.match(head):
            yield Entry(found[1], found[2].strip(), text)
        elif found := _GOOGLE_ENTRY.match(head):
            yield Entry(found[1], found[2] or "", f"{found[3] or ''} {text}".strip())
        elif text and len(head.split()) <= 4:
            yield Entry("", head.strip(), text)


def _heading(lines: list[str], i: int) -> tuple[str, int, int] | None:
    """(section, lines the heading takes, its indentation) where one starts at line ``i``."""
    if i == 0 and lines and (found := _GOOGLE_ENTRY.match(lines[0])) and found[2]:
        return "parameters", 0, 0  # a docstring that is a list of parameters (transformers' configurations)
    if i + 1 < len(lines) and _UNDERLINE.match(lines[i + 1]) and lines[i].strip():
        return _NAMES.get(lines[i].strip().rstrip(":").lower(), ""), 2, _indent(lines[i])
    found = _GOOGLE.match(lines[i])
    if found and found[2].lower() in _NAMES:
        return _NAMES[found[2].lower()], 1, len(found[1])
    return None


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
