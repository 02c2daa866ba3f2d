"""A report as markdown: the numbers and sentences of the page, without its charts."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .blocks import Block, Cell, Chart, Divider, Heading, Panels, Row, Table, Text

__all__ = ["render_blocks_markdown"]


def render_blocks_markdown(blocks: Sequence[Block]) -> str:
    """The whole file as text."""
    return "\n\n".join(text for block in blocks if (text := _block(block))) + "\n"


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {_esc(text)}"
        case Text(text, strong):
            return f"**{_esc(text)}**" if strong else _esc(text)
        case Table():
            return _table(block)
        case Panels(blocks, fold):
            tables = "\n\n".join(_table(b) for b in blocks if isinstance(b, Table))
            if not tables or not fold:
                return tables
            return f"<details><summary>{_esc(fold)}</summary>\n\n{tables}\n\n</details>"
        case Chart():
            return ""


def _table(table: Table) -> str:
    width = max(len(table.columns), *(len(row.cells) for row in table.rows if isinstance(row, Row)), 1)
    columns = [*map(_esc, table.columns), *[""] * (width - len(table.columns))]
    align = ":---" if table.kind == "facts" else "---:"
    lines = [_line([_esc(table.corner), *columns]), _line([":---", *[align] * width])]
    for row in table.rows:
        if isinstance(row, Divider):
            lines.append(_line([f"*{_esc(row.text)}*", *[""] * width]))
        else:
            head = f"{_esc(row.head)} ({_esc(row.note)})" if row.note else _esc(row.head)
            lines.append(_line([head, *map(_cell, row.cells)]))
    caption = [f"{_esc(table.caption)}:", ""] if table.caption else []
    return "\n".join([*caption, *lines])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    if cell.kind == "code" and not re.search(r"[`\n\\|]", cell.text):
        return f"`{cell.text}`"
    text = _esc(cell.text)
    if text and (cell.strong or cell.kind == "own"):
        text = f"**{text}**"
    elif text and cell.kind == "quiet":
        text = f"*{text}*"
    return f"{text} {_esc(cell.small)}" if cell.small else text


def _esc(text: str) -> str:
    """On one line, and nothing in it markup: neither markdown's nor html's."""
    text = re.sub(r"\s+", " ", text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#|~])", r"\\\1", text)
