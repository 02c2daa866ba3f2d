"""A report as one html page: no script, no external file, light and dark, narrow and wide."""

from __future__ import annotations

from collections.abc import Sequence

from .blocks import Block, Cell, Chart, Divider, Heading, Panels, Row, Table, Text
from .charts import esc

__all__ = ["render_blocks_html"]


def render_blocks_html(title: str, blocks: Sequence[Block]) -> str:
    """The whole page as text."""
    body = "\n".join(_block(block) for block in blocks)
    return _PAGE.format(title=esc(title), style=_STYLE, body=body)


def _block(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{esc(text)}</h{level}>"
        case Text(text, strong):
            return f'<p class="said">{esc(text)}</p>' if strong else f"<p>{esc(text)}</p>"
        case Chart(html):
            return html
        case Table():
            return _scrolled(block)
        case Panels(blocks, fold):
            inside = "\n".join(b.html if isinstance(b, Chart) else f"<figure>{_scrolled(b)}</figure>" for b in blocks)
            panels = f'<div class="panels">\n{inside}\n</div>'
            return f"<details><summary>{esc(fold)}</summary>{panels}</details>" if fold else panels


def _scrolled(table: Table) -> str:
    """Wide tables move inside the page, with the keyboard too."""
    name = esc(table.caption or "how it was run")
    return f'<div class="wide" role="group" tabindex="0" aria-label="{name}">{_table(table)}</div>'


def _table(table: Table) -> str:
    caption = f"<caption>{_dot(table.color)}{esc(table.caption)}</caption>" if table.caption else ""
    head = "".join(map(_column, table.columns))
    first = f'<th scope="col">{esc(table.corner)}</th>' if table.corner else "<td></td>"
    head = f"<thead><tr>{first}{head}</tr></thead>" if table.columns else ""
    rows = "".join(_row(row, table) for row in table.rows)
    kind = f' class="{table.kind}"' if table.kind else ""
    hue = f' style="--hue:{table.color}"' if table.color else ""
    return f"<table{kind}{hue}>{caption}{head}<tbody>{rows}</tbody></table>"


def _column(name: str) -> str:
    """Long names break into lines, not into a column of single words; short ones ("SST-2") never break."""
    long = ' class="long"' if len(name) > 12 else ""
    return f'<th scope="col"{long}>{esc(name)}</th>'


def _row(row: Row | Divider, table: Table) -> str:
    if isinstance(row, Divider):
        # A body of its own: what the words stand over is a group of rows.
        head = f'<th colspan="{len(table.columns) + 1}" scope="rowgroup">{esc(row.text)}</th>'
        return f'</tbody><tbody><tr class="divider">{head}</tr>'
    note = f" <small>{esc(row.note)}</small>" if row.note else ""
    ours = ' class="ours"' if row.ours else ""
    cells = "".join(map(_cell, row.cells))
    return f'<tr{ours}><th scope="row">{_dot(row.color)}{esc(row.head)}{note}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    text = esc(cell.text)
    text = f"<b>{text}</b>" if cell.strong else f"<code>{text}</code>" if cell.kind == "code" else text
    small = f" <small>{esc(cell.small)}</small>" if cell.small else ""
    kind = f' class="{cell.kind}"' if cell.kind in ("own", "quiet") else ""
    shade = f' style="--shade:{cell.shade:.2f}"' if cell.shade else ""
    return f"<td{kind}{shade}>{text}{small}</td>"


def _dot(color: str) -> str:
    return f'<i class="dot" style="background:{color}"></i>' if color else ""


_STYLE = """
:root { color-scheme:light dark; --ink:#1c2128; --soft:#57606a; --line:#d8dee4; --paper:#fff; --card:#f6f8fa }
@media screen and (prefers-color-scheme: dark) {
  :root { --ink:#e6edf3; --soft:#9198a1; --line:#3d444d; --paper:#0d1117; --card:#151b23 } }
* { box-sizing:border-box }
body { font:15px/1.5 system-ui,sans-serif; color:var(--ink); background:var(--paper); max-width:1184px;
  margin:0 auto; padding:32px 20px 64px; overflow-wrap:break-word }
h1 { font-size:26px; margin:0 0 20px } h2 { font-size:20px; margin:44px 0 8px } h3 { font-size:16px; margin:28px 0 6px }
p { color:var(--soft); margin:8px 0 12px; max-width:75ch } .said { color:var(--ink); font-size:17px; margin:0 0 8px }
.wide { overflow-x:auto; max-width:100%; margin:16px 0 } figure .wide { margin:0 }
table { border-collapse:separate; border-spacing:0; font-variant-numeric:tabular-nums }
caption { text-align:left; font-weight:600; padding:0 0 6px }
th { text-align:left; font-weight:500; color:var(--soft) } td { text-align:right; white-space:nowrap }
th,td { padding:6px 12px } thead th { vertical-align:bottom; white-space:nowrap }
thead .long { white-space:normal; min-width:10em; max-width:13em }
thead th+th,thead td+th { text-align:right }
tbody tr>* { border-top:1px solid var(--line) } tbody th { color:var(--ink); min-width:9em }
body { --under:var(--paper) } figure,.ours { --under:var(--card) }
tr>:first-child:not([colspan]) { position:sticky; left:0; background:var(--under) }
tbody th:has(>.dot) { padding-left:29px } th>.dot { margin-left:-17px }
.ours { background:var(--under) } .ours th { font-weight:700 }
small { color:var(--soft); font-weight:400 }
.divider th { border-top:2px solid var(--soft); color:var(--soft); font-size:.87em; padding-top:10px }
.panels { display:flex; flex-wrap:wrap; gap:16px; align-items:flex-start }
figure { margin:0; max-width:100%; background:var(--card); padding:14px; border:1px solid var(--line);
  border-radius:8px }
figcaption { font-weight:600; margin-bottom:6px } .strip svg { max-width:none } .strip { overflow-x:auto }
svg { max-width:100%; height:auto; display:block; color:var(--soft) } polyline { stroke-linejoin:round }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 20px; margin:12px 0; padding:0 }
.swatch { display:inline-block; margin-right:7px; vertical-align:middle }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:7px }
details summary { cursor:pointer; color:var(--soft); margin:6px 0 } details[open] summary { margin-bottom:12px }
.matrix { font-size:13px } .matrix th,.matrix td { padding:4px 8px; border:0 }
.matrix th { color:var(--soft); min-width:0 }
.matrix td { background:color-mix(in srgb, var(--hue, transparent) calc(var(--shade, 0) * 45%), transparent) }
.matrix .own { outline:1.5px solid var(--ink); outline-offset:-2px; border-radius:3px }
.matrix .quiet { color:var(--soft); font-style:italic }
.facts td { text-align:left; white-space:normal; overflow-wrap:anywhere }
.facts th { vertical-align:top; color:var(--soft) }
code { font-size:13px }
@media (max-width:600px) { body { padding:20px 12px 48px } th,td { padding:5px 7px } figure { padding:10px }
  td small { display:block } thead th { font-size:13px } thead .long { min-width:7em }
  tbody th { min-width:6.5em } tbody th:has(>.dot) { padding-left:24px; min-width:8em } }
@page { margin:12mm }
@media print { :root { color-scheme:light; print-color-adjust:exact } body { font-size:12px; padding:0 }
  figure { padding:8px } figure:has(>svg) { max-width:calc(50% - 8px) }
  .said { font-size:14px } .wide,.strip { overflow:visible } th,td { padding:3px 6px } tbody th { min-width:0 }
  tr>:first-child:not([colspan]) { position:static } td small { display:block } .matrix { font-size:9px }
  .matrix th,.matrix td { padding:2px 3px } thead .long { min-width:7em }
  details::details-content { content-visibility:visible; display:block } summary { list-style:none }
  h2,h3,caption,summary,.legend { break-after:avoid } figure,tr { break-inside:avoid } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head>
<body><main>
{body}
</main></body></html>
"""
