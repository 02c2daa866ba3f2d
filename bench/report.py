"""Rows to files: results.json, results.csv, report.md and PNG plots, each written to a temporary name and renamed."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path

from ella.atomic import write_atomically, write_text_atomically

from .providers import BASELINE, PROVIDERS
from .rows import Row
from .tables import SCHEMA, bytes_text, machine_text, ratio_text, seconds_text, table

__all__ = ["Sink", "markdown", "write_reports"]

RESULTS = "results.json"


class Sink:
    """Collects rows; every row is on disk before the next one is measured.

    Args:
        folder: created if missing; holds ``rows.jsonl`` while a run lasts.
        machine: facts of :func:`bench.measure.machine`.
    """

    def __init__(self, folder: Path, machine: dict):
        self.folder, self.machine, self.rows = folder, machine, []
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "rows.jsonl").open("w", encoding="utf-8")
        self._write({"machine": machine})

    def _write(self, entry: dict) -> None:
        self._file.write(json.dumps(entry) + "\n")
        self._file.flush()

    def add(self, row: Row) -> None:
        self.rows.append(row.as_dict())
        self._write(row.as_dict())

    def results(self) -> dict:
        """The content of results.json."""
        return {"schema": SCHEMA, "machine": self.machine, "rows": self.rows}


def write_reports(results: dict, folder: Path) -> list[Path]:
    """Write every report of ``results`` into ``folder``; plots only where matplotlib is installed."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        RESULTS: json.dumps(results, indent=1),
        "results.csv": _csv(results["rows"]),
        "report.md": markdown(results),
    }
    written = [write_text_atomically(folder / name, text) for name, text in texts.items()]
    return written + _plots(results, folder)


def _csv(rows: Sequence[dict]) -> str:
    out = io.StringIO()
    columns = list(Row("", "", "", "").as_dict())
    writer = csv.DictWriter(out, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {key: json.dumps(row[key]) for key in ("sizes", "extra") if row[key]})
    return out.getvalue()


TITLES = {
    "layer": "One layer",
    "model": "A whole model",
    "scaling": "Scaling in width, k and the number of tasks",
    "fold": "Folding a finished task into the past",
    "step": "A training step, end to end",
    "past": "What finished tasks cost a step (baseline: plain LoRA)",
    "truncation": "Truncated pasts",
}


def markdown(results: dict) -> str:
    """Every row of ``results``, the losing and the skipped ones too."""
    rows = results["rows"]
    lines = ["# Benchmark results", "", machine_text(results["machine"]), ""]
    lines += [
        f"Baseline: **{BASELINE}**. Ratios are baseline time over row time, formed inside a round, with their 20th and "
        "80th percentile. Error: largest relative error of value and gradients against float64; a row over its bound "
        "shows no speed. Roofline: time the counted operations and bytes need at this machine's own matmul and copy "
        "rate, over the time measured.",
        "",
        *(f"- {entry.name}: {entry.note}" for entry in PROVIDERS.values()),
        "",
    ]
    for bench in dict.fromkeys(row["bench"] for row in rows):
        lines += [f"## {TITLES.get(bench, bench)}", ""]
        mine = [row for row in rows if row["bench"] == bench]
        for case, mode in dict.fromkeys((row["case"], row["mode"]) for row in mine):
            group = [row for row in mine if (row["case"], row["mode"]) == (case, mode)]
            lines += [f"### {case}, {mode}" if mode else f"### {case}", "", *_case_lines(group), ""]
    return "\n".join(lines).rstrip() + "\n"


