"""The report of a demo or a run: ``report.json`` for programs, ``report.html`` and ``report.md`` for people."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ella.atomic import write_text_atomically

from ..stream import StreamResult
from .comparison import Comparison, comparisons
from .markdown import render_blocks_markdown
from .page import render_blocks_html
from .sections import content
from .summary import by_order, mean_matrix, over_orders, summarise, title_of
from .text import format_bytes, format_matrix, render_text

__all__ = [
    "Comparison",
    "comparisons",
    "format_bytes",
    "format_matrix",
    "mean_matrix",
    "render_html",
    "render_markdown",
    "render_text",
    "summarise",
    "title_of",
    "write_report",
]


def write_report(
    out_dir: str | Path,
    results: Sequence[StreamResult],
    *,
    title: str,
    notes: Mapping[str, str],
    env: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write ``report.json``, ``report.md`` and ``report.html`` (each atomically); returns the first's and last's paths.

    ``notes`` are shown as rows of facts (data, model, strength); ``env`` is what
    :func:`~ella.continual.environment.environment` gave. Results of one order of tasks stand under "arms" in the json,
    those of several under "orders", each with its "arms". The commit is that of the runs, where they know theirs: they
    may be older than the report.
    """
    commits = dict.fromkeys(commit for result in results for commit in result.commits)
    env = dict(env) | ({"commit": ", ".join(commits)} if commits else {})
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    json_path, html_path = out / "report.json", out / "report.html"
    data = {
        "title": title,
        "notes": dict(notes),
        "environment": env,
        **_numbers(results),
        "runs": [result.to_dict() for result in results],
    }
    blocks = content(results, title=title, notes=notes, env=env)
    write_text_atomically(json_path, json.dumps(_finite(data), indent=1, ensure_ascii=False))
    write_text_atomically(out / "report.md", render_blocks_markdown(blocks))
    write_text_atomically(html_path, render_blocks_html(title, blocks))
    return json_path, html_path


def render_html(
    results: Sequence[StreamResult], *, title: str, notes: Mapping[str, str], env: Mapping[str, Any]
) -> str:
    """The whole page as text; no script, no external file."""
    return render_blocks_html(title, content(results, title=title, notes=notes, env=env))


def render_markdown(
    results: Sequence[StreamResult], *, title: str, notes: Mapping[str, str], env: Mapping[str, Any]
) -> str:
    """The page's numbers and sentences as markdown."""
    return render_blocks_markdown(content(results, title=title, notes=notes, env=env))


def _numbers(results: Sequence[StreamResult]) -> dict[str, Any]:
    orders = by_order(results)
    if len(orders) == 1:
        return _of_order(results)
    summaries = {order: summarise(runs) for order, runs in orders.items()}
    return {
        "orders": {order: _of_order(runs) for order, runs in orders.items()},
        "over_orders": {"arms": over_orders(summaries), "comparisons": [c.to_dict() for c in comparisons(results)]},
    }


def _of_order(runs: Sequence[StreamResult]) -> dict[str, Any]:
    return {
        "arms": {arm: values | {"matrix": values["matrix"].to_dict()} for arm, values in summarise(runs).items()},
        "comparisons": [c.to_dict() for c in comparisons(runs)],
    }


def _finite(value: Any) -> Any:
    """Json has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
