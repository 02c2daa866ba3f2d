"""The charts of the page, as svg: lines over the tasks of a stream, and strips of shaded cells."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .blocks import Chart
from .summary import Interference

__all__ = ["COLORS", "OTHER_COLORS", "Line", "Look", "legend", "line_chart", "looks", "percents", "strip_chart"]

#: A method has the same colour in every report. All stand out from a white page and from a dark one.
COLORS = {
    "ella": "#1f6feb",
    "seqlora": "#a5693a",
    "inclora": "#8a8f98",
    "alone": "#3c8d5a",
    "olora": "#a371f7",
    "nlora": "#a8820a",
    "ewc": "#d0459b",
    "replay": "#6f961f",
    "slao": "#16909c",
    "osf": "#dc4250",
    "lines": "#9c3cc0",
    "joint": "#6e7781",
}
DASHES = ("7 3", "10 3 3 3", "10 2 2 2 2 2")
OTHER_COLORS = ("#e0700a", "#0b8f6f", "#8a63d2", "#c0568a", "#4a8fd0", "#8f8a1a", "#c8553d", "#5b8c5a")


@dataclass(frozen=True)
class Look:
    """How an arm is drawn; ``dash`` is svg's, "" for a full line."""

    color: str
    dash: str = ""
    width: float = 2.0


@dataclass(frozen=True)
class Line:
    """``points`` are (index of a task, value), a mean over seeds; ``single`` the same of every seed."""

    title: str
    look: Look
    points: Sequence[tuple[int, float]]
    single: Sequence[Sequence[tuple[int, float]]] = ()


def looks(given: Mapping[str, str]) -> dict[str, Look]:
    """A look for every arm of ``given`` (arm: what it is given), no two alike for up to 8 labels of one's own.

    Colours alone do not tell twelve lines apart, least of all to the colour-blind. References are dotted; the first
    arm, ELLA where there is one, is the only full line, so that it is seen under a dashed one with the same values.
    """
    own = iter(range(len(given)))
    found = {}
    for i, arm in enumerate(sorted(given, key=lambda arm: arm != "ella")):
        color = COLORS.get(arm) or OTHER_COLORS[next(own) % len(OTHER_COLORS)]
        dash = "1.5 4" if given[arm] else DASHES[i % len(DASHES)] if i else ""
        found[arm] = Look(color, dash, 3.0 if arm == "ella" else 2.0)
    return found


def legend(arms: Mapping[str, Look], titles: Mapping[str, str]) -> Chart:
    """Which line is which arm."""
    items = "".join(f"<li>{_swatch(look)}{esc(titles[arm])}</li>" for arm, look in arms.items())
    return Chart(f'<ul class="legend" aria-label="lines of the charts">{items}</ul>')


def _swatch(look: Look) -> str:
    return f'<svg class="swatch" width="28" height="8" aria-hidden="true"><path d="M0 4H28"{_stroke(look)}/></svg>'


def _stroke(look: Look) -> str:
    dash = f' stroke-dasharray="{look.dash}"' if look.dash else ""
    return f' stroke="{look.color}" stroke-width="{look.width:g}"{dash}'


@dataclass(frozen=True)
class _Plot:
    """Where values stand: x from task ``first`` to ``last``, y from ``least`` to ``most``."""

    width: int
    height: int
    left: int
    bottom: int
    first: int
    last: int
    least: float
    most: float
    right: int = 12
    top: int = 12

    def x(self, i: float) -> float:
        span = self.last - self.first
        inside = self.width - self.left - self.right
        return self.left + (inside * (i - self.first) / span if span else inside / 2)

    def y(self, v: float) -> float:
        return self.top + (self.height - self.top - self.bottom) * (1 - (v - self.least) / (self.most - self.least))

    def points(self, points: Sequence[tuple[int, float]]) -> str:
        return " ".join(f"{self.x(i):.1f},{self.y(v):.1f}" for i, v in points)


def line_chart(
    caption: str,
    lines: Sequence[Line],
    tasks: Sequence[str],
    *,
    what: str,
    kind: str,
    first: int = 0,
    within: tuple[float, float] = (0.0, 100.0),
    show: Callable[[float], str] = lambda v: f"{v:g}",
    small: bool = False,
) -> Chart:
    """Values after every task from ``first`` on, on an axis from the one to the other of ``within``.

    ``what`` says in words what is drawn, ``kind`` is the figure's class, ``show`` writes a value at the axis.
    ``small`` panels number the tasks (from 1) instead of naming them.
    """
    two_lines = not small and max(map(len, tasks)) > 4
    width, height, bottom = (236, 150, 24) if small else (340, 220, 46) if two_lines else (340, 202, 28)
    least, most = within
    levels = [least + part * (most - least) for part in ((0, 0.25, 0.5, 0.75, 1) if not small else (0, 0.5, 1))]
    left = 38 if max(len(show(level)) for level in levels) <= 4 else 72
    plot = _Plot(width, height, left, bottom, first, len(tasks) - 1, least, most)
    marks = []
    for level in levels:
        y = plot.y(level)
        marks.append(
            f'<line class="grid" x1="{left}" x2="{width - plot.right}" y1="{y:.1f}" y2="{y:.1f}" '
            'stroke="currentColor" stroke-opacity=".25"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{esc(show(level))}</text>'
        )
    marks += _task_names(plot, tasks, small, two_lines)
    # The widest line, ELLA's, lies under the others: it still shows beside one with the same values.
    for line in sorted(lines, key=lambda line: -line.look.width):
        if len(line.single) > 1:
            marks += [
                f'<polyline points="{plot.points(single)}" stroke="{line.look.color}" '
                'fill="none" stroke-width="1" opacity=".3"/>'
                for single in line.single
                if len(single) > 1
            ]
        if len(line.points) > 1:
            marks.append(f'<polyline points="{plot.points(line.points)}" fill="none"{_stroke(line.look)}/>')
        radius = line.look.width / (1.2 if small else 0.8)
        marks += [
            f'<circle cx="{plot.x(i):.1f}" cy="{plot.y(v):.1f}" r="{radius:.1f}" fill="{line.look.color}">'
            f"<title>{esc(line.title)}: {esc(show(round(v, 1)))} after {esc(tasks[i])}</title></circle>"
            for i, v in line.points
        ]
    ends = "; ".join(
        f"{line.title} from {show(round(line.points[0][1], 1))} to {show(round(line.points[-1][1], 1))}"
        for line in lines
        if line.points
    )
    return _figure(kind, caption, f"{what}: {ends}", width, height, marks)


