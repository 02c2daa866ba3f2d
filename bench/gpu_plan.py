"""What ``bench.gpu_check`` measures: its cases, what of them fits a card together, and what was predicted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from .providers import BASELINE, PROVIDERS, dense_form
from .shapes import Case, Size, model_case

__all__ = [
    "COMPARED",
    "FIRST",
    "OURS",
    "PREDICTED",
    "Fit",
    "eager_batches",
    "fit",
    "n_sets",
    "predicted_registers",
    "shrunk",
    "signature_memory",
]

OURS = "ours auto, triton"


def ways(case: Case) -> tuple[str, ...]:
    """What a case is measured with, in the order in which ways are kept while the card has room."""
    # Beyond this, pairs are far more work than tiles.
    gram = ("ours gram, triton", "ours gram, torch") if max(size.k for size in case.sizes) <= 16 else ()
    return (BASELINE, OURS, "dense compiled", *gram, "ours stream, triton", "ours spectral, triton", "dense rebuilt")


def with_energies(case: Case) -> Case:
    """The case with the energy term on top of its components."""
    return Case(f"{case.name} +energy", tuple(size._replace(energy=True) for size in case.sizes))


# 16 components and the energies are all that is read of p = 16 of 120: how many were dropped changes nothing.
FIRST = {
    "q,v k 8": model_case("LLaMA-3.1-8B", "qv", 8, 8),
    "q,v p 16": with_energies(model_case("LLaMA-3.1-8B", "qv", 8, 16)),
    "q,v k 120": model_case("LLaMA-3.1-8B", "qv", 8, 120),
}
# Against dense ways, most important first: what does not fit the run's time is left out from the end. Host copies of
# W_past only where they are small: pinned memory is not given back before the process ends.
_COMPARED = {
    "dense q,v k 8": FIRST["q,v k 8"],
    "dense T5 k 8": model_case("T5-large", "qv", 8, 8),
    "dense all k 16": model_case("LLaMA-3.1-8B", "all", 16, 16),
    "dense q,v k 120": FIRST["q,v k 120"],
    "dense q,v p 16": FIRST["q,v p 16"],
    "dense all k 120": model_case("LLaMA-3.1-8B", "all", 16, 120),
    "dense T5 k 120": model_case("T5-large", "qv", 8, 120),
    "dense all p 16": with_energies(model_case("LLaMA-3.1-8B", "all", 16, 16)),
    "dense q,v k 64": model_case("LLaMA-3.1-8B", "qv", 8, 64),
}
COMPARED: dict[str, tuple[Case, tuple[str, ...]]] = {
    name: (case, ways(case) + ("dense on host",) * (name == "dense q,v k 8")) for name, case in _COMPARED.items()
}
# Seconds (from, to) of a step, and of its kernels, counted before any was measured: bench/NOTES.md.
PREDICTED: dict[str, dict[str, tuple[float, float]]] = {
    "q,v k 8": {
        "graphed": (75e-6, 120e-6),
        "eager": (450e-6, 700e-6),
        "gram_fwd_kernel_blocks": (40e-6, 55e-6),
        "gram_bwd_kernel_factors": (30e-6, 42e-6),
    },
    "q,v p 16": {"graphed": (220e-6, 340e-6), "eager": (450e-6, 700e-6)},
    "q,v k 120": {"graphed": (2.0e-3, 3.2e-3), "eager": (2.0e-3, 3.2e-3)},
}
# Beside what is counted: a context, the float64 reference of a block of rows, and what an allocator cannot use.
_ASIDE = 3 * 2**29
_SHARE = 0.85


class Fit(NamedTuple):
    """What of a case runs together on a card.

    Attributes:
        kept: names of providers. left_out: the others, with the reason.
        needed: bytes of device memory, and pinned: of the host's.
    """

    kept: list[str]
    left_out: dict[str, str]
    needed: int
    pinned: int


def signature_memory() -> int:
    """How many in-place calls are recognised at once: more operand sets in turns would be checked every time."""
    from ella_kernels.recognition import MAX_CALLS

    return MAX_CALLS


def n_sets(name: str, sizes: Sequence[Size], cache_bytes: int) -> int:
    """Operand sets to rotate over: more than the cache holds, and no more than calls are recognised at once."""
    touched = sum(4 * (s.out + s.in_) * s.r + PROVIDERS[name].held_bytes(s) for s in sizes)
    touched = touched or sum(4 * s.weight for s in sizes)
    return max(1, min(signature_memory(), -(-2 * cache_bytes // touched)))


def fit(case: Case, names: Sequence[str], card_bytes: int, cache_bytes: int) -> Fit:
    """Keep ways, in the order given, while everything they hold at the same time fits the card.

    A dense past is held once for all ways that read it, calls follow each other, so of their work memory the largest
    counts; a captured graph keeps its own.
    """
    kept: list[str] = []
    left_out: dict[str, str] = {}
    for name in names:
        needed = _needed(case, [*kept, name], cache_bytes)
        if needed > _SHARE * card_bytes:
            beside = f" beside {', '.join(kept)}" if kept else ""
            left_out[name] = f"would need {needed / 2**30:.1f} of {card_bytes / 2**30:.1f} GiB{beside}"
        else:
            kept.append(name)
    pinned = sum(4 * s.weight for s in case.sizes) * ("dense on host" in kept)
    return Fit(kept, left_out, _needed(case, kept, cache_bytes), pinned)


def _needed(case: Case, names: Sequence[str], cache_bytes: int) -> int:
    sets = {name: n_sets(name, case.sizes, cache_bytes) for name in names}
    factors = sum(4 * (s.out + s.in_) * s.r for s in case.sizes)
    operands = sum(4 * (s.out + s.in_) * (s.r + s.k + s.energy) for s in case.sizes)
    dense = [sets[name] for name in names if PROVIDERS[name].hold is dense_form]
    work = {name: PROVIDERS[name].work_bytes(case.sizes) for name in names}
    graphs = sum(sets[name] * work[name] for name in names if "triton" in name)
    return (
        _ASIDE
        + max(sets.values(), default=0) * operands
        + sum(sets.values()) * factors
        + max(dense, default=0) * sum(4 * s.weight for s in case.sizes)
        + max(work.values(), default=0)
        + graphs
    )


def eager_batches(names: Sequence[str], sizes: Sequence[Size], cache_bytes: int) -> list[list[str]]:
    """Ways of ours to time eagerly in turns: no more operand sets in a batch than calls are recognised at once."""
    batches: list[list[str]] = []
    used = signature_memory() + 1
    for name in names:
        sets = n_sets(name, sizes, cache_bytes)
        if used + sets > signature_memory():
            batches.append([])
            used = 0
        batches[-1].append(name)
        used += sets
    return batches


def shrunk(case: Case) -> Case:
    """The case's ranks on two tiny layers, for a dry run."""
    _, _, r, k, energy = case.sizes[0]
    return Case(f"{case.name}, shrunk", (Size(40, 56, r, k, energy), Size(33, 48, r, k, energy)))


def predicted_registers(size: Size) -> dict[str, list[int]]:
    """Registers of each kernel that the compiler gave for these ranks (sm_90, "auto"), if the committed table has
    them."""
    table = Path(__file__).parent / "results" / "resources.md"
    wanted = f"r {size.r}, k {size.k}" + (", energy" if size.energy else "")
    found: dict[str, list[int]] = {}
    for line in table.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip(" `") for cell in line.split("|")[1:-1]]
        problem = re.sub(r", (rows|cols)$", "", cells[1]) if len(cells) == 10 else ""
        if problem == wanted and cells[2:4] == ["sm_90", "tf32x3"]:
            found.setdefault(cells[0], []).append(int(cells[5]))
    return found
