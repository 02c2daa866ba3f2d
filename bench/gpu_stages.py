"""The stages of ``bench.gpu_check``: each yields rows, which are written as they come. Run in a process of its own."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

import ella_kernels as ek
from ella_kernels import recognition
from ella_kernels.recognition import Memory

from . import gpu_plan, measure
from .gpu_plan import OURS
from .providers import BASELINE, PROVIDERS, dense_form, make_group, prepare
from .rows import Limits, Row, _cost, _references, gate_error, red_reason, timing
from .shapes import Case, Size

__all__ = ["CHECK_SHAPES", "STAGES", "TINY_SHAPES", "Context", "Stage", "check_call", "check_kernels", "checks"]

# (out, in, r, k, energy): multiples of nothing, grouped-query rectangles, aligned shapes, ranks beyond one tile.
CHECK_SHAPES = (
    (1000, 777, 7, 5, False),
    (1024, 4096, 8, 8, False),
    (4096, 1024, 8, 16, True),
    (1, 513, 3, 20, True),
    (640, 640, 16, 16, False),
    (512, 768, 8, 120, False),
    (300, 200, 70, 3, True),
)
TINY_SHAPES = ((40, 56, 3, 5, False), (33, 70, 8, 8, True))
STEP_SIZES = (Size(1024, 768, 8, 8), Size(768, 1024, 8, 8))
ALGORITHMS = ("gram", "stream", "dense", "spectral")
ERROR_BOUND = {"auto": 1e-4, "ieee": 1e-5, "tf32": 1e-2}
# Bytes and operations per second until this card has shown its own.
ASSUMED = {"copy_bytes_per_s": 3e12, "matmul_flops_per_s": 5e13, "tf32_flops_per_s": 3e14}


class Context(NamedTuple):
    """Where a stage runs.

    Attributes:
        device: "cuda", or "cpu" in a dry run: tiny cases, no times.
        facts: what the first stage found out about the machine, or :data:`ASSUMED`.
        small: only small shapes, as under the sanitizer.
    """

    device: str
    facts: Mapping = ASSUMED
    small: bool = False

    @property
    def dry(self) -> bool:
        return self.device == "cpu"


class Stage(NamedTuple):
    """Part of the run: ``run(context)`` yields rows; after ``seconds`` its process group is killed."""

    seconds: float
    run: Callable[[Context], Iterator[dict]]


# ------------------------------------------------------------------------------------------------ the machine


def versions(context: Context) -> Iterator[dict]:
    """Versions, how the accumulator rounds, and the card's own rates."""
    import triton

    facts: dict = {"name": "dry run on the CPU"} if context.dry else {}
    facts |= {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip, "sanitizer": bool(sanitizer())}
    with suppress(Exception):
        from .gpu_cache import compare

        facts["cache_ahead"] = compare()
    if not context.dry:
        facts |= {"name": torch.cuda.get_device_name(), "memory_bytes": torch.cuda.mem_get_info()[1]}
        facts |= {"multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count}
    yield {"kind": "versions"} | facts | state()
    from .gpu_probe import probe

    yield from probe(context.device)
    if context.dry:
        return
    with clocks() as sampled:
        facts = measure.machine("cuda")
        facts["tf32_flops_per_s"] = _tf32_rate()
    facts |= {"cuda": torch.version.cuda, "hip": torch.version.hip}
    yield {"kind": "machine"} | facts | {"clocks": sampled}


def _tf32_rate() -> float:
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return measure._matmul_rate("cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


_QUERY = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def state() -> dict:
    """Driver, limits and clocks of the card as it idles; empty without nvidia-smi."""
    fields = ("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", *_QUERY)
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "-i", "0"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, done.stdout.strip().split(", "), strict=False))


@contextmanager
def clocks(milliseconds: int = 250) -> Iterator[dict]:
    """Clocks, power and temperature while the body runs: ``[least, median, most]`` of each, filled at its end."""
    found: dict = {}
    command = ["nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", "-i", "0"]
    with tempfile.TemporaryFile("w+") as output:
        try:
            process = subprocess.Popen([*command, "-lms", str(milliseconds)], stdout=output, stderr=subprocess.DEVNULL)
        except OSError:
            yield found
            return
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            output.seek(0)
            found |= sampled(output.read())


