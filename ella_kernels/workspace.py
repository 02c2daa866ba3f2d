"""Work memory of a penalty on a GPU, from shapes alone: what its launches allocate and free again in every step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from .dispatch import no_kernel, select_algorithm
from .layer import Layer

__all__ = ["Size", "work_bytes"]


class Size(NamedTuple):
    """One layer of a penalty: weight ``(out, in_)``, LoRA rank ``r``, ``k`` components of the past, energies or not."""

    out: int
    in_: int
    r: int
    k: int
    energy: bool = False

    @property
    def weight(self) -> int:
        """Elements of the weight."""
        return self.out * self.in_

    def __str__(self) -> str:
        return f"{self.out}x{self.in_} r{self.r} k{self.k}" + (" +energy" if self.energy else "")

    @property
    def is_zero(self) -> bool:
        return 0 in (self.out, self.in_, self.r) or (self.k == 0 and not self.energy)


def work_bytes(sizes: Iterable[Size], target: str, penalty: str = "hadamard", algorithm: str = "auto") -> int:
    """Most bytes of work memory that one call with float32 operands holds at once, its device tables included.

    Args:
        sizes: the layers, in the order of the call.
        target: what the kernels are compiled for, "sm_90" or "gfx942", or "cpu" for Triton's interpreter.
        penalty: "hadamard" or "spectral". algorithm: of the Hadamard penalty; "auto" is the one chosen for the target.

    Raises:
        ImportError: Triton is not installed.
        ValueError: a layer without a Triton kernel.
    """
    classes: dict[tuple, list[Size]] = {}
    for size in sizes:
        if size.is_zero:
            continue
        chosen = "spectral" if penalty == "spectral" else algorithm
        if chosen == "auto":
            chosen = select_algorithm(*size[:4], device=target)
        reason = no_kernel(chosen, size.r, size.k)
        if reason is not None:
            raise ValueError(f"a layer of {size}: {reason}")
        classes.setdefault((chosen, size.r, size.k, size.energy), []).append(size)
    found = [_of_class(chosen, alike, target) for (chosen, *_), alike in classes.items()]
    # Tables stay, work memory is given back before the next launch.
    return sum(tables for tables, _ in found) + max((work for _, work in found), default=0)


def _of_class(algorithm: str, sizes: Sequence[Size], target: str) -> tuple[int, int]:
    """Bytes of the device tables and, at most at once, of work memory, of layers with equal ranks."""
    from .triton_backend import ALGORITHMS

    made = ALGORITHMS[algorithm](_stand_ins(sizes, algorithm), "auto", range(len(sizes)), target)
    return sum(map(_table_bytes, made.plans)), made.work_bytes


def _table_bytes(plan: Any) -> int:
    items = [launch.items for launches in plan.launches.values() for launch in launches]
    return sum(table.numel() * table.element_size() for table in (plan.sides, plan.layers, *items))


def _stand_ins(sizes: Sequence[Size], algorithm: str) -> list[Layer]:
    """Layers of these sizes without memory of their own. Their gradients have addresses that differ."""
    one, targets = torch.zeros(1), torch.zeros(2 * len(sizes), 1)
    return [
        Layer(
            one.expand(r, in_), one.expand(out, r), one.expand(out, k), one.expand(k, in_),
            one.expand(out) if energy else None, one.expand(in_) if energy else None, 1.0, algorithm,
            targets[2 * i].expand(r, in_), targets[2 * i + 1].expand(out, r),
        )
        for i, (out, in_, r, k, energy) in enumerate(sizes)
    ]  # fmt: skip
