"""What a report says, block by block; the form is that of :mod:`.page` and :mod:`.markdown`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import chain
from typing import Any

from ella.config import EllaConfig

from ..arms import ARMS, OLD_NAMES
from ..metrics import AccuracyMatrix
from ..stream import StreamResult, training_settings
from .blocks import Block, Cell, Chart, Divider, Heading, Panels, Row, Table, Text
from .charts import Line, Look, legend, line_chart, looks, percents, strip_chart
from .comparison import OURS, comparisons
from .general import general_blocks
from .published import FAMILIES, family_of, published_blocks
from .summary import (
    METRIC_TITLES,
    average_so_far,
    by_arm,
    by_order,
    interference,
    mean,
    over_orders,
    ranked,
    summarise,
    title_of,
)
from .text import cost_sentence, format_bytes, mean_and_spread, number

__all__ = ["content"]

Summary = Mapping[str, Mapping[str, Any]]
#: How to read the metrics, for who meets them here.
METRICS = (
    "Overall accuracy is the mean over all tasks after the last one. Backward transfer is how far a task's accuracy "
    "has moved from when it was learned to the end, mean over tasks: the further below zero, the more is forgotten."
)
GIVEN = "References: given what a stream does not give"


def content(
    results: Sequence[StreamResult], *, title: str, notes: Mapping[str, str], env: Mapping[str, Any]
) -> list[Block]:
    """The whole report. One section per order of tasks; with one order its parts stand under the title."""
    orders = by_order(results)
    summaries = {order: summarise(runs) for order, runs in orders.items()}
    look = looks({arm: values["given"] for summary in summaries.values() for arm, values in summary.items()})
    blocks: list[Block] = [Heading(title, 1)]
    if len(orders) > 1:
        blocks += _over_orders(results, summaries, look)
    for order, runs in orders.items():
        level = 2
        if len(orders) > 1:
            blocks.append(Heading(order or "Tasks without an order's name", 2))
            level = 3
        blocks += _order(runs, summaries[order], look, level)
        if len(orders) == 1:
            scores = {arm: values["mean"]["OA"] for arm, values in summaries[order].items()}
            blocks += published_blocks(family_of(order), scores)
        blocks += general_blocks(runs, summaries[order], look, level)
        blocks += _details(runs, summaries[order], look, level, fold=len(orders) > 1)
    return [*blocks, Heading("How it was run", 2), _facts(notes, env, results)]


# --- accuracy --------------------------------------------------------------------------------------------------------


def _order(runs: Sequence[StreamResult], summary: Summary, look: Mapping[str, Look], level: int) -> list[Block]:
    blocks: list[Block] = [Text(c.sentence, strong=True) for c in comparisons(runs)]
    if level == 2:
        cost = cost_sentence(summary[OURS]) if OURS in summary else ""
        blocks += [Text(cost, strong=True)] if cost else []
        blocks += [Heading("Accuracy", 2), Text(METRICS)]
    blocks.append(_headline(runs, summary, look))
    if any(len(values["seeds"]) > 1 for values in summary.values()):
        blocks.append(
            Text(
                "Percent and points, mean ± sample standard deviation over seeds, single seeds in brackets; bold is "
                "the best method. A ± in a sentence is the standard error of the mean difference, seed by seed."
            )
        )
    return blocks


def _headline(runs: Sequence[StreamResult], summary: Summary, look: Mapping[str, Look]) -> Table:
    shown = [name for name in METRIC_TITLES if any(not math.isnan(s["mean"][name]) for s in summary.values())]
    shown = shown or ["OA"]
    seeds = {run.seed for run in runs}
    rows = _ranked_rows(
        summary,
        look,
        lambda arm, best: [
            Cell(mean_and_spread(summary[arm], m), _each(summary[arm]["per_seed"][m]), arm in best[m]) for m in shown
        ],
        {metric: _best(summary, metric) for metric in shown},
        lambda arm: _seeds_of(summary[arm]["seeds"], seeds),
    )
    return Table("All methods, best overall accuracy first", [METRIC_TITLES[name] for name in shown], rows)


def _ranked_rows(summary: Summary, look: Mapping[str, Look], cells: Any, best: Any, note: Any) -> list[Row | Divider]:
    """Methods from the best down, then the references under a line, each with what it is given."""
    methods, references = ranked(summary)
    rows: list[Row | Divider] = []
    for arm in (*methods, *references):
        if references and arm == references[0]:
            rows.append(Divider(GIVEN))
        remarks = [remark for remark in (summary[arm]["given"], note(arm)) if remark]
        row = Row(summary[arm]["title"], cells(arm, best), ", ".join(remarks), look[arm].color, arm == OURS)
        rows.append(row)
    return rows


def _in_order(summary: Summary) -> list[str]:
    methods, references = ranked(summary)
    return [*methods, *references]


def _best(summary: Summary, metric: str) -> set[str]:
    values = {arm: s["mean"][metric] for arm, s in summary.items() if not s["given"]}
    known = [v for v in values.values() if not math.isnan(v)]
    # One method alone is not the best of anything.
    return {arm for arm, v in values.items() if known and v == max(known)} if len(values) > 1 else set()


def _each(values: Sequence[float]) -> str:
    if len(values) < 2 or any(math.isnan(v) for v in values):
        return ""
    return f"({', '.join(f'{v:.1f}' for v in values)})"


def _seeds_of(seeds: Sequence[int], everyone: set[int]) -> str:
    """Nothing for an arm with all seeds."""
    if set(seeds) == everyone:
        return ""
    plural = "s" if len(seeds) > 1 else ""
    return f"seed{plural} {', '.join(map(str, seeds))} only" if seeds else "not finished"


def _over_orders(
    results: Sequence[StreamResult], summaries: Mapping[str, Summary], look: Mapping[str, Look]
) -> list[Block]:
    found = over_orders(summaries)
    blocks: list[Block] = [Heading("All orders", 2)]
    blocks += [Text(c.sentence, strong=True) for c in comparisons(results)]
    costs = (cost_sentence(s[OURS], order) for order, s in summaries.items() if OURS in s)
    if cost := next(filter(None, costs), ""):
        blocks.append(Text(cost, strong=True))
    blocks.append(Text(METRICS))
    for metric in ("OA", "BWT"):
        rows = _ranked_rows(
            found,
            look,
            lambda arm, best, metric=metric: [
                Cell(number(found[arm]["mean"][metric], "–", metric != "OA"), strong=arm in best["mean"]),
                *(
                    Cell(number(value, "–", metric != "OA"), strong=arm in best[order])
                    for order, value in found[arm]["orders"][metric].items()
                ),
            ],
            {"mean": _best(found, metric)} | {order: _best(s, metric) for order, s in summaries.items()},
            lambda arm: "",
        )
        names = [order or "no name" for order in summaries]
        title = METRIC_TITLES[metric]
        blocks.append(Table(f"{title[0].upper()}{title[1:]} by order of the tasks", ["mean over orders", *names], rows))
    blocks.append(
        Text("Means over seeds. A method that lacks an order has no mean. Sentences pair runs of one order and seed.")
    )
    for family in FAMILIES:
        orders = [order for order in summaries if family_of(order) == family]
        if orders:
            scores = {arm: mean([s["orders"]["OA"][order] for order in orders]) for arm, s in found.items()}
            blocks += published_blocks(family, scores)
    return blocks


# --- curves, matrices, costs -----------------------------------------------------------------------------------------


def _details(
    runs: Sequence[StreamResult], summary: Summary, look: Mapping[str, Look], level: int, fold: bool
) -> list[Block]:
    blocks = _curves(by_arm(runs), summary, look, level)
    matrices = [_matrix(summary[arm]["title"], summary[arm]["matrix"], look[arm].color) for arm in _in_order(summary)]
    blocks += [
        Heading("Accuracy matrices", level),
        Text("Row: after which task. Column: tested on which. Percent, mean over seeds; the diagonal is marked."),
        Panels(matrices, fold=f"{len(matrices)} matrices" if fold or len(matrices) > 6 else ""),
        Heading("Cost", level),
        *_costs(summary, look),
    ]
    return blocks + _interference(by_arm(runs), look, level)


def _curves(
    arms: Mapping[str, Sequence[StreamResult]], summary: Summary, look: Mapping[str, Look], level: int
) -> list[Block]:
    """The average so far, and the forgetting curves of all tasks but the last; nothing for a stream of one."""
    tasks = next(iter(summary.values()))["matrix"].tasks
    # Chosen by the task's name, its adapters forget nothing: no curve.
    shown = [arm for arm in _in_order(summary) if arm != "alone"]
    if len(tasks) < 2 or not shown:
        return []
    drawn = [*shown, *(arm for arm in summary if arm == "alone")]
    small = len(tasks) > 6
    # Every seed of every arm would hide the means.
    single = len(shown) <= 4
    averages = {arm: average_so_far(summary[arm]["matrix"]) for arm in drawn}
    rows = [
        Row(
            summary[arm]["title"],
            [Cell(number(v, "–")) for v in averages[arm]],
            color=look[arm].color,
            ours=arm == OURS,
        )
        for arm in drawn
    ]
    lines = [Line(summary[arm]["title"], look[arm], _known(averages[arm])) for arm in drawn]
    average = line_chart(
        "Average accuracy by number of tasks" if small else "Average accuracy so far",
        lines,
        [str(i + 1) for i in range(len(tasks))] if small else tasks,
        what="mean accuracy over the tasks learned so far, after each task",
        kind="average",
        within=percents(lines),
    )
    curves = [
        [_forgetting(arms[arm] if single else (), j, summary[arm], look[arm]) for arm in shown]
        for j in range(len(tasks) - 1)
    ]
    # One axis for all panels: they are to be compared.
    within = percents(chain.from_iterable(curves))
    panels = [
        line_chart(
            f"{j + 1}. {name}" if small else name,
            curves[j],
            tasks,
            what=f"accuracy on {name} after each task",
            kind="forgetting",
            first=j,
            within=within,
            small=small,
        )
        for j, name in enumerate(tasks[:-1])
    ]
    return [
        Heading("What is still known", level),
        legend({arm: look[arm] for arm in drawn}, _titles(summary)),
        Panels([average]),
        Panels([Table("Average accuracy so far, after each task", tasks, rows)], fold="average accuracy as a table"),
        Chart(
            "<p>Each panel is one task: its accuracy from the moment it was learned to the end of the stream. Lines "
            f"are means over seeds{', thin ones single seeds' if single else ''}. Flat is good."
            f"{' Tasks are numbered in the order of the stream.' if small else ''}</p>"
        ),
        Panels(panels),
    ]


def _forgetting(runs: Sequence[StreamResult], task: int, values: Mapping[str, Any], look: Look) -> Line:
    return Line(values["title"], look, values["matrix"].curve(task), [run.matrix.curve(task) for run in runs])


def _known(values: Sequence[float]) -> list[tuple[int, float]]:
    return [(i, v) for i, v in enumerate(values) if not math.isnan(v)]


def _titles(summary: Summary) -> dict[str, str]:
    return {arm: values["title"] for arm, values in summary.items()}


def _matrix(title: str, matrix: AccuracyMatrix, color: str) -> Table:
    rows: list[Row | Divider] = []
    if matrix.untrained is not None:
        rows.append(Row("untrained", [Cell(number(v, ""), kind="quiet") for v in matrix.untrained]))
    for i, row in enumerate(matrix.rows):
        cells = [
            Cell(
                number(value, ""),
                kind="own" if i == j else "quiet" if j > i else "",
                shade=0.0 if math.isnan(value) or j > i else value / 100,
            )
            for j, value in enumerate(row)
        ]
        rows.append(Row(matrix.tasks[i], cells))
    return Table(title, matrix.tasks, rows, kind="matrix", color=color, corner="after")


def _costs(summary: Summary, look: Mapping[str, Look]) -> list[Block]:
    rows: list[Row | Divider] = []
    for arm in _in_order(summary):
        s = summary[arm]
        carried, growing = s["state_bytes_by_task"], s["state_growth"]
        own = "–"
        if not math.isnan(s["own_milliseconds"]):
            own = f"{s['own_milliseconds']:.1f} ms"
        share = "" if math.isnan(s["penalty_share"]) else f"({100 * s['penalty_share']:.1f} %)"
        cells = [
            Cell(f"{s['seconds']:.0f} s"),
            Cell(f"{s['step_milliseconds']:.0f} ms"),
            Cell(own, share),
            Cell(format_bytes(s["peak_bytes"]) if s["peak_bytes"] else "–"),
            Cell(format_bytes(carried[0]) if carried else "–"),
            Cell(format_bytes(s["state_bytes"]), growing) if s["state_bytes"] else Cell("nothing" if carried else "–"),
            Cell(format_bytes(s["dense_bytes"]) if s["state_bytes"] else "–"),
        ]
        rows.append(Row(s["title"], cells, color=look[arm].color, ours=arm == OURS))
    columns = [
        "one run",
        "one step",
        "the method's own part of a step",
        "peak memory",
        "carried after the first task",
        "carried after the last task",
        "a dense float32 past of the same layers",
    ]
    blocks: list[Block] = [Table("Time and memory", columns, rows)]
    blocks.append(
        Text(
            "Carried: bytes kept from task to task beside the base model and the adapter in training. Peak memory is "
            "what the process, or the GPU's allocator, had taken at most until then: arms run in one process share it."
        )
    )
    carrying = {arm: summary[arm]["state_bytes_by_task"] for arm in _in_order(summary)}
    most = max((size for sizes in carrying.values() for size in sizes), default=0)
    length = max(map(len, carrying.values()))
    if most and length > 1:
        chart = line_chart(
            "Carried, by number of tasks",
            [Line(summary[arm]["title"], look[arm], list(enumerate(sizes))) for arm, sizes in carrying.items()],
            [str(i + 1) for i in range(length)],
            what="bytes carried after each task",
            kind="carried",
            within=(0.0, most),
            show=format_bytes,
        )
        blocks += [legend({arm: look[arm] for arm in carrying}, _titles(summary)), Panels([chart])]
    return blocks


def _interference(arms: Mapping[str, Sequence[StreamResult]], look: Mapping[str, Look], level: int) -> list[Block]:
    found = {arm: record for arm, runs in arms.items() if (record := interference(runs)) is not None}
    if not found:
        return []
    titles = {arm: summary["title"] for arm, summary in summarise([r for a in found for r in arms[a]]).items()}
    blocks: list[Block] = [
        Heading("Interference by layer", level),
        Text(
            "The penalty before its strength, of each layer at the end of each task: how much the task's update shares "
            "with the past. Mean over seeds; the first task has no past."
        ),
        Panels([strip_chart(f"{titles[arm]}: layers by tasks", look[arm], record) for arm, record in found.items()]),
    ]
    tables = []
    for arm, record in found.items():
        rows: list[Row | Divider] = []
        for i, task in enumerate(record.tasks):
            column = {layer: row[i] for layer, row in zip(record.layers, record.values, strict=True)}
            known = {layer: value for layer, value in column.items() if not math.isnan(value)}
            if known:
                top = max(known, key=lambda layer: known[layer])
                # Without a past no layer is the largest.
                name = top if known[top] else ""
                rows.append(Row(task, [Cell(f"{sum(known.values()):.3g}"), Cell(f"{known[top]:.3g}", name)]))
        tables.append(Table(f"{titles[arm]}: interference", ["all layers", "largest layer"], rows))
    return [*blocks, Panels(tables, fold="interference as tables" if len(tables) > 1 else "interference as a table")]


# --- how it was run --------------------------------------------------------------------------------------------------


def _facts(notes: Mapping[str, str], env: Mapping[str, Any], results: Sequence[StreamResult]) -> Table:
    config = next((r.config for r in results if r.arm == OURS), results[0].config)
    settings = {arm: _set(runs[0], config) for arm, runs in by_arm(results).items()}
    rows = {
        **notes,
        "seeds": ", ".join(str(seed) for seed in sorted({r.seed for r in results})),
        "ELLA settings": _listed(config["ella"]),
        "training": _listed(training_settings(config)),
        **{f"set for {title_of(arm)}": _listed(found) for arm, found in settings.items() if found},
        "machine": env["machine"],
        "system": f"{env['system']}, Python {env['python']}",
        "versions": _listed(env["versions"]) + (f"; commit {env['commit']}" if env.get("commit") else ""),
    }
    facts: list[Row | Divider] = [Row(str(name), [Cell(str(value))]) for name, value in rows.items()]
    return Table("", [], [*facts, Row("command", [Cell(env["command"], kind="code")])], kind="facts")


def _set(result: StreamResult, shared: Mapping[str, Any]) -> dict[str, Any]:
    """What is set for this arm alone, and is not what it would have been."""
    name = result.config["arm"]
    kind = ARMS.get(OLD_NAMES.get(name, name))
    own = {f.name: f.default for f in (fields(kind.Settings) if kind else ()) if f.default is not MISSING}
    defaults = training_settings(shared) | {f.name: f.default for f in fields(EllaConfig)} | shared["ella"] | own
    values = training_settings(result.config) | dict(result.config.get("settings") or {})
    return {key: value for key, value in values.items() if key not in defaults or defaults[key] != value}


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