def sampled(text: str) -> dict:
    """``[least, median, most]`` of every column nvidia-smi printed; what is no number is left out."""
    columns: dict[str, list[float]] = {}
    for line in text.splitlines():
        for name, value in zip(_QUERY, line.split(", "), strict=False):
            with suppress(ValueError):
                columns.setdefault(name, []).append(float(value))
    return {name: [min(values), median(values), max(values)] for name, values in columns.items()}


def sanitizer() -> str | None:
    """Path of compute-sanitizer, if it is installed."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    return found if Path(found).exists() else None


# ------------------------------------------------------------------------------------------------ timings


def timed(case: Case, names: Sequence[str], stage: str) -> Callable[[Context], Iterator[dict]]:
    """A stage that measures ``names`` on ``case``."""

    def run(context: Context) -> Iterator[dict]:
        if not context.dry:
            return time_case(context, case, names, stage)
        # Interpreting is slow: every way is walked once, in the first case that has it.
        walked = names if stage == next(iter(gpu_plan.COMPARED)) else [BASELINE, OURS][-len(names) :]
        return time_case(context, gpu_plan.shrunk(case), walked, stage)

    return run


def _gate(name: str) -> float:
    """Bound of a way's error; our kernels run in precision "auto", whose products are compensated, not exact."""
    return ERROR_BOUND["auto"] if name.endswith(", triton") else ERROR_BOUND["ieee"]


def time_case(context: Context, case: Case, names: Sequence[str], stage: str) -> Iterator[dict]:
    """Errors, then times of every way that fits the card beside the others: by graph replay, then eagerly.

    Ours are timed eagerly in batches in which every operand set stays recognised. A way of ours over its bound keeps
    its times; another one has none.
    """
    device, facts = context.device, context.facts
    limits = Limits(2.0, 1.0, facts["copy_bytes_per_s"], facts["matmul_flops_per_s"])
    cache = 2**13 if context.dry else measure.cache_bytes(device)
    card = 2**33 if context.dry else torch.cuda.mem_get_info()[0]
    rows = {
        name: Row(
            "gpu_check", case.name, "in-place", name, len(case.sizes), baseline=name == BASELINE, gate=_gate(name)
        )
        for name in names
    }
    able = []
    for name, row in rows.items():
        row.reason = _why_not(name, case, limits, context)
        if row.reason is None:
            able.append(name)
    fitting = gpu_plan.fit(case, able, card, cache)
    for name, reason in fitting.left_out.items():
        rows[name].reason = reason
    sets = {name: gpu_plan.n_sets(name, case.sizes, cache) for name in fitting.kept}
    groups = [make_group(case.sizes, device, seed=i) for i in range(max(sets.values(), default=0))]
    references: dict[str, dict] = {}
    calls: dict[str, list] = {}
    dense: dict[int, torch.Tensor] = {}

    def stored(past: ek.LowRank) -> torch.Tensor:
        # One W_past for all ways that read it, not one each.
        if id(past) not in dense:
            dense[id(past)] = dense_form(past)
        return dense[id(past)]

    for name in fitting.kept:
        provider, row = PROVIDERS[name], rows[name]
        if provider.hold is dense_form:
            provider = replace(provider, hold=stored)
        try:
            if provider.penalty not in references:
                references[provider.penalty] = _references(groups[0], provider.penalty)
            row.checked = len(references[provider.penalty])
            prepared = prepare(provider, groups[0], "in-place")
            row.error = gate_error(prepared, references[provider.penalty])
            row.held_bytes = sum(provider.held_bytes(size) for size in case.sizes)
            row.flops, row.bytes = _cost(PROVIDERS[name], case.sizes, "in-place")
            row.reason = None if row.green else red_reason(row)
            if row.green or name.endswith(", triton"):
                if not context.dry:
                    row.peak_bytes = measure.peak_bytes(prepared.call, device)
                more = groups[1 : sets[name]]
                calls[name] = [prepared.call, *(prepare(provider, group, "in-place").call for group in more)]
        except Exception as error:
            row.reason = failure(error)
        # At once: a process that dies while timing has said how exact it was.
        yield {"kind": "check", "check": f"{case.name}: {name}", "passed": row.green, "error": row.error} | {
            "bound": row.gate, "failure": row.reason
        }  # fmt: skip
    for name, row in rows.items():
        if name not in calls:
            yield _as_row(row, None, context)
    yield from _graph_rows(context, rows, calls, limits, stage)
    yield from _eager_rows(context, case, rows, calls, limits, stage, cache)
    if OURS in calls:
        yield from _kernel_rows(context, case, calls[OURS], stage)


