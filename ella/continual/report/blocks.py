"""What a report is made of, without its form: headings, sentences, tables and charts.

The page and the markdown show the same blocks, so that a number cannot differ between them. All text is plain and is
escaped where it is rendered; only :attr:`Chart.html` is markup, made and escaped by :mod:`.charts`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Block", "Cell", "Chart", "Divider", "Heading", "Panels", "Row", "Table", "Text"]


@dataclass(frozen=True)
class Heading:
    """``level`` 1 is the report's title."""

    text: str
    level: int


@dataclass(frozen=True)
class Text:
    """A paragraph. ``strong`` is what the report says; the others say how to read it."""

    text: str
    strong: bool = False


@dataclass(frozen=True)
class Cell:
    """``small`` follows more quietly. ``kind`` is "own" (a task's own row), "quiet", "code" or nothing.

    ``shade`` from 0 to 1 is how much of the table's colour lies under it.
    """

    text: str
    small: str = ""
    strong: bool = False
    kind: str = ""
    shade: float = 0.0


@dataclass(frozen=True)
class Row:
    """``note`` follows ``head`` more quietly; ``color`` is that of a dot before it, "" for none."""

    head: str
    cells: Sequence[Cell]
    note: str = ""
    color: str = ""
    ours: bool = False


@dataclass(frozen=True)
class Divider:
    """A line between rows, with words."""

    text: str


@dataclass(frozen=True)
class Table:
    """``kind`` is "matrix", "facts" or nothing; ``color`` is that of its dot and shades.

    ``corner`` stands over the heads of the rows.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Row | Divider]
    kind: str = ""
    color: str = ""
    corner: str = ""


@dataclass(frozen=True)
class Chart:
    """Markup of the page only."""

    html: str


@dataclass(frozen=True)
class Panels:
    """Side by side where there is room; ``fold`` is the line that they are folded under, "" for open ones."""

    blocks: Sequence[Table | Chart]
    fold: str = ""


Block = Heading | Text | Table | Chart | Panels
