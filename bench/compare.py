"""Two results files side by side, row by row: ``python -m bench.compare BEFORE.json AFTER.json``.

``ratio`` is the time before over the time after: above 1 is faster. Its spread combines both files' quantiles, the
slowest plausible reading to the fastest; a change whose spread includes 1 is not one.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .tables import load, machine_text, ratio_text, seconds_text, table

__all__ = ["Change", "compare", "main", "markdown"]

_KEY = ("bench", "case", "mode", "provider")


class Change(NamedTuple):
    """One row in both files, or in one of them.

    Attributes:
        key: bench, case, mode, provider.
        before, after: median seconds, or None where that file has no speed.
        ratio, low, high: ``before/after`` of the medians, of p20 over p80, and of p80 over p20; None without both.
        note: why there is no ratio.
    """

    key: tuple[str, str, str, str]
    before: float | None
    after: float | None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "faster", "slower" or "same": the whole spread on one side of 1, or not."""
        if self.ratio is None:
            return self.note
        return "faster" if self.low > 1 else "slower" if self.high < 1 else "same"


def compare(before: dict, after: dict) -> list[Change]:
    """Every row of either results file, in the order of ``before``, then what only ``after`` has."""
    old, new = ({tuple(row[key] for key in _KEY): row for row in results["rows"]} for results in (before, after))
    return [_change(key, old.get(key), new.get(key)) for key in dict.fromkeys((*old, *new))]


def _change(key: tuple, old: dict | None, new: dict | None) -> Change:
    times = [None if row is None else row["median"] for row in (old, new)]
    for row, where in ((old, "before"), (new, "after")):
        if row is None:
            return Change(key, *times, note=f"not measured {where}")
        if row["median"] is None:
            return Change(key, *times, note=f"{where}: {row['reason'] or 'has no time'}")
    return Change(
        key,
        *times,
        ratio=old["median"] / new["median"],
        low=old["p20"] / new["p80"],
        high=old["p80"] / new["p20"],
    )


def markdown(before: dict, after: dict) -> str:
    """Both machines, the table of ratios, and the rows that only one side measured."""
    changes = compare(before, after)
    machines = [results["machine"] for results in (before, after)]
    lines = [f"before: {machine_text(machines[0])}", "", f"after: {machine_text(machines[1])}", ""]
    if any(machines[0][key] != machines[1][key] for key in ("name", "threads", "device")):
        lines += ["The machines differ: a ratio below says as much about them as about the code.", ""]
    timed = [change for change in changes if change.ratio is not None]
    counts = {verdict: sum(change.verdict == verdict for change in timed) for verdict in ("faster", "slower", "same")}
    lines += [", ".join(f"{count} {verdict}" for verdict, count in counts.items()), ""]
    lines += table(
        ("row", "before", "after", "ratio", "spread", "verdict"),
        (
            (
                ", ".join(part for part in change.key if part),
                seconds_text(change.before),
                seconds_text(change.after),
                ratio_text(change.ratio),
                f"{ratio_text(change.low)} … {ratio_text(change.high)}",
                change.verdict,
            )
            for change in timed
        ),
    )
    # Rows without a clock (truncation) and those skipped alike on both sides say nothing here.
    single = [change for change in changes if change.ratio is None and (change.before, change.after) != (None, None)]
    if single:
        lines += ["", *(f"- {', '.join(part for part in change.key if part)}: {change.note}" for change in single)]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description="ratio per row of two results files")
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    given = parser.parse_args(arguments)
    try:
        print(markdown(load(given.before), load(given.after)), end="")
    except (OSError, ValueError) as error:
        print(f"bench.compare: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