def _why_not(name: str, case: Case, limits: Limits, context: Context) -> str | None:
    if context.dry:
        return "not in a dry run" if name in ("dense compiled", "dense on host") else None
    reason = PROVIDERS[name].refuses(context.device)
    seconds = limits.least_seconds(_cost(PROVIDERS[name], case.sizes, "in-place"))
    if reason is None and seconds > limits.call_seconds:
        return f"at least {seconds:.1f} s a call at this card's rates"
    return reason


def failure(error: BaseException) -> str:
    """An exception as one line of a row."""
    lines = str(error).splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:300]}"


def _as_row(row: Row, graphed: bool | None, context: Context, **more: object) -> dict:
    entry = {"kind": "time"} | row.as_dict() | {"graphed": graphed} | more
    if row.flops is not None:
        facts = context.facts
        # The cheapest compensated product of "auto": three in bf16, at twice the rate of tf32.
        rate = facts["tf32_flops_per_s"] * 2 / 3 if "triton" in row.provider else facts["matmul_flops_per_s"]
        entry |= {"bytes_floor": row.bytes / facts["copy_bytes_per_s"], "operations_floor": row.flops / rate}
    return entry


def _interleave(context: Context, candidates: Mapping, limits: Limits) -> dict:
    # Every operand set once: no first call, and none that has to be recognised first, is among the timed ones.
    for calls in candidates.values():
        for call in calls:
            call()
    if context.dry:
        return measure.interleave(candidates, budget=0.0, rounds=(1, 1), sample=0.0)
    return measure.interleave(candidates, device="cuda", budget=limits.budget)


def _timed(context: Context, rows: Mapping[str, Row], names: Sequence[str], samples: Mapping) -> list[Row]:
    """A copy of each row with its times, which a dry run does not have."""
    found = []
    for name in names:
        row = replace(rows[name])
        if not context.dry:
            timing(row, samples[name], samples.get(BASELINE))
        found.append(row)
    return found


def _graph_rows(context, rows, calls, limits, stage) -> Iterator[dict]:
    candidates: dict[str, list] = {BASELINE: calls[BASELINE]} if BASELINE in calls else {}
    ours = [name for name in calls if name.endswith(", triton")]
    running = []
    for name in ours:
        try:
            candidates[name] = calls[name] if context.dry else [measure.Graphed(call) for call in calls[name]]
            running.append(name)
        except Exception as error:
            yield _as_row(replace(rows[name], reason=failure(error)), True, context)
    if not running:
        return
    try:
        with clocks() as found:
            samples = _interleave(context, candidates, limits)
    except Exception as error:
        for name in running:
            yield _as_row(replace(rows[name], reason=failure(error)), True, context)
        return
    for row in _timed(context, rows, running, samples):
        predicted = gpu_plan.PREDICTED.get(stage, {}).get("graphed") if row.provider == OURS else None
        yield _as_row(row, True, context, clocks=found, predicted=predicted)


