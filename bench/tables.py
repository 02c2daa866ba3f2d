"""Results files and Markdown tables: reading them, units, the line that names the machine. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

__all__ = ["SCHEMA", "bytes_text", "load", "machine_text", "ratio_text", "seconds_text", "table"]

SCHEMA = 1


def load(path: Path) -> dict:
    """Read a results.json; ValueError if it is not one."""
    results = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(results, dict) or results.get("schema") != SCHEMA or "rows" not in results:
        raise ValueError(f"{path} is not a results file of this suite (schema {SCHEMA})")
    return results


def seconds_text(seconds: float | None) -> str:
    """Three significant digits and a unit.

    >>> seconds_text(0.00283), seconds_text(12.0), seconds_text(None)
    ('2.83 ms', '12.0 s', '–')
    """
    if seconds is None:
        return "–"
    unit, name = next((u for u in ((1.0, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))
    scaled = seconds / unit
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {name}"


def bytes_text(count: int | None) -> str:
    """Binary units, two or three digits.

    >>> bytes_text(64 * 2**20), bytes_text(1536), bytes_text(None)
    ('64.0 MiB', '1.5 KiB', '–')
    """
    if count is None:
        return "–"
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"


def ratio_text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}×" if value < 100 else f"{value:.0f}×"


def machine_text(machine: dict) -> str:
    """One paragraph: a number without a machine is not a number."""
    where = f"{machine['name']}, {machine['cores']} cores, {machine['threads']} threads pinned"
    return (
        f"{where}; copy {machine['copy_bytes_per_s'] / 1e9:.1f} GB/s, fp32 matmul "
        f"{machine['matmul_flops_per_s'] / 1e9:.0f} GFLOP/s; torch {machine['torch']}, Python {machine['python']}, "
        f"commit {machine['commit']}, {machine['date']}; load {machine['load_before']} before the run; "
        f"{machine['precision']}"
    )


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table, first column left, the others right."""
    return [
        f"| {' | '.join(header)} |",
        f"|{'|'.join(['---'] + ['---:'] * (len(header) - 1))}|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]
