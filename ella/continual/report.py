"""The report of a demo or a run: ``report.json`` for programs, a self-contained ``report.html`` for people."""

from __future__ import annotations

import html
import json
import math
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import fmean
from typing import Any

from ella.atomic import write_text_atomically

from .arms import ARMS
from .metrics import NAN, AccuracyMatrix
from .stream import StreamResult

__all__ = ["environment", "format_matrix", "mean_matrix", "render_html", "summarise", "title_of", "write_report"]

METRIC_TITLES = {
    "OA": "overall accuracy",
    "BWT": "backward transfer",
    "FWT_zero_shot": "forward transfer, against the untrained model",
    "FWT_learning": "forward transfer, against training alone",
}
COLORS = {
    "seqlora": "#b4552d",
    "inclora": "#8a8f98",
    "ella": "#1f6feb",
    "alone": "#3c8d5a",
    "olora": "#a371f7",
    "nlora": "#d4a72c",
    "ewc": "#bf3989",
    "replay": "#2da44e",
    "slao": "#1b7c83",
    "osf": "#953800",
    "lines": "#57606a",
    "joint": "#24292f",
}


def title_of(label: str) -> str:
    """What a run is called in tables: its method's title, or the label it was given."""
    return ARMS[label].title if label in ARMS else label


def color_of(label: str) -> str:
    """A method's own colour; for other labels one that follows from the name."""
    others = ("#0550ae", "#6639ba", "#116329", "#a40e26", "#4d2d00")
    return COLORS.get(label, others[sum(label.encode()) % len(others)])