def _eager_rows(context, case, rows, calls, limits, stage, cache) -> Iterator[dict]:
    ours = [name for name in calls if name.startswith("ours ")]
    batches = gpu_plan.eager_batches(ours, case.sizes, cache)
    others = [name for name in calls if name not in ours]
    if not batches and others:
        batches = [[]]
    for i, batch in enumerate(batches):
        # The baseline takes part in every batch: ratios are formed inside a round.
        names = [*(others if i == 0 else [name for name in others if name == BASELINE]), *batch]
        reported = [name for name in names if i == 0 or name != BASELINE]
        try:
            with clocks() as found:
                samples = _interleave(context, {name: calls[name] for name in names}, limits)
        except Exception as error:
            for name in reported:
                yield _as_row(replace(rows[name], reason=failure(error)), False, context)
            continue
        timed_rows = _timed(context, rows, reported, samples)
        if batch:
            missed = unrecognised([calls[name] for name in batch])
            what = f"{case.name}: every eager call of {', '.join(batch)} is recognised"
            yield {"kind": "check", "check": what, "passed": missed == 0, "unrecognised": missed}
        for row in timed_rows:
            more: dict = {"clocks": found}
            if row.provider == OURS:
                more["predicted"] = gpu_plan.PREDICTED.get(stage, {}).get("eager")
            if row.provider in batch and not context.dry:
                more |= {"host_seconds": host_seconds(calls[row.provider])}
                more |= {"host_seconds_unrecognised": host_seconds(calls[row.provider], forget=True)}
            yield _as_row(row, False, context, **more)


def unrecognised(calls: Sequence[Sequence[Callable]]) -> int:
    """How many calls were checked anew when all operand sets of all ways were called in turns, as they were timed."""
    plain, missed = Memory.find, 0

    def counted(memory, signature):
        nonlocal missed
        made, moved_by = plain(memory, signature)
        missed += made is None
        return made, moved_by

    Memory.find = counted
    try:
        for each in calls:
            for call in each:
                call()
    finally:
        Memory.find = plain
    return missed


def host_seconds(calls: Sequence[Callable], forget: bool = False, rounds: int = 15) -> float:
    """Median time the host is busy with one call, its launches queued and not waited for.

    Args:
        forget: every call is checked anew, as one whose operands moved.
    """
    found = []
    for i in range(rounds):
        torch.cuda.synchronize()
        if forget:
            recognition.forget()
        begin = time.perf_counter()
        calls[i % len(calls)]()
        found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    for call in calls:
        call()
    return median(found)


def _kernel_rows(context: Context, case: Case, calls: Sequence[Callable], stage: str) -> Iterator[dict]:
    """Time, registers and spills of every kernel of a step, beside what was predicted."""
    predicted = gpu_plan.PREDICTED.get(stage, {})
    expected = gpu_plan.predicted_registers(case.sizes[0])
    seconds: dict[str, list[float]] = {}
    if not context.dry:
        try:
            seconds = profiled(calls)
        except Exception as error:
            # Registers are known all the same.
            yield {"kind": "kernel", "case": case.name, "kernel": "", "seconds": None, "failure": failure(error)}
    for name, resources in compiled_kernels().items():
        times = sorted(seconds.pop(name, []))
        yield {"kind": "kernel", "case": case.name, "kernel": name, "seconds": median(times) if times else None} | {
            "launches": len(times), "predicted": predicted.get(name), "compiled": resources,
            "registers_predicted": expected.get(name),
        }  # fmt: skip
    for name, times in seconds.items():
        yield {"kind": "kernel", "case": case.name, "kernel": name, "seconds": median(times), "launches": len(times)}


