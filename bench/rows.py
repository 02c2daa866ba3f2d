"""A result row, and measuring one case: every provider interleaved, gated by its error, nothing red with a speed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch

from .measure import GATE, Graphed, Samples, cache_bytes, exact, free_bytes, interleave, peak_bytes, relative_error
from .providers import BASELINE, PROVIDERS, Cost, Group, Prepared, Provider, make_group, prepare
from .shapes import Case, Size

__all__ = ["Limits", "Row", "gate_error", "measure_calls", "measure_case", "red_reason", "timing"]

# Layers are checked in float64 up to this many weight elements per case; a row says how many were.
_CHECKED_ELEMENTS = 2**25


@dataclass
class Row:
    """One line of results.json. Times in seconds, memory in bytes; None where a value does not apply.

    Attributes:
        bench, case, mode, provider: what was measured; together unique.
        layers: layers of the case; checked: of those, compared with float64.
        sizes: ``[out, in, r, k]`` when all layers are alike.
        median, p20, p80, rounds: seconds per call; None when skipped or red.
        ratio, ratio_p20, ratio_p80: baseline's time over this one's, formed inside rounds.
        error: largest relative error of value and gradients over the checked layers; gate: the bound.
        held_bytes: the past between steps; peak_bytes: allocated by one call on top.
        flops, bytes: counted per algorithm; roofline: share of the machine's own rates that was reached.
        reason: why there is no speed.
        extra: what only one bench has.
    """

    bench: str
    case: str
    mode: str
    provider: str
    layers: int = 1
    checked: int = 0
    sizes: list[int] | None = None
    baseline: bool = False
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    ratio: float | None = None
    ratio_p20: float | None = None
    ratio_p80: float | None = None
    error: float | None = None
    gate: float | None = None
    held_bytes: int | None = None
    peak_bytes: int | None = None
    flops: float | None = None
    bytes: float | None = None
    roofline: float | None = None
    reason: str | None = None
    extra: dict = field(default_factory=dict)

    @property
    def green(self) -> bool:
        """Whether the error was measured and is within the gate."""
        return self.error is not None and self.gate is not None and self.error <= self.gate

    @property
    def failed(self) -> bool:
        """Whether the reason for showing no speed is a fault: over the gate, or an exception."""
        return self.reason is not None and self.reason.startswith(("red", "failed"))

    def as_dict(self) -> dict:
        return asdict(self)


class Limits(NamedTuple):
    """How much one case may cost.

    Attributes:
        budget: seconds of timed rounds per case.
        call_seconds: providers predicted to need more per call are skipped, with the prediction.
        copy_rate, matmul_rate: the machine's bytes and operations per second, for predictions and rooflines.
    """

    budget: float
    call_seconds: float
    copy_rate: float
    matmul_rate: float

    def least_seconds(self, cost: Cost) -> float:
        """No program with this many operations and bytes is faster at the machine's own rates."""
        return max(cost.flops / self.matmul_rate, cost.bytes / self.copy_rate)


def timing(row: Row, samples: Samples, baseline: Samples | None) -> None:
    """Write the times and, with a baseline, the ratios into ``row``."""
    row.median, row.p20, row.p80 = samples.median, samples.quantile(0.2), samples.quantile(0.8)
    row.rounds = len(samples.seconds)
    if baseline is not None:
        ratio = samples.ratio(baseline)
        row.ratio, row.ratio_p20, row.ratio_p80 = ratio.median, ratio.quantile(0.2), ratio.quantile(0.8)


def _checked_layers(sizes: Sequence[Size]) -> list[int]:
    """First and last layer of every distinct size, as many as the float64 budget allows, one at least."""
    ends: list[int] = []
    for size in dict.fromkeys(sizes):
        first, last = sizes.index(size), len(sizes) - 1 - sizes[::-1].index(size)
        ends += sorted({first, last})
    chosen, elements = [], 0
    for index in ends:
        elements += sizes[index].weight
        if chosen and elements > _CHECKED_ELEMENTS:
            break
        chosen.append(index)
    return chosen


def gate_error(prepared: Prepared, references: Mapping[int, tuple]) -> float:
    """Largest relative error of value, ``grad_A`` and ``grad_B`` over the referenced layers; inf if not finite."""
    values, grads_a, grads_b = prepared.result()
    worst = 0.0
    for index, (value, grad_a, grad_b) in references.items():
        pairs = [] if values is None else [(values[index], value)]
        if len(grads_a):
            pairs += [(grads_a[index], grad_a), (grads_b[index], grad_b)]
        worst = max([worst, *(relative_error(found, expected) for found, expected in pairs)])
    return worst


def _why_not(provider: Provider, case: Case, mode: str, device: str, limits: Limits, group_bytes: int) -> str | None:
    reason = provider.refuses(device)
    if reason:
        return reason
    if provider.one_backward and mode == "backward":
        return "its graph lends its buffers to the first backward and has no second; see both"
    if provider.penalty == "spectral" and not any(size.k for size in case.sizes):
        return "the projected norm against a past without components is zero"
    past = sum(provider.held_bytes(size) for size in case.sizes)
    needed = group_bytes + past + provider.work_bytes(case.sizes)
    free = free_bytes(device)
    if needed > free:
        return f"would need {needed / 2**30:.1f} GiB ({past / 2**30:.1f} GiB of past), {free / 2**30:.1f} GiB are free"
    seconds = limits.least_seconds(_cost(provider, case.sizes, mode))
    if seconds > limits.call_seconds:
        return f"at least {seconds:.1f} s a call at this machine's rates, over this run's {limits.call_seconds:g} s"
    return None


