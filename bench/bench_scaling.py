"""How time and bytes grow: with the width of the weight, with the components of the past, with the finished tasks.

A penalty's time depends on the past's shape alone, so the pasts of the tasks axis are random ones of the shape that so
many tasks of rank 8 leave behind; what truncation does to the value is bench_truncation's subject.
"""

from __future__ import annotations

import pytest

from .providers import BASELINE
from .rows import measure_case
from .shapes import Case, Size

_OURS = ("ours auto, torch", "ours auto, triton")
_ALL = (BASELINE, "dense compiled", "ours gram, torch", "ours stream, torch", "ours spectral, torch", *_OURS)
RANK = 8
PAST_RANKS = (32, 128)


def _width(width: int) -> Case:
    return Case(f"width {width}, r8 k8", (Size(width, width, RANK, 8),), width <= 4096)


def _components(k: int) -> Case:
    return Case(f"4096x4096 r8, k = {k}", (Size(4096, 4096, RANK, k, energy=k == 0),), k <= 128)


def _tasks(tasks: int, past_rank: int | None) -> Case:
    """``tasks`` finished tasks of rank 8: all factors kept (None), or the past capped at ``past_rank``."""
    k = RANK * tasks if past_rank is None else min(RANK * tasks, past_rank)
    kept = "all factors kept" if past_rank is None else f"past_rank {past_rank}"
    size = Size(2048, 2048, RANK, k, energy=k < RANK * tasks)
    return Case(f"{tasks} tasks, 2048x2048, {kept}", (size,))


# case, axis, x, providers, what sets the series apart beyond the provider
_CASES = [
    *((_width(n), "width", n, _ALL, "") for n in (256, 512, 1024, 2048, 4096, 8192)),
    *((_components(k), "k", k, _ALL, "") for k in (0, 4, 8, 16, 32, 64, 128, 256, 512)),
    *(
        (_tasks(n, cap), "tasks", n, names, suffix)
        for n in (1, 4, 16, 32, 100)
        for cap, names, suffix in (
            *((cap, (BASELINE, *_OURS), f", past_rank {cap}") for cap in PAST_RANKS),
            (None, (BASELINE, "dense rebuilt", *_OURS), ", all factors kept"),
        )
    ),
]


@pytest.mark.parametrize(("case", "axis", "x", "names", "suffix"), [pytest.param(*c, id=c[0].name) for c in _CASES])
def bench_scaling(case, axis, x, names, suffix, limits, device, report_all):
    found = measure_case("scaling", case, "both", names, limits._replace(budget=limits.budget / 2), device)
    for name, (row, _) in found.items():
        # A stored W_past is the same matrix whatever the number of tasks: one series.
        series = name if axis != "tasks" or name == BASELINE else name + suffix
        row.extra |= {"axis": axis, "x": x, "series": series}
    report_all(found)