def profiled(calls: Sequence[Callable]) -> dict[str, list[float]]:
    """Seconds of every launch of our kernels in two rounds of calls, by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for call in [*calls, *calls]:
            call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and "_kernel_" in event.name:
            found.setdefault(event.name, []).append(event.time_range.elapsed_us() / 1e6)
    return found


def compiled_kernels() -> dict[str, list[dict]]:
    """Registers, spills, shared memory and warps of every variant of our kernels this process has loaded."""
    from ella_kernels.triton_backend import kernels

    found: dict[str, list[dict]] = {}
    for name, function in kernels().items():
        for caches in getattr(function, "device_caches", {}).values():
            for kernel in caches[0].values():
                resources = {"registers": getattr(kernel, "n_regs", None)}
                resources |= {"spills": getattr(kernel, "n_spills", None)}
                resources |= {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
                found.setdefault(name, []).append(resources)
    return found


# ------------------------------------------------------------------------------------------------ checks


def checks(shapes: Sequence[tuple]) -> Iterator[tuple]:
    """``(shapes, precision, dtype)`` of every check: all shapes in the default precision, two in others.

    A shape's ranks are compiled in, so every further pair of precision and dtype costs seconds.
    """
    yield shapes, "auto", torch.float32
    yield shapes[:2], "auto", torch.bfloat16
    yield shapes[:2], "tf32", torch.float32
    yield shapes[:2], "ieee", torch.float32
    yield shapes[:1], "ieee", torch.float64


def checked(algorithm: str) -> Callable[[Context], Iterator[dict]]:
    """A stage that checks one algorithm's kernels."""

    def run(context: Context) -> Iterator[dict]:
        return check_kernels(context.device, algorithm, TINY_SHAPES if context.dry or context.small else CHECK_SHAPES)

    return run


def check_kernels(device: str, algorithm: str, shapes: Sequence[tuple]) -> Iterator[dict]:
    """Largest errors of an algorithm, and whether repeats agree."""
    for chosen, precision, dtype in checks(shapes):
        yield check(device, chosen, algorithm, precision, dtype)


