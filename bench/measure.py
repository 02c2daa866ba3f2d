"""Timing, memory, error and the machine's own rates: written once, for every bench.

Timing is interleaved: all candidates of a case run once per round, in alternating order, so that drift of the machine
hits all of them; ratios are formed inside a round. Operands rotate over copies larger than the last-level cache: LoRA
factors fit in it, and a training step finds them cold.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import ella_kernels as ek

__all__ = [
    "GATE",
    "THREADS",
    "Graphed",
    "Samples",
    "cache_bytes",
    "exact",
    "free_bytes",
    "interleave",
    "machine",
    "peak_bytes",
    "pin_threads",
    "relative_error",
]

THREADS = 2
# RMS error against fp64 above which a row is red and shows no speed; tf32 only where it was asked for.
# A whole model in bf16 rounds in every layer: its logits and gradients are 2e-2 off with plain LoRA too, a past that is
# left out of the smallest case 3e-1.
GATE = {"ieee": 1e-5, "tf32": 1e-2, "bf16": 5e-2}


def pin_threads(threads: int = THREADS) -> None:
    """Fix PyTorch's intra-op threads; the number is part of every result."""
    torch.set_num_threads(threads)


class Samples(NamedTuple):
    """Seconds per call, one entry per round."""

    seconds: list[float]

    def quantile(self, q: float) -> float:
        """Linear interpolation between order statistics, ``0 ≤ q ≤ 1``."""
        ordered = sorted(self.seconds)
        position = q * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (position - low) * (ordered[high] - ordered[low])

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def ratio(self, baseline: Samples) -> Samples:
        """``baseline / self``, round by round: how many times faster than the baseline."""
        return Samples([b / s for b, s in zip(baseline.seconds, self.seconds, strict=True)])


def _time_cpu(calls: Sequence[Callable[[], object]], first: int, repeats: int) -> float:
    start = time.perf_counter()
    for i in range(first, first + repeats):
        calls[i % len(calls)]()
    return (time.perf_counter() - start) / repeats


