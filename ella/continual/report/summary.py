"""Numbers of many runs: per arm of one order, and over orders."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev
from typing import Any

from ..arms import ARMS, OLD_NAMES
from ..metrics import NAN, AccuracyMatrix
from ..stream import StreamResult

__all__ = [
    "METRIC_TITLES",
    "average_so_far",
    "by_arm",
    "by_order",
    "given_to",
    "growth",
    "interference",
    "mean_matrix",
    "over_orders",
    "ranked",
    "summarise",
    "title_of",
]

METRIC_TITLES = {
    "OA": "overall accuracy",
    "BWT": "backward transfer",
    "FWT_zero_shot": "forward transfer, against the untrained model",
    "FWT_learning": "forward transfer, against training alone",
}


def title_of(label: str) -> str:
    """What a run is called in tables: its method's title, or the label it was given."""
    return ARMS[label].title if label in ARMS else label


def given_to(result: StreamResult) -> str:
    """What the run's method has that a stream does not give; "" for a method that keeps to the stream."""
    name = result.config["arm"]
    kind = ARMS.get(OLD_NAMES.get(name, name))
    return kind.given if kind else ""


def by_order(results: Iterable[StreamResult]) -> dict[str, list[StreamResult]]:
    """The runs of every order of tasks, in order of appearance; "" where the order has no name."""
    return _grouped((result.config.get("order", ""), result) for result in results)


def by_arm(results: Iterable[StreamResult]) -> dict[str, list[StreamResult]]:
    """The runs of every label, in order of appearance."""
    return _grouped((result.arm, result) for result in results)


def _grouped(pairs: Iterable[tuple[str, StreamResult]]) -> dict[str, list[StreamResult]]:
    groups: dict[str, list[StreamResult]] = {}
    for name, result in pairs:
        groups.setdefault(name, []).append(result)
    return groups


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
    return [mean(column) for column in zip(*rows, strict=True)]


def average_so_far(matrix: AccuracyMatrix) -> list[float]:
    """mean_{j≤i} R[i][j] for every row i; NaN where one of them was not measured."""
    return [mean(row[: i + 1]) for i, row in enumerate(matrix.rows)]


def summarise(results: Sequence[StreamResult]) -> dict[str, dict[str, Any]]:
    """Per arm of one order, in order of appearance: metrics, their spread and per-seed values, times and sizes.

    Runs that have not finished count for an arm only that has no finished one, and then without metrics.
    """
    return {arm: _summary(runs) for arm, runs in by_arm(results).items()}


def _summary(runs: Sequence[StreamResult]) -> dict[str, Any]:
    done = [run for run in runs if run.matrix.complete]
    metrics = [run.matrix.summary() for run in done]
    per_seed = {name: [values[name] for values in metrics] for name in METRIC_TITLES}
    runs = done or runs
    tasks = [t for run in runs for t in run.tasks]
    own = [t for t in tasks if t["penalty_seconds"] > 0]
    by_task = _bytes_by_task(runs)
    return {
        "title": title_of(runs[0].arm),
        "given": given_to(runs[0]),
        "seeds": [run.seed for run in done],
        "matrix": mean_matrix(runs),
        "mean": {name: mean(values) for name, values in per_seed.items()},
        "sd": {name: spread(values) for name, values in per_seed.items()},
        "per_seed": per_seed,
        "seconds": fmean(run.seconds for run in runs),
        "step_milliseconds": 1e3 * sum(t["seconds"] for t in tasks) / max(sum(t["steps"] for t in tasks), 1),
        "own_milliseconds": (
            1e3 * sum(t["penalty_seconds"] for t in own) / max(sum(t["steps"] for t in own), 1) if own else NAN
        ),
        "penalty_share": mean([run.penalty_share() for run in runs]),
        "peak_bytes": max((t.get("peak_bytes", 0) for t in tasks), default=0),
        "state_bytes": max(run.state_bytes for run in runs),
        "state_bytes_by_task": by_task,
        "state_growth": growth(by_task),
        "dense_bytes": max(run.dense_bytes for run in runs),
        "layers": runs[0].layers,
    }


def _bytes_by_task(runs: Sequence[StreamResult]) -> list[int]:
    """Bytes carried after every task, the most of any seed; nothing where a run did not record them."""
    columns = zip(*([t.get("state_bytes") for t in run.tasks] for run in runs), strict=False)
    found = [list(column) for column in columns]
    return [] if any(None in column for column in found) else [max(column) for column in found]


def growth(by_task: Sequence[int]) -> str:
    """How the bytes carried go with the number of tasks, in words; "" where that cannot be said.

    >>> growth([4, 4, 4]), growth([4, 8, 12]), growth([4, 8, 8]), growth([0, 0])
    ('constant', 'growing', 'constant from task 2 on', 'nothing')
    """
    if not any(by_task):
        return "nothing" if by_task else ""
    if len(by_task) < 2:
        return ""
    if any(after < before for before, after in pairwise(by_task)):
        return "varying"
    level = by_task.index(by_task[-1])  # it never falls, so all from here on are the last
    if level == 0:
        return "constant"
    return "growing" if level == len(by_task) - 1 else f"constant from task {level + 1} on"


def ranked(summary: Mapping[str, Mapping[str, Any]], metric: str = "OA") -> tuple[list[str], list[str]]:
    """(methods, references), each from the best mean to the worst and those without one last."""

    def key(arm: str) -> float:
        value = summary[arm]["mean"][metric]
        return math.inf if math.isnan(value) else -value

    arms = sorted(summary, key=key)
    return [a for a in arms if not summary[a]["given"]], [a for a in arms if summary[a]["given"]]


def over_orders(summaries: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Per arm, from its summary in every order: the mean of the orders' means, and those.

    An arm that lacks an order has no mean: over fewer orders it could not be compared.
    """
    found: dict[str, dict[str, Any]] = {}
    for arm in dict.fromkeys(arm for summary in summaries.values() for arm in summary):
        of_arm = {order: summary.get(arm) for order, summary in summaries.items()}
        first = next(values for values in of_arm.values() if values)
        orders = {
            metric: {order: values["mean"][metric] if values else NAN for order, values in of_arm.items()}
            for metric in METRIC_TITLES
        }
        means = {metric: mean(list(values.values())) for metric, values in orders.items()}
        found[arm] = {"title": first["title"], "given": first["given"], "mean": means, "orders": orders}
    return found


@dataclass(frozen=True)
class Interference:
    """``values[layer][task]``: the raw P of a layer at a task's end, mean over seeds; NaN where there is none."""

    tasks: list[str]
    layers: list[str]
    values: list[list[float]]


def interference(runs: Sequence[StreamResult]) -> Interference | None:
    """What the runs recorded of P per layer; None where they did not."""
    records = [[t.get("interference") or {} for t in run.tasks] for run in runs]
    layers = list(dict.fromkeys(layer for tasks in records for found in tasks for layer in found))
    if not layers:
        return None
    names = runs[0].matrix.tasks

    def at_end_of(i: int, layer: str) -> list[float]:
        return [tasks[i][layer] for tasks in records if i < len(tasks) and layer in tasks[i]]

    values = [[mean(at_end_of(i, layer)) for i in range(len(names))] for layer in layers]
    return Interference(names, layers, values)


def mean(values: Sequence[float]) -> float:
    """NaN for no values, and where one is NaN."""
    return math.fsum(values) / len(values) if values else NAN


def spread(values: Sequence[float]) -> float:
    """The sample standard deviation; NaN for fewer than two values, and where one is NaN."""
    return NAN if len(values) < 2 or any(math.isnan(v) for v in values) else stdev(values)