def _case_lines(rows: Sequence[dict]) -> list[str]:
    shown = [row for row in rows if row["median"] is not None or (row["reason"] is None and row["extra"])]
    lines = []
    if any(row["median"] is not None for row in shown):
        lines += table(
            ("provider", "median", "p20 … p80", "ratio", "p20 … p80", "error", "past", "peak", "roofline"),
            (
                (
                    row["provider"],
                    seconds_text(row["median"]),
                    f"{seconds_text(row['p20'])} … {seconds_text(row['p80'])}",
                    ratio_text(row["ratio"]),
                    "–" if row["ratio"] is None else f"{ratio_text(row['ratio_p20'])} … {ratio_text(row['ratio_p80'])}",
                    "–" if row["error"] is None else f"{row['error']:.1e}",
                    bytes_text(row["held_bytes"]),
                    bytes_text(row["peak_bytes"]),
                    "–" if row["roofline"] is None else f"{100 * row['roofline']:.0f}%",
                )
                for row in shown
            ),
        )
    keys = [key for key in dict.fromkeys(key for row in shown for key in row["extra"]) if key not in _PLOT_KEYS]
    if keys:
        lines += [""] if lines else []
        lines += table(
            ("provider", *(key.replace("_", " ") for key in keys)),
            ((row["provider"], *(_value_text(row["extra"].get(key)) for key in keys)) for row in shown),
        )
    missing = [row for row in rows if row["reason"]]
    if missing:
        lines += [""] + [f"- not shown: {row['provider']} – {row['reason']}" for row in missing]
    return lines


# Where a row stands in a plot, not what was found.
_PLOT_KEYS = ("axis", "x", "series")


def _value_text(value) -> str:
    return "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def _plots(results: dict, folder: Path) -> list[Path]:
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    rows = results["rows"]
    written = []
    labels = {"width": "width (out = in)", "k": "components of the past, k", "tasks": "finished tasks"}
    for axis, label in labels.items():
        points = [row for row in rows if row["extra"].get("axis") == axis and row["median"] is not None]
        if points:
            written.append(_line_plot(folder / f"time_{axis}.png", points, label, "seconds a call", _median))
    points = [row for row in rows if row["extra"].get("axis") == "tasks" and row["held_bytes"] is not None]
    if points:
        written.append(
            _line_plot(folder / "memory_tasks.png", points, labels["tasks"], "MiB held and peak", _mebibytes)
        )
    points = [row for row in rows if row["roofline"] is not None and row["flops"] and row["bytes"]]
    if points:
        written.append(_roofline_plot(folder / "roofline.png", points, results["machine"]))
    return written


def _median(row: dict) -> float:
    return row["median"]


def _mebibytes(row: dict) -> float:
    return (row["held_bytes"] + (row["peak_bytes"] or 0)) / 2**20


def _figure(path: Path, draw) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(True, which="major", alpha=0.3)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    draw(axes)
    axes.legend(fontsize=8)
    return write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))


def _line_plot(path: Path, rows: Sequence[dict], x_label: str, y_label: str, value) -> Path:
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        name = row["extra"].get("series") or row["provider"]
        series.setdefault(name, []).append((row["extra"]["x"], value(row)))

    def draw(axes):
        for name, points in series.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=name)
        # k = 0 is a point too, which a plain logarithmic axis cannot show.
        if any(x <= 0 for points in series.values() for x, _ in points):
            axes.set_xscale("symlog", base=2, linthresh=4)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)

    return _figure(path, draw)


def _roofline_plot(path: Path, rows: Sequence[dict], machine: dict) -> Path:
    copy, matmul = machine["copy_bytes_per_s"], machine["matmul_flops_per_s"]

    def draw(axes):
        for name in dict.fromkeys(row["provider"] for row in rows):
            mine = [row for row in rows if row["provider"] == name]
            axes.scatter(
                [row["flops"] / row["bytes"] for row in mine],
                [row["flops"] / row["median"] / 1e9 for row in mine],
                s=18,
                label=name,
            )
        low, high = axes.get_xlim()
        ticks = [low * (high / low) ** (i / 50) for i in range(51)]
        axes.plot(ticks, [min(matmul, copy * x) / 1e9 for x in ticks], "k-", linewidth=1, label="this machine")
        axes.set_xlabel("counted operations per counted byte")
        axes.set_ylabel("GFLOP/s")

    return _figure(path, draw)