def _time_cuda(calls: Sequence[Callable[[], object]], first: int, repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    for i in range(first, first + repeats):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / repeats


def interleave(
    candidates: Mapping[str, Sequence[Callable[[], object]]],
    *,
    device: str = "cpu",
    budget: float = 4.0,
    rounds: tuple[int, int] = (3, 40),
    sample: float = 8e-3,
) -> dict[str, Samples]:
    """Time every candidate in every round.

    Args:
        candidates: for each name the same call on rotated operands; call ``i`` uses operand set ``i mod n``.
        device: "cpu" (wall clock) or "cuda" (events).
        budget: seconds for the whole case, after a warm-up and an estimating call each (one call where it is long).
        rounds: fewest and most rounds; the fewest are run even over budget.
        sample: a candidate is repeated within a round until it lasts about this long.

    Returns:
        Seconds per call of each candidate, one entry per round.
    """
    timer = _time_cuda if device == "cuda" else _time_cpu
    seconds = {name: timer(calls, 0, 1) for name, calls in candidates.items()}
    # The first call of a short candidate says little; a long one is not worth repeating.
    seconds |= {name: timer(candidates[name], 1, 1) for name, t in seconds.items() if t < 0.5}
    repeats = {name: max(1, min(200, round(sample / max(t, 1e-7)))) for name, t in seconds.items()}
    cost = sum(repeats[name] * t for name, t in seconds.items())
    n_rounds = max(rounds[0], min(rounds[1], int(budget / max(cost, 1e-9))))
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(n_rounds):
        for name in list(candidates) if i % 2 else reversed(list(candidates)):
            found[name].append(timer(candidates[name], i * repeats[name], repeats[name]))
    return {name: Samples(times) for name, times in found.items()}


class Graphed:
    """A call captured in a CUDA graph; replaying it costs one launch. For cases bound by the host."""

    def __init__(self, call: Callable[[], object]):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept = call()

    def __call__(self) -> None:
        self.graph.replay()


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes of tensors alive during ``call`` beyond those alive before it."""
    if device == "cuda":
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        call()
    # The profiler reports every allocation of the CPU allocator, intermediates inside custom ops included.
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak


def exact(a: Tensor, b: Tensor, past: ek.LowRank, scaling: float, penalty: str = "hadamard", rows: int = 1024):
    """Value and gradients in float64 by :mod:`ella_kernels.reference`, a block of rows at a time.

    Returns:
        ``(value, grad_A, grad_B)``, float64.
    """
    a, b = a.detach().double(), b.detach().double()
    past = ek.LowRank(*(None if t is None else t.double() for t in past))
    if penalty == "spectral":
        # M = ΔW Rᵀ needs no blocks: the reference forms out×in once.
        return (
            ek.reference.spectral_penalty(a, b, past, scaling),
            *ek.reference.spectral_grad(a, b, past, scaling),
        )
    value, grad_a, grads_b = a.new_zeros(()), torch.zeros_like(a), []
    for start in range(0, b.shape[0], rows):
        block = _row_block(past, slice(start, start + rows))
        part = b[start : start + rows]
        value = value + ek.reference.hadamard_penalty(a, part, block, scaling)
        from_a, from_b = ek.reference.hadamard_grad(a, part, block, scaling)
        grad_a += from_a
        grads_b.append(from_b)
    return value, grad_a, torch.cat(grads_b)


def _row_block(past: ek.LowRank, rows: slice) -> ek.LowRank:
    if past.row_energy is None:
        return ek.LowRank(past.left[rows], past.right)
    # The reference divides by the block's own Στ; undo it so that blocks add up to the whole.
    share = past.row_energy[rows].sum() / past.row_energy.sum()
    return ek.LowRank(past.left[rows], past.right, past.row_energy[rows], past.col_energy * share)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``RMS(found - expected) / RMS(expected)`` in float64, inf where it is no number; a zero reference is refused."""
    norm = expected.double().norm()
    if norm == 0:
        raise ValueError("the reference is zero: a relative error proves nothing")
    error = ((found.detach().double().to(expected.device) - expected).norm() / norm).item()
    # NaN is neither over a bound nor the largest of several.
    return math.inf if math.isnan(error) else error


def cache_bytes(device: str = "cpu") -> int:
    """Bytes of the last-level cache (32 MiB where it cannot be read)."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    unit = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(size[:-1]) * unit[size[-1]] for size in sizes if size[-1:] in unit), default=2**25)


def free_bytes(device: str = "cpu") -> int:
    """Bytes a case may use: 80% of what the device or the host has free now."""
    if device == "cuda":
        return int(0.8 * torch.cuda.mem_get_info()[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    return int(0.8 * available)


def _copy_rate(device: str) -> float:
    source = torch.randn(2**26, device=device)
    target = torch.empty_like(source)
    times = interleave({"copy": [lambda: target.copy_(source)]}, device=device, budget=1.0)["copy"]
    return 2 * source.numel() * 4 / times.quantile(0.2)


def _matmul_rate(device: str) -> float:
    n = 8192 if device == "cuda" else 2048
    x, y = (torch.randn(n, n, device=device) for _ in range(2))
    out = torch.empty_like(x)
    times = interleave({"matmul": [lambda: torch.mm(x, y, out=out)]}, device=device, budget=1.5)["matmul"]
    return 2 * n**3 / times.quantile(0.2)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict:
    """Everything a number needs to be one: hardware, versions, commit, threads, copy bandwidth and matmul rate."""
    import triton

    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    # The suite's own outputs do not make a measurement dirty.
    dirty = bool(
        _git("status", "--porcelain", "--untracked-files=no", "--", ":/ella_kernels", ":/ella", ":/bench/*.py")
    )
    facts = {
        "device": device,
        "name": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ella_kernels": ek.__version__,
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "precision": "fp32, ieee" if device == "cpu" else "fp32",
        "cache_bytes": cache_bytes(device),
        "copy_bytes_per_s": _copy_rate(device),
        "matmul_flops_per_s": _matmul_rate(device),
    }
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    # A busy machine is said to be one: readers can discount its numbers.
    return facts | {"load_before": round(load, 2)}
