"""A plan as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from .plan import Plan

__all__ = ["bytes_text", "describe_plan", "seconds_text"]

_ENGINES = {"one": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "zero2": "ZeRO-2", "zero3": "ZeRO-3"}


def bytes_text(count: int) -> str:
    """Three digits and a binary unit.

    >>> bytes_text(64 * 2**20), bytes_text(1000)
    ('64.0 MiB', '1000 B')
    """
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if count >= unit:
            return f"{count / unit:.{1 if count < 1000 * unit else 0}f} {name}"
    return f"{count} B"


def seconds_text(seconds: float) -> str:
    """
    >>> seconds_text(0.00283), seconds_text(12.0)
    ('2.83 ms', '12.0 s')
    """
    if seconds == 0:
        return "0"
    unit, name = next((u for u in ((1.0, "s"), (1e-3, "ms")) if seconds >= u[0]), (1e-6, "µs"))
    scaled = seconds / unit
    return f"{scaled:.{2 if scaled < 10 else 1 if scaled < 100 else 0}f} {name}"


def _operations_text(count: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}FLOP"
    return f"{count:.0f} FLOP"


def describe_plan(plan: Plan) -> str:
    """All of a plan, for a terminal."""
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_step(plan), "", *_collectives(plan), "", *_notes(plan)])


def _head(plan: Plan) -> Iterator[str]:
    where = _ENGINES[plan.engine] + (f", {plan.gpus} GPUs" if plan.gpus > 1 else "")
    tasks = "as many tasks as fill the past" if plan.tasks is None else f"{plan.tasks} finished tasks"
    ranks = "; ".join(f"r {r}, past {stored}, penalty {used}" for r, stored, used in plan.ranks)
    ways = ", ".join(f"{count} by {name}" for name, count in plan.algorithms.items())
    yield (
        f"{plan.model}: {plan.parameters:,} parameters in {plan.base}, {plan.trained:,} trained; {where} "
        f"({plan.gpu.name})"
    )
    yield f"{plan.parts} penalised updates ({ways}); {tasks}: {ranks}; keep_past {plan.ella.keep_past}"


def _memory(plan: Plan) -> Iterator[str]:
    memory = plan.memory
    rows: list[tuple[str, int, int]] = [
        ("base weights", memory.base, memory.base),
        ("adapter", memory.adapter, memory.adapter),
        ("gradients", memory.gradients, memory.gradients),
        ("optimizer (AdamW)", memory.optimizer, memory.optimizer),
        ("engine's buckets", memory.buckets, memory.buckets),
        ("past: finished tasks' factors", memory.past, memory.dense_past),
        ("past: held for the penalty", memory.penalty, 0),
        ("penalty's work memory, for a moment", memory.work, memory.dense_work),
        ("blocks gathered by the engine (estimate)", memory.gathered, memory.gathered),
    ]
    yield from _table(
        ("bytes on one GPU", "ELLA", "dense form"),
        [(name, bytes_text(ours), bytes_text(dense)) for name, ours, dense in rows if ours or dense]
        + [("all, without activations", bytes_text(memory.total), bytes_text(memory.dense_total))],
    )
    yield f"of {bytes_text(plan.gpu.memory)} on one {plan.gpu.name}; the rest is for activations"
    if memory.host:
        yield f"memory of the CPU: {bytes_text(memory.host)}"


def _step(plan: Plan) -> Iterator[str]:
    done, took = plan.operations, plan.times
    kind = "measured" if plan.gpu.is_measured else "bound"
    rows = [
        ("base model", _operations_text(done.base), ""),
        ("trained factors", _operations_text(done.adapter), seconds_text(took.training) + " with the base"),
        ("finished tasks, forward and backward", _operations_text(done.past), seconds_text(took.past)),
        ("penalty and its gradients", _operations_text(done.penalty), seconds_text(took.penalty)),
        ("  the dense form's", _operations_text(done.dense_penalty), ""),
        ("  bytes to and from memory", bytes_text(plan.bytes_moved), ""),
    ]
    yield from _table((f"a step of {plan.tokens:,} tokens on one GPU", "operations", f"time ({kind})"), rows)


def _collectives(plan: Plan) -> list[str]:
    if not plan.collectives:
        return ["no collectives"]
    names = {"engine": "engine, adapter training", "past": "engine, finished tasks beside", "penalty": "ELLA's penalty"}
    rows = [
        (names[one.owner], one.kind, str(one.count) if one.count else "the same", bytes_text(one.bytes))
        for one in plan.collectives
    ]
    took = plan.times
    rows.append(("time if nothing overlaps (bound)", "", "engine " + seconds_text(took.engine),
                 "penalty " + seconds_text(took.penalty_collectives)))  # fmt: skip
    return _table(("collectives of a step", "", "count", "bytes to each GPU"), rows)


def _notes(plan: Plan) -> Iterator[str]:
    yield f"Rates: {plan.gpu.source}."
    if not plan.gpu.is_measured:
        yield "No committed GPU results: times are what the data sheet allows at the most, not predictions."
    yield "Formulae, what is left out and how the bytes were checked: docs/scaling.md."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = []
    for line in (header, *rows):
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)),
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "-" * sum(widths + [2] * (len(widths) - 1)))
    return lines
