"""The ratios the suite has to show, found in a results file: ``python -m bench.headline [RESULTS.json]``.

The issue's marks hold for value and gradients on two CPU cores, against dense eager autograd in the same run, by the
best exact path of ours; the projected norm is another penalty and does not count.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .providers import PROVIDERS
from .shapes import LAYER_CASES, MODEL_CASES
from .tables import load, ratio_text

__all__ = ["MARKS", "MODES", "Mark", "best_row", "lines", "main"]

COMMITTED = Path(__file__).with_name("results") / "cpu.json"
# Value and gradients, through autograd or added in place: both are ways a training step has them.
MODES = ("both", "in-place")


class Mark(NamedTuple):
    """A case of bench_layer or bench_model, and the ratio wanted there."""

    bench: str
    case: str
    wanted: float


def _named(cases: Sequence, start: str) -> str:
    return next(case.name for case in cases if case.name.startswith(start))


MARKS = (
    Mark("layer", _named(LAYER_CASES, "LLaMA-3.1-8B q 4096x4096 r8 k8"), 100),
    Mark("layer", _named(LAYER_CASES, "LLaMA-3.1-8B q 4096x4096 r8 k16"), 20),
    Mark("layer", _named(LAYER_CASES, "LLaMA-3.1-8B down 4096x14336 r16 k16"), 10),
    Mark("model", _named(MODEL_CASES, "T5-large, q and v (144 layers) r8 k8"), 25),
)


def best_row(rows: Sequence[dict], bench: str, case: str, modes: Sequence[str] = MODES) -> dict | None:
    """The fastest exact row of ours by its ratio to the baseline; None where nothing of the case has one."""
    chosen = [
        row
        for row in rows
        if (row["bench"], row["case"]) == (bench, case)
        and row["mode"] in modes
        and row["ratio"] is not None
        and _is_exact(row["provider"])
    ]
    return max(chosen, key=lambda row: row["ratio"], default=None)


def _is_exact(name: str) -> bool:
    entry = PROVIDERS.get(name)
    return entry is not None and entry.is_ours and entry.penalty == "hadamard"


def lines(results: dict) -> list[str]:
    """One line per mark: the ratio reached, its spread, the way, the error and whether the mark is met."""
    out = []
    for mark in MARKS:
        row = best_row(results["rows"], mark.bench, mark.case)
        if row is None:
            out.append(f"{mark.case}: not measured, wanted {mark.wanted:g}×")
            continue
        ratio, low, high = (ratio_text(row[key]) for key in ("ratio", "ratio_p20", "ratio_p80"))
        verdict = "reached" if row["ratio"] >= mark.wanted else "NOT reached"
        way = f"{row['provider']}, {row['mode']}, error {row['error']:.1e}"
        out.append(f"{mark.case}: {ratio} ({low} … {high}) by {way}; wanted {mark.wanted:g}×, {verdict}")
    return out


def main(arguments: Sequence[str]) -> int:
    results = load(Path(arguments[0]) if arguments else COMMITTED)
    print("\n".join(lines(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
