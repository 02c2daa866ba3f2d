"""General ability before a stream and after it, by method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..stream import StreamResult
from .blocks import Block, Cell, Divider, Heading, Row, Table, Text
from .charts import Look
from .summary import by_arm, mean
from .text import number

__all__ = ["general_blocks"]


def general_blocks(
    runs: Sequence[StreamResult], summary: Mapping[str, Mapping[str, Any]], look: Mapping[str, Look], level: int
) -> list[Block]:
    """A table of the runs of one order that have measured it, the least loss first; nothing where none has."""
    measured = [run for run in runs if {"before", "after"} <= run.general.keys()]
    if not measured:
        return []
    limits = {(run.config.get("general") or {}).get("limit") for run in measured}
    asked = "all examples" if limits == {None} else f"the first {', '.join(map(str, limits))} examples of each"
    tasks = list(dict.fromkeys(task for run in measured for task in run.general["before"]))
    changes = {arm: {t: _mean(of_arm, t, "change") for t in tasks} for arm, of_arm in by_arm(measured).items()}
    overall = {arm: mean(list(change.values())) for arm, change in changes.items()}
    first = [Cell(number(_mean(measured, task, "before"), "–")) for task in tasks]
    rows: list[Row | Divider] = [Row("before the stream", [*first, Cell("")])]
    for arm in sorted(changes, key=lambda arm: math.inf if math.isnan(overall[arm]) else -overall[arm]):
        cells = [
            Cell(
                number(_mean(by_arm(measured)[arm], task, "after"), "–"),
                f"({number(changes[arm][task], '–', sign=True)})",
            )
            for task in tasks
        ]
        change = Cell(number(overall[arm], "–", sign=True), strong=len(changes) > 1 and overall[arm] == _best(overall))
        rows.append(Row(summary[arm]["title"], [*cells, change], color=look[arm].color, ours=arm == "ella"))
    return [
        Heading("General ability", level),
        Table("After the stream, with the change", [*tasks, "mean change (GA)"], rows),
        Text(f"Scores of lm-eval in percent, of {asked}, on what is none of the stream's tasks; means over seeds."),
    ]


def _best(overall: Mapping[str, float]) -> float:
    return max((value for value in overall.values() if not math.isnan(value)), default=math.nan)


def _mean(runs: Sequence[StreamResult], task: str, what: str) -> float:
    """Of "before", "after" or the "change" between them; NaN where a run lacks the task."""
    pairs = [(run.general["before"].get(task, math.nan), run.general["after"].get(task, math.nan)) for run in runs]
    return mean([{"before": b, "after": a, "change": a - b}[what] for b, a in pairs])