def environment(command: Sequence[str] | None = None) -> dict[str, Any]:
    """Machine, versions and command: what a number needs beside it."""
    import torch

    versions = {}
    for package in ("ella-kernels", "torch", "triton", "peft", "transformers", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else _processor()
    return {
        "machine": f"{device}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "command": shlex.join(command if command is not None else [Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def mean_matrix(results: Sequence[StreamResult]) -> AccuracyMatrix:
    """The cell-wise mean matrix of runs that differ in their seed only."""
    matrices = [result.matrix for result in results]
    rows = [_mean_rows([m.rows[i] for m in matrices]) for i in range(min(len(m.rows) for m in matrices))]
    extra = {
        name: _mean_rows([getattr(m, name) for m in matrices])
        for name in ("untrained", "alone")
        if all(getattr(m, name) is not None for m in matrices)
    }
    return AccuracyMatrix(matrices[0].tasks, rows, **extra)


def _mean_rows(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) / len(column) for column in zip(*rows, strict=True)]


def summarise(results: Sequence[StreamResult]) -> dict[str, dict[str, Any]]:
    """Per arm, in order of appearance: mean metrics, their per-seed values, times and sizes."""
    arms: dict[str, list[StreamResult]] = {}
    for result in results:
        arms.setdefault(result.arm, []).append(result)
    summary = {}
    for arm, runs in arms.items():
        per_seed = [run.matrix.summary() for run in runs]
        steps = sum(t["steps"] for run in runs for t in run.tasks)
        summary[arm] = {
            "seeds": [run.seed for run in runs],
            "matrix": mean_matrix(runs),
            "mean": {name: _mean([values[name] for values in per_seed]) for name in METRIC_TITLES},
            "per_seed": {name: [values[name] for values in per_seed] for name in METRIC_TITLES},
            "seconds": fmean(sum(t["seconds"] + t["evaluation_seconds"] for t in run.tasks) for run in runs),
            "step_milliseconds": 1e3 * sum(t["seconds"] for run in runs for t in run.tasks) / max(steps, 1),
            "penalty_share": _mean([run.penalty_share() for run in runs]),
            "state_bytes": max(run.state_bytes for run in runs),
            "dense_bytes": max(run.dense_bytes for run in runs),
            "layers": runs[0].layers,
        }
    return summary


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else NAN


def format_matrix(matrix: AccuracyMatrix) -> str:
    """The matrix as aligned text, rows "after <task>", cells not measured as dots."""
    width = max(8, *(len(name) + 2 for name in matrix.tasks))
    first = max(len(name) for name in matrix.tasks) + 8
    lines = [" " * first + "".join(f"{name:>{width}}" for name in matrix.tasks)]
    rows = [("untrained", matrix.untrained)] if matrix.untrained is not None else []
    rows += [(f"after {name}", row) for name, row in zip(matrix.tasks, matrix.rows, strict=False)]
    for name, row in rows:
        lines.append(f"{name:<{first}}" + "".join(f"{_number(value, '·'):>{width}}" for value in row))
    return "\n".join(lines)


def write_report(
    out_dir: str | Path,
    results: Sequence[StreamResult],
    *,
    title: str,
    notes: Mapping[str, str],
    env: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` (each atomically) and return their paths.

    ``notes`` are shown as rows of facts (data, model, strength); ``env`` is what :func:`environment` gave.
    """
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    summary = summarise(results)
    data = {
        "title": title,
        "notes": dict(notes),
        "environment": dict(env),
        "arms": {arm: values | {"matrix": values["matrix"].to_dict()} for arm, values in summary.items()},
        "runs": [result.to_dict() for result in results],
    }
    json_path, html_path = out / "report.json", out / "report.html"
    write_text_atomically(json_path, json.dumps(_finite(data), indent=1, ensure_ascii=False))
    write_text_atomically(html_path, render_html(results, title=title, notes=notes, env=env))
    return json_path, html_path


def _finite(value: Any) -> Any:
    """Json has no NaN: null instead."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def render_html(
    results: Sequence[StreamResult], *, title: str, notes: Mapping[str, str], env: Mapping[str, Any]
) -> str:
    """The whole page as text; no script, no external file."""
    summary = summarise(results)
    arms = [arm for arm in summary if arm != "alone"]
    runs = {arm: [r for r in results if r.arm == arm] for arm in arms}
    parts = [
        f"<h1>{_esc(title)}</h1>",
        *([_headline(summary)] if arms else []),
        *(_curves(results[0].matrix.tasks, runs) if arms else []),
        "<h2>Accuracy matrices</h2>",
        "<p>Row: after which task. Column: tested on which. Percent, mean over seeds; the diagonal is outlined.</p>",
        '<div class="panels">',
        *(_matrix_table(arm, summary[arm]["matrix"]) for arm in summary),
        "</div>",
        "<h2>Cost</h2>",
        _cost_table(summary),
        "<h2>How it was run</h2>",
        _facts(notes, env, results),
    ]
    return _PAGE.format(title=_esc(title), style=_STYLE, body="\n".join(parts))


def _curves(tasks: Sequence[str], runs: Mapping[str, Sequence[StreamResult]]) -> list[str]:
    """The forgetting curves of all tasks but the last; nothing for a stream of one."""
    if len(tasks) < 2:
        return []
    return [
        "<h2>What is still known</h2>",
        "<p>Each panel is one task: its accuracy from the moment it was learned to the end of the stream. "
        "Thick lines are means over seeds, thin lines single seeds. Flat is good.</p>",
        _legend(list(runs)),
        '<div class="panels">',
        *(_curve_svg(name, j, runs) for j, name in enumerate(tasks[:-1])),
        "</div>",
    ]


def _headline(summary: Mapping[str, Any]) -> str:
    shown = [name for name in METRIC_TITLES if any(not math.isnan(s["mean"][name]) for s in summary.values())]
    head = "".join(f'<th title="{_esc(METRIC_TITLES[n])}">{_esc(METRIC_TITLES[n])}</th>' for n in shown)
    rows = []
    for arm, values in summary.items():
        if arm == "alone":
            continue
        cells = "".join(
            f"<td><b>{_number(values['mean'][n], '–', sign=n != 'OA')}</b>{_spread(values['per_seed'][n])}</td>"
            for n in shown
        )
        rows.append(f'<tr class="{arm}"><th>{_dot(arm)}{_esc(title_of(arm))}</th>{cells}</tr>')
    return f'<table class="headline"><tr><th></th>{head}</tr>{"".join(rows)}</table>'


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2 or any(math.isnan(v) for v in values):
        return ""
    return f"<small> ({', '.join(f'{v:.1f}' for v in values)})</small>"


def _dot(arm: str) -> str:
    return f'<i class="dot" style="background:{color_of(arm)}"></i>'


def _legend(arms: Sequence[str]) -> str:
    return '<p class="legend">' + "".join(f"<span>{_dot(a)}{_esc(title_of(a))}</span>" for a in arms) + "</p>"


def _curve_svg(name: str, task: int, runs: Mapping[str, Sequence[StreamResult]]) -> str:
    """A forgetting curve: x the task trained on last, y the accuracy on ``task``."""
    width, height, left, right, top, bottom = 340, 220, 38, 12, 12, 46
    tasks = next(iter(runs.values()))[0].matrix.tasks
    last = len(tasks) - 1

    def x(i: float) -> float:
        return left + (width - left - right) * (i - task) / max(last - task, 1)

    def y(v: float) -> float:
        return top + (height - top - bottom) * (1 - v / 100)

    marks = [
        f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(v):.1f}" y2="{y(v):.1f}"/>'
        f'<text x="{left - 6}" y="{y(v) + 4:.1f}" text-anchor="end">{v}</text>'
        for v in (0, 25, 50, 75, 100)
    ]
    for i in range(task, last + 1):
        anchor = "start" if i == task else "end" if i == last else "middle"
        # Neighbouring names stand on two lines so that long ones do not run into each other.
        level = height - bottom + (18 if (i - task) % 2 == 0 else 34)
        marks.append(f'<text x="{x(i):.1f}" y="{level}" text-anchor="{anchor}">{_esc(_short(tasks[i]))}</text>')
    for arm, group in runs.items():
        color = color_of(arm)
        if len(group) > 1:
            for run in group:
                points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in run.matrix.curve(task))
                marks.append(f'<polyline points="{points}" stroke="{color}" stroke-width="1" opacity=".35"/>')
        curve = mean_matrix(group).curve(task)
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in curve)
        marks.append(f'<polyline points="{points}" stroke="{color}" stroke-width="2.5"/>')
        marks += [
            f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3.2" fill="{color}">'
            f"<title>{_esc(title_of(arm))}: {v:.1f} after {_esc(tasks[i])}</title></circle>"
            for i, v in curve
        ]
    return (
        f'<figure><figcaption>{_esc(name)}</figcaption><svg viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="accuracy on {_esc(name)}">{"".join(marks)}</svg></figure>'
    )


def _matrix_table(arm: str, matrix: AccuracyMatrix) -> str:
    head = "".join(f"<th>{_esc(name)}</th>" for name in matrix.tasks)
    rows = []
    if matrix.untrained is not None:
        quiet = "".join(f"<td class='quiet'>{_number(v, '')}</td>" for v in matrix.untrained)
        rows.append(f"<tr><th>untrained</th>{quiet}</tr>")
    for i, row in enumerate(matrix.rows):
        cells = []
        for j, value in enumerate(row):
            shade = 0.0 if math.isnan(value) or j > i else value / 100
            kind = "own" if i == j else "quiet" if j > i else ""
            cells.append(
                f'<td class="{kind}" style="--shade:{shade:.2f};--hue:{color_of(arm)}">{_number(value, "")}</td>'
            )
        rows.append(f"<tr><th>{_esc(matrix.tasks[i])}</th>{''.join(cells)}</tr>")
    table = f'<table class="matrix"><tr><th></th>{head}</tr>{"".join(rows)}</table>'
    return f"<figure><figcaption>{_dot(arm)}{_esc(title_of(arm))}</figcaption>{table}</figure>"


def _cost_table(summary: Mapping[str, Any]) -> str:
    rows = []
    for arm, s in summary.items():
        share = "–" if math.isnan(s["penalty_share"]) else f"{100 * s['penalty_share']:.1f} %"
        state = f"{format_bytes(s['state_bytes'])}" if s["state_bytes"] else "–"
        dense = f"{format_bytes(s['dense_bytes'])}" if s["state_bytes"] else "–"
        rows.append(
            f"<tr><th>{_dot(arm)}{_esc(title_of(arm))}</th><td>{s['seconds']:.0f} s</td>"
            f"<td>{s['step_milliseconds']:.0f} ms</td><td>{share}</td><td>{state}</td><td>{dense}</td></tr>"
        )
    return (
        "<table><tr><th></th><th>one run</th><th>one step</th><th>penalty's share of a step</th>"
        f"<th>stored past</th><th>as dense float32</th></tr>{''.join(rows)}</table>"
    )


def _facts(notes: Mapping[str, str], env: Mapping[str, Any], results: Sequence[StreamResult]) -> str:
    config = next((r.config for r in results if r.arm == "ella"), results[0].config)
    settings = {k: v for k, v in config.items() if k not in ("arm", "settings", "label", "order", "seed", "ella")}
    rows = {
        **notes,
        "seeds": ", ".join(str(seed) for seed in sorted({r.seed for r in results})),
        "ELLA settings": ", ".join(f"{k} {v}" for k, v in config["ella"].items()),
        "training": ", ".join(f"{k} {v}" for k, v in settings.items()),
        "machine": env["machine"],
        "system": f"{env['system']}, Python {env['python']}",
        "versions": ", ".join(f"{name} {number}" for name, number in env["versions"].items()),
    }
    cells = "".join(f"<tr><th>{_esc(k)}</th><td>{_esc(str(v))}</td></tr>" for k, v in rows.items())
    command = f"<tr><th>command</th><td><code>{_esc(env['command'])}</code></td></tr>"
    return f'<table class="facts">{cells}{command}</table>'


def format_bytes(n: float) -> str:
    """1536 -> "1.5 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024 or unit == "GiB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    raise AssertionError("unreachable")


def _number(value: float, missing: str, sign: bool = False) -> str:
    return missing if math.isnan(value) else f"{value:{'+' if sign else ''}.1f}"


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _esc(text: str) -> str:
    return html.escape(text, quote=True)


_STYLE = """
:root { color-scheme: light dark; --ink:#1c2128; --soft:#636c76; --line:#d8dee4; --paper:#fff; --card:#f6f8fa }
@media (prefers-color-scheme: dark) {
  :root { --ink:#e6edf3; --soft:#9198a1; --line:#3d444d; --paper:#0d1117; --card:#151b23 } }
body { font:15px/1.5 system-ui,sans-serif; color:var(--ink); background:var(--paper); max-width:1080px;
  margin:0 auto; padding:32px 20px 64px }
h1 { font-size:26px; margin:0 0 20px } h2 { font-size:19px; margin:40px 0 8px }
p { color:var(--soft); margin:0 0 12px; max-width:70ch }
table { border-collapse:collapse; font-variant-numeric:tabular-nums }
th { text-align:left; font-weight:500; color:var(--soft) } td { text-align:right } th,td { padding:6px 12px }
tr+tr th, tr+tr td { border-top:1px solid var(--line) }
.headline td b { font-size:20px } .headline tr.ella { background:var(--card) }
.headline th { max-width:190px; vertical-align:bottom } small { color:var(--soft) }
.panels { display:flex; flex-wrap:wrap; gap:16px } figure { margin:0; background:var(--card); padding:14px;
  border:1px solid var(--line); border-radius:8px } figcaption { font-weight:600; margin-bottom:6px }
svg { width:308px; display:block } svg text { font-size:11px; fill:var(--soft) } polyline { fill:none }
.grid { stroke:var(--line) }
.legend span { margin-right:18px } .dot { display:inline-block; width:10px; height:10px; border-radius:50%;
  margin-right:7px }
.matrix { font-size:13px } .matrix th,.matrix td { padding:5px 9px; border:0 }
.matrix td { background:color-mix(in srgb, var(--hue, transparent) calc(var(--shade, 0) * 45%), transparent) }
.matrix .own { outline:1.5px solid var(--ink); outline-offset:-2px; border-radius:3px }
.matrix .quiet { color:var(--soft); font-style:italic }
.facts td { text-align:left; word-break:break-word } .facts th { white-space:nowrap; vertical-align:top }
code { font-size:13px }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>{style}</style></head>
<body>
{body}
</body></html>
"""