def _cost(provider: Provider, sizes: Sequence[Size], mode: str) -> Cost:
    total = Cost(0.0, 0.0)
    for size, count in ((s, sizes.count(s)) for s in dict.fromkeys(sizes)):
        one = provider.cost(size, mode != "forward")
        total = total + Cost(one.flops * count, one.bytes * count)
    return total


def _n_sets(provider: Provider, sizes: Sequence[Size], device: str) -> int:
    touched = sum(4 * (s.out + s.in_) * s.r + provider.held_bytes(s) for s in sizes)
    return max(1, min(32, -(-2 * cache_bytes(device) // max(touched, 1))))


def measure_case(
    bench: str,
    case: Case,
    mode: str,
    names: Sequence[str],
    limits: Limits,
    device: str = "cpu",
    *,
    graphed: bool = False,
    extra: Mapping[str, object] | None = None,
) -> dict[str, tuple[Row, Samples | None]]:
    """Measure all named providers on one case, interleaved.

    Args:
        names: keys of :data:`bench.providers.PROVIDERS`, the baseline among them if ratios are wanted.
        graphed: replay each call as a CUDA graph (in-place mode on a GPU).
        extra: goes into every row; "axis", "x" and "series" place it in a plot.

    Returns:
        For each name its row and its samples; samples are None and ``row.reason`` is set where it did not run or is
        red.
    """
    alike = len(set(case.sizes)) == 1
    sizes = list(case.sizes[0][:4]) if alike else None
    rows = {
        name: Row(
            bench,
            case.name,
            mode,
            name,
            len(case.sizes),
            sizes=sizes,
            baseline=name == BASELINE,
            extra=dict(extra or {}),
        )
        for name in names
    }
    if mode == "backward":
        for name, row in rows.items():
            if PROVIDERS[name].is_ours:
                row.extra["note"] = "gradients are formed with the value; this only scales them"
    group_bytes = sum(4 * (s.out + s.in_) * (2 * s.r + s.k) for s in case.sizes)
    for name, row in rows.items():
        row.reason = _why_not(PROVIDERS[name], case, mode, device, limits, group_bytes)
    running = [name for name, row in rows.items() if row.reason is None]
    if not running:
        return {name: (row, None) for name, row in rows.items()}

    groups = [make_group(case.sizes, device)]
    references: dict[str, dict[int, tuple]] = {}
    candidates: dict[str, list] = {}
    for name in running:
        provider, row = PROVIDERS[name], rows[name]
        try:
            if provider.penalty not in references:
                references[provider.penalty] = _references(groups[0], provider.penalty)
            row.checked = len(references[provider.penalty])
            sets = _n_sets(provider, case.sizes, device)
            while len(groups) < sets:
                groups.append(make_group(case.sizes, device, seed=len(groups)))
            prepared = prepare(provider, groups[0], mode)
            row.error, row.gate = gate_error(prepared, references[provider.penalty]), GATE["ieee"]
            row.held_bytes = sum(provider.held_bytes(size) for size in case.sizes)
            row.peak_bytes = peak_bytes(prepared.call, device)
            row.flops, row.bytes = _cost(provider, case.sizes, mode)
            if not row.green:
                row.reason = red_reason(row)
                continue
            calls = [prepared.call, *(prepare(provider, group, mode).call for group in groups[1:sets])]
            candidates[name] = [Graphed(call) for call in calls] if graphed else calls
        except Exception as error:
            # A provider that fails is a row with a reason, and a failed bench; the others still get their numbers.
            row.reason = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    samples = interleave(candidates, device=device, budget=limits.budget) if candidates else {}
    for name, found in samples.items():
        row = rows[name]
        timing(row, found, samples.get(BASELINE))
        if mode != "backward":
            row.roofline = limits.least_seconds(Cost(row.flops, row.bytes)) / found.median
    result = {name: (row, samples.get(name)) for name, row in rows.items()}
    del candidates, groups, references
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    return result


def measure_calls(
    rows: Mapping[str, Row],
    calls: Mapping[str, Callable[[], object]],
    limits: Limits,
    device: str = "cpu",
    *,
    baseline: str | None = None,
) -> dict[str, tuple[Row, Samples | None]]:
    """Time what is not a provider on a case (a fold, a training step), interleaved; ``rows`` carry their errors.

    Rows with a reason are not timed; a row that is not green gets one, and no speed.
    """
    running = {}
    for name, row in rows.items():
        if row.reason is None and not row.green:
            row.reason = red_reason(row)
        if row.reason is None:
            row.peak_bytes = peak_bytes(calls[name], device)
            running[name] = [calls[name]]
    samples = interleave(running, device=device, budget=limits.budget) if running else {}
    for name, found in samples.items():
        timing(rows[name], found, samples.get(baseline))
    return {name: (row, samples.get(name)) for name, row in rows.items()}


def red_reason(row: Row) -> str:
    """Why a row over its bound shows no speed."""
    return f"red: relative error {row.error:.1e} exceeds {row.gate:.0e}, no speed is shown"


def _references(group: Group, penalty: str) -> dict[int, tuple]:
    return {
        i: exact(group.lora_As[i], group.lora_Bs[i], group.pasts[i], group.scalings[i], penalty)
        for i in _checked_layers(group.sizes)
        # The projected norm against no components is zero, which checks nothing.
        if group.sizes[i].k or penalty == "hadamard"
    }