def percents(lines: Iterable[Line]) -> tuple[float, float]:
    """The axis of lines in percent: as much of 0 to 100 as they need, in twenties.

    >>> percents([Line("a", Look("red"), [(0, 51.0), (1, 38.5)])])
    (20.0, 60.0)
    """
    values = [value for line in lines for points in (line.points, *line.single) for _, value in points]
    if not values:
        return 0.0, 100.0
    least = min(20.0 * math.floor(min(values) / 20), 80.0)
    return least, max(20.0 * math.ceil(max(values) / 20), least + 20)


def _task_names(plot: _Plot, tasks: Sequence[str], small: bool, two_lines: bool) -> list[str]:
    marks = []
    every = max(1, math.ceil((plot.last - plot.first + 1) / 8))
    for i in range(plot.first, plot.last + 1):
        # Small panels name every few tasks, and always the last.
        if small and i != plot.last and ((i - plot.first) % every or plot.last - i < every):
            continue
        anchor = "middle"
        if two_lines and plot.first < plot.last:
            # Long names at the ends stay inside the chart.
            anchor = "start" if i == plot.first else "end" if i == plot.last else "middle"
        # Long names of neighbours stand on two lines, so that they do not run into each other.
        level = plot.height - plot.bottom + (34 if two_lines and (i - plot.first) % 2 else 18)
        name = str(i + 1) if small else _short(tasks[i])
        marks.append(f'<text x="{plot.x(i):.1f}" y="{level}" text-anchor="{anchor}">{esc(name)}</text>')
    return marks


def strip_chart(caption: str, look: Look, found: Interference) -> Chart:
    """Layers (rows) by tasks (columns); shades are logarithmic, from the smallest value to the largest."""
    names = _without_common_ends(found.layers)
    named = len(names) <= 24
    left = 8 + 6 * max(len(name) for name in names) if named else 30
    cell = 14 if named else 6
    wide = 34 if len(found.tasks) <= 8 else 20
    width, height = left + wide * len(found.tasks) + 8, cell * len(names) + 22
    logs = [math.log10(v) for row in found.values for v in row if v > 0]
    low, span = (min(logs), max(max(logs) - min(logs), 1e-9)) if logs else (0.0, 1.0)
    marks = []
    for y, (name, row) in enumerate(zip(names, found.values, strict=True)):
        if named or y % 10 == 0:
            at = y * cell + (11 if named else 6)
            marks.append(f'<text x="{left - 5}" y="{at}" text-anchor="end">{esc(name if named else str(y))}</text>')
        for x, value in enumerate(row):
            if value > 0:
                shade = 0.08 + 0.92 * (math.log10(value) - low) / span
                marks.append(
                    f'<rect x="{left + x * wide}" y="{y * cell}" width="{wide - 1}" height="{cell - 1}" '
                    f'fill="{look.color}" fill-opacity="{shade:.2f}"><title>{esc(found.layers[y])}, '
                    f"{esc(found.tasks[x])}: {value:.3g}</title></rect>"
                )
    marks += [
        f'<text x="{left + (x + 0.5) * wide:.1f}" y="{height - 8}" text-anchor="middle">{x + 1}</text>'
        for x in range(len(found.tasks))
    ]
    label = f"interference of {len(names)} layers at the end of {len(found.tasks)} tasks; the table has the numbers"
    return _figure("strip", caption, label, width, height, marks)


def _figure(kind: str, caption: str, label: str, width: int, height: int, marks: Sequence[str]) -> Chart:
    # Strips scroll where the page is narrow, with the keyboard too.
    focus = ' tabindex="0"' if kind == "strip" else ""
    return Chart(
        f'<figure class="{kind}"{focus}><figcaption>{esc(caption)}</figcaption><svg viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" font-size="11" fill="currentColor" role="img" '
        f'aria-label="{esc(label)}">{"".join(marks)}</svg></figure>'
    )


def _without_common_ends(names: Sequence[str]) -> list[str]:
    """Module paths without the parts that all of them start or end with."""
    paths = [name.split(".") for name in names]
    shortest = min(len(path) for path in paths)
    start = next((i for i in range(shortest) if len({path[i] for path in paths}) > 1), 0)
    end = next((i for i in range(shortest - start) if len({path[-1 - i] for path in paths}) > 1), 0)
    return [_short(".".join(path[start : len(path) - end]), 28) for path in paths]


def _short(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def esc(text: Any) -> str:
    """Safe in text and in attributes."""
    return html.escape(str(text), quote=True)
