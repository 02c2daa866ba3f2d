"""Numbers as text, and a report for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..metrics import AccuracyMatrix
from ..stream import StreamResult
from .comparison import OURS, comparisons
from .summary import METRIC_TITLES, by_order, over_orders, ranked, summarise

__all__ = ["cost_sentence", "format_bytes", "format_matrix", "mean_and_spread", "number", "render_text"]

SHORT_TITLES = {"OA": "OA", "BWT": "BWT", "FWT_zero_shot": "FWT*", "FWT_learning": "FWT**"}


def number(value: float, missing: str, sign: bool = False) -> str:
    """With one decimal; ``missing`` for NaN."""
    return missing if math.isnan(value) else f"{value:{'+' if sign else ''}.1f}"


def mean_and_spread(values: Mapping[str, Any], metric: str) -> str:
    """An arm's "65.0 ± 1.2"; without a spread where there is one seed, "–" where there is no mean."""
    mean = number(values["mean"][metric], "–", sign=metric != "OA")
    sd = values["sd"][metric] if "sd" in values else math.nan
    return mean if math.isnan(sd) else f"{mean} ± {sd:.1f}"


def format_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def format_matrix(matrix: AccuracyMatrix) -> str:
    """The matrix as aligned text, rows "after <task>", cells not measured as dots."""
    width = max(8, *(len(name) + 2 for name in matrix.tasks))
    first = max(len(name) for name in matrix.tasks) + 8
    lines = [" " * first + "".join(f"{name:>{width}}" for name in matrix.tasks)]
    rows = [("untrained", matrix.untrained)] if matrix.untrained is not None else []
    rows += [(f"after {name}", row) for name, row in zip(matrix.tasks, matrix.rows, strict=False)]
    for name, row in rows:
        lines.append(f"{name:<{first}}" + "".join(f"{number(value, '·'):>{width}}" for value in row))
    return "\n".join(lines)


def render_text(results: Sequence[StreamResult]) -> str:
    """The matrices (of one order), the summary of all arms and ELLA's costs as text for a terminal."""
    orders = by_order(results)
    summaries = {order: summarise(runs) for order, runs in orders.items()}
    blocks = []
    if len(orders) == 1:
        summary = next(iter(summaries.values()))
        blocks += [f"{s['title']}\n{format_matrix(s['matrix'])}" for arm, s in summary.items() if arm != "alone"]
    for order, summary in summaries.items():
        title = order if len(orders) > 1 else ""
        blocks.append("\n".join([*_table(title, summary), *(c.sentence for c in comparisons(orders[order]))]))
    if len(orders) > 1:
        title = f"mean over {len(orders)} orders"
        blocks.append("\n".join([*_table(title, over_orders(summaries)), *(c.sentence for c in comparisons(results))]))
    blocks.append("FWT*: against the untrained model; FWT**: against training on the task alone")
    ella = next((s[OURS] for s in summaries.values() if OURS in s), None)
    if ella:
        blocks.append("\n".join(_costs(ella)))
    return "\n\n".join(blocks) + "\n"


def _table(title: str, summary: Mapping[str, Mapping[str, Any]]) -> list[str]:
    methods, references = ranked(summary)
    names = {arm: s["title"] + (f" ({s['given']})" if s["given"] else "") for arm, s in summary.items()}
    first = max(24, len(title), *(len(name) for name in names.values())) + 1
    lines = [f"{title:{first}}" + "".join(f"{SHORT_TITLES[metric]:>14}" for metric in METRIC_TITLES)]
    for arm in (*methods, *references):
        cells = "".join(f"{mean_and_spread(summary[arm], metric):>14}" for metric in METRIC_TITLES)
        lines.append(f"{names[arm]:{first}}{cells}")
    return lines


def cost_sentence(ella: Mapping[str, Any], order: str = "") -> str:
    """What ELLA costs by its summary, of the runs of ``order`` where that is to be said; "" where nothing is known."""
    said = [f"its {_penalty_takes(ella)}"] if not math.isnan(ella["penalty_share"]) else []
    if ella["state_bytes"]:
        grows = f" ({ella['state_growth']})" if ella["state_growth"] else ""
        said.append(f"after the last task it carries {format_bytes(ella['state_bytes'])}{grows}")
    return f"What ELLA costs{f' on {order}' if order else ''}: {'; '.join(said)}." if said else ""


def _penalty_takes(ella: Mapping[str, Any]) -> str:
    return f"penalty takes {100 * ella['penalty_share']:.1f} % of a {ella['step_milliseconds']:.0f} ms step"


def _costs(ella: Mapping[str, Any]) -> list[str]:
    lines = [] if math.isnan(ella["penalty_share"]) else [f"the {_penalty_takes(ella)}"]
    lines.append(
        f"its state: {format_bytes(ella['state_bytes'])} for {ella['layers']} layers; "
        f"as dense float32 matrices {format_bytes(ella['dense_bytes'])}"
    )
    return lines
