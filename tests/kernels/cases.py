"""Operands and error bounds shared by the kernel tests."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path

import torch

import ella_kernels as ek

# RMS(error)/RMS(reference) allowed against float64, per arithmetic dtype. Never loosened: ELLA gradients can sit near
# 1e-9, so only relative bounds mean anything.
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}

# (out, in, r, k): no powers of two by design, GQA-like rectangles, single rows and ranks, tall and wide.
SHAPES = [
    (40, 56, 3, 5),
    (33, 70, 1, 1),
    (128, 61, 8, 7),
    (37, 300, 4, 20),
    (1, 50, 2, 3),
    (50, 1, 2, 3),
    (96, 96, 8, 8),
    (80, 48, 16, 16),
]


def factors(out, in_, r, k, *, dtype=torch.float32, kind="random", seed=0, energy=False):
    """LoRA factors and a past of one layer in float64 arithmetic, then rounded to ``dtype``."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    a, b, left, right = randn(r, in_), randn(out, r), randn(out, k), randn(k, in_)
    if kind == "correlated":
        left[:, : min(r, k)] += 3 * b[:, : min(r, k)]
        right[: min(r, k)] += 3 * a[: min(r, k)]
    elif kind == "tiny":
        a, b, left, right = (1e-4 * t for t in (a, b, left, right))
    elif kind == "outliers":
        for rows, t in ((out, b), (out, left)):
            t[torch.randperm(rows, generator=gen)[: max(1, rows // 32)]] *= 1e3
        for cols, t in ((in_, a), (in_, right)):
            t[:, torch.randperm(cols, generator=gen)[: max(1, cols // 32)]] *= 1e3
    elif kind == "disjoint":
        left[: out // 2] *= 1e-3
        b[out // 2 :] *= 1e-3
    elif kind != "random":
        raise ValueError(kind)
    past = ek.truncate(left, right, max(1, k // 2)) if energy else ek.LowRank(left, right)
    return a.to(dtype), b.to(dtype), cast(past, dtype)


@cache
def vanishing_overlap():
    """float32 factors trained until they overlap far less with their past than by chance: gram's terms cancel."""
    a, b, past = factors(128, 128, 8, 8, dtype=torch.float64, seed=3)
    past_squared = (past.left @ past.right).square()
    optimizer = torch.optim.Adam([a.requires_grad_(), b.requires_grad_()], lr=0.02)
    for _ in range(1000):
        optimizer.zero_grad()
        squared = (b @ a).square()
        chance = squared.mean() * past_squared.mean() * squared.numel()
        overlap = (squared * past_squared).sum() / chance
        overlap.backward()
        optimizer.step()
    assert overlap < 5e-3, "the case must overlap far less than chance"
    return a.detach().float(), b.detach().float(), cast(past, torch.float32)


def cast(past, dtype):
    return ek.LowRank(*(None if t is None else t.to(dtype) for t in past))


def relative_error(found, expected):
    assert expected.norm() > 0, "a zero reference proves nothing"
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def exact(a, b, past, scaling, name="hadamard"):
    """Value and gradients by plain autograd through the materialising reference, in float64."""
    a, b = a.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    past = cast(past, torch.float64) if isinstance(past, ek.LowRank) else past.double()
    value = getattr(ek.reference, f"{name}_penalty")(a, b, past, scaling)
    return value.detach(), *torch.autograd.grad(value, (a, b))


def opcodes(call, package):
    """How many bytecode instructions of ``package`` a call executes: what Python does, without a clock."""
    directory, count = str(Path(package.__file__).parent) + "/", 0

    def trace(frame, event, arg):
        nonlocal count
        if not frame.f_code.co_filename.startswith(directory):
            return None
        frame.f_trace_opcodes = True
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


class Allocations:
    """What a call allocates on the CPU, in bytes: the ``largest`` piece, and the ``peak`` of what is alive at once.

    The profiler sees allocations inside registered operators, where modes of Python do not reach.
    """

    def __init__(self, call):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        alive = self.peak = self.largest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            alive += event.nbytes()
            self.peak, self.largest = max(self.peak, alive), max(self.largest, event.nbytes())