def check_call(device: str, shapes: Sequence[tuple], algorithm: str, precision: str, dtype: torch.dtype):
    """``(operands, call)`` of a check; operands are lists of A, B, the past in factors, and scalings."""
    group = make_group([Size(*shape) for shape in shapes], device)
    As = [a.detach().to(dtype) for a in group.lora_As]
    Bs = [b.detach().to(dtype) for b in group.lora_Bs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factored = [ek.LowRank(*(None if t is None else t.to(wide) for t in past)) for past in group.pasts]
    pasts = [dense_form(past) for past in factored] if algorithm == "dense" else factored
    spectral = algorithm == "spectral"
    options = {"backend": "triton", "precision": precision} | ({} if spectral else {"algorithm": algorithm})
    # Beyond 64 the spectral kernel has no room for its (r, r) products.
    kept = [i for i, a in enumerate(As) if not (spectral and a.shape[0] > 64)]
    As, Bs, pasts, factored = ([group_[i] for i in kept] for group_ in (As, Bs, pasts, factored))
    scalings = [group.scalings[i] for i in kept]

    def once():
        add_ = ek.add_spectral_grad_ if spectral else ek.add_hadamard_grad_
        grads_A = [torch.zeros_like(a, dtype=wide) for a in As]
        grads_B = [torch.zeros_like(b, dtype=wide) for b in Bs]
        return add_(As, Bs, pasts, scalings, grads_A, grads_B, weight=1.0, **options), grads_A, grads_B

    return (As, Bs, factored, scalings), once


def check(device: str, shapes: Sequence[tuple], algorithm: str, precision: str, dtype: torch.dtype) -> dict:
    """One row: errors of value and gradients against float64."""
    entry: dict = {"kind": "check", "check": f"{algorithm} {precision}", "algorithm": algorithm}
    entry |= {"precision": precision, "dtype": str(dtype).removeprefix("torch.")}
    try:
        (As, Bs, factored, scalings), once = check_call(device, shapes, algorithm, precision, dtype)
        values, grads_A, grads_B = once()
        again, *_ = once()
        worst = [0.0, 0.0]
        for i, a in enumerate(As):
            # A stored past is the root of the squared one: compare with what the kernel was given.
            value, grad_a, grad_b = measure.exact(
                a, Bs[i], factored[i], scalings[i], penalty="spectral" if algorithm == "spectral" else "hadamard"
            )
            worst[0] = max(worst[0], measure.relative_error(values[i], value))
            worst[1] = max(
                worst[1], measure.relative_error(grads_A[i], grad_a), measure.relative_error(grads_B[i], grad_b)
            )
        bound = 1e-12 if dtype == torch.float64 else ERROR_BOUND[precision]
        entry |= {"value_error": worst[0], "grad_error": worst[1], "bound": bound}
        entry |= {"repeats_agree": torch.equal(values, again)}
        entry["passed"] = max(worst) <= bound and entry["repeats_agree"]
    except Exception as error:
        entry |= {"passed": False, "failure": failure(error)}
    return entry


def step_call(device: str, sizes: Sequence[Size]):
    """``(step, grads)``: the in-place form with a weight on the device, and the gradients of A and B it adds to."""
    group = make_group(sizes, device)
    As, Bs = [a.detach() for a in group.lora_As], [b.detach() for b in group.lora_Bs]
    grads = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
    weight = torch.tensor(2.0, device=device)

    def step():
        return ek.add_hadamard_grad_(As, Bs, group.pasts, group.scalings, *grads, weight=weight, backend="triton")

    return step, grads


def check_step(context: Context) -> Iterator[dict]:
    """The in-place form as a training step uses it: no host synchronisation, and replayed from a CUDA graph."""
    step, grads = step_call(context.device, [Size(40, 56, 8, 8)] if context.dry else STEP_SIZES)
    step()
    wanted = [grad.clone() for grad in grads[0]]
    for name, body in (
        ("repeated", _twice),
        ("no host synchronisation", _without_sync),
        ("replayed from a CUDA graph", _graphed),
    ):
        if context.dry and body is not _twice:
            continue
        for grad in (*grads[0], *grads[1]):
            grad.zero_()
        try:
            times = body(step)
            error = max(measure.relative_error(g, times * w.double()) for g, w in zip(grads[0], wanted, strict=True))
            yield {"kind": "check", "check": name, "passed": error < 1e-5, "error": error}
        except Exception as error:
            yield {"kind": "check", "check": name, "passed": False, "failure": failure(error)}


def _twice(step) -> int:
    step()
    step()
    return 2


def _without_sync(step) -> int:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 1


def _graphed(step) -> int:
    graph = measure.Graphed(step)  # three warm-up steps; capturing runs nothing
    graph()
    graph()
    return 5


def check_all(context: Context) -> Iterator[dict]:
    """Every algorithm on small shapes: what the sanitizer watches."""
    small = context._replace(small=True)
    for algorithm in ALGORITHMS:
        yield from checked(algorithm)(small)


# In the order of the run. The last one runs under the sanitizer.
STAGES: dict[str, Stage] = {
    "versions": Stage(60, versions),
    **{name: Stage(70, timed(case, (OURS,), name)) for name, case in gpu_plan.FIRST.items()},
    **{name: Stage(90, timed(*gpu_plan.COMPARED[name], name)) for name in list(gpu_plan.COMPARED)[:1]},
    **{f"check {algorithm}": Stage(60, checked(algorithm)) for algorithm in ALGORITHMS},
    "check step": Stage(40, check_step),
    **{name: Stage(90, timed(*gpu_plan.COMPARED[name], name)) for name in list(gpu_plan.COMPARED)[1:]},
    "sanitizer": Stage(75, check_all),
}


def count_compilations() -> dict[str, int]:
    """Counters of kernels compiled and taken from Triton's cache in this process from now on; empty if Triton cannot
    tell."""
    counts = {"compiled": 0, "from_cache": 0}

    def listen(*, cache_hit: bool = False, **_: object) -> None:
        counts["from_cache" if cache_hit else "compiled"] += 1

    try:
        from triton import knobs

        knobs.compilation.listener = listen
    except (ImportError, AttributeError):
        return {}
    return counts


def open_context(dry: bool, facts: Mapping | None) -> Context:
    """The context of this process; in a dry run it sets the interpreter, before anything imports the kernels."""
    if dry:
        os.environ["TRITON_INTERPRET"] = "1"
    return Context("cpu" if dry else "cuda", ASSUMED | dict(facts or {}))
