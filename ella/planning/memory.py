"""Bytes on one GPU, by engine: the formulae of docs/scaling.md. The GPU with the largest share is meant.

An adapter and the past are kept as PEFT and ELLA keep them: float32 beside a base in any dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ella.config import EllaConfig
from ella.linear_layers import ALIGNMENT
from ella.terms import KEPT
from ella_kernels.workspace import Size, work_bytes

from .shapes import Layer, ModelShapes, Weight

__all__ = ["ENGINES", "Memory", "Ranks", "is_kept", "memory", "penalty_sizes", "ranks_of", "whole_bytes"]

ENGINES = ("one", "ddp", "fsdp2", "zero2", "zero3")
# AdamW: two moments of the parameters' dtype. DeepSpeed keeps a float32 copy of its part of the parameters besides.
_MOMENTS = 2
# As recipes/deepspeed sets them: elements of DeepSpeed's buffer of gradients, and from how many on ZeRO-3 splits one.
ZERO_BUCKET = 20_000_000
ZERO_PERSISTED = 10_000


@dataclass(frozen=True)
class Ranks:
    """Components of one layer's past.

    Attributes:
        stored: of its factors. is_truncated: whether others were dropped, so that there are energies.
        used: by the penalty. has_energy: whether the penalty has an energy term.
    """

    stored: int
    is_truncated: bool
    used: int
    has_energy: bool


def ranks_of(layer: Layer, ella: EllaConfig, tasks: int | None) -> Ranks:
    """After ``tasks`` tasks; None: as many as fill ``past_rank``."""
    full = min(layer.out, layer.in_)
    found = full if tasks is None else min(full, tasks * layer.r)
    stored, is_truncated = min(found, ella.past_rank), found > ella.past_rank
    used = stored if ella.penalty_rank is None else min(stored, ella.penalty_rank)
    has_energy = (is_truncated or used < stored) and ella.penalty == "hadamard"
    if ella.penalty == "importance":
        used, has_energy = 0, stored > 0
    return Ranks(stored, is_truncated, used, has_energy)


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU.

    Attributes:
        base: weights of the base model. adapter: the trained parameters. gradients, optimizer: of those; DeepSpeed's
            float32 copy of them is with the optimizer.
        past: the finished tasks' factors. penalty: what is held beside them for the penalty, truncated factors and
            energies.
        buckets: what the engine collects gradients in.
        work: the penalty's work memory, for a moment in every step.
        gathered: whole parameters of two blocks and of what is outside of blocks, an estimate; activations, which ELLA
            does not change, are in no number here.
        host: memory of the CPU: energies, and with ``keep_past="merge"`` the base weights without the past.
        dense_past: ``W_past`` as float32 matrices. dense_work: one more matrix a layer, from forward to backward.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    past: int
    penalty: int
    buckets: int
    work: int
    gathered: int
    host: int
    dense_past: int
    dense_work: int

    @property
    def state(self) -> int:
        """What is held between steps."""
        return self.base + self.adapter + self.optimizer + self.past + self.penalty + self.buckets

    @property
    def total(self) -> int:
        """State, gradients and the larger of what forward and penalty need for a moment; without activations."""
        return self.state + self.gradients + max(self.work, self.gathered)

    @property
    def dense_total(self) -> int:
        """The same with the penalty's published form, which has the same base, adapter and optimizer."""
        ours = self.past + self.penalty
        return self.state - ours + self.gradients + self.dense_past + max(self.dense_work, self.gathered)


def memory(shapes: ModelShapes, ella: EllaConfig, engine: str, gpus: int, tasks: int | None, target: str) -> Memory:
    """:class:`Memory` of a model; ``target`` as :func:`~ella_kernels.workspace.work_bytes` takes it."""
    spread = gpus if engine in ("fsdp2", "zero3") else 1
    ranks = [ranks_of(layer, ella, tasks) for layer in shapes.layers]
    rest = [weight for weight in shapes.base if weight.is_trained]
    trained = [*(w for layer in shapes.layers for w in layer.adapter), *rest]
    is_inside = ella.keep_past != "external"
    # What is trained beside the factors has a frozen copy from the first task's end on.
    past = [w for layer, own in zip(shapes.layers, ranks, strict=True) for w in layer.factors(own.stored)]
    past += rest if is_inside else []
    base = [weight for weight in shapes.base if not weight.is_trained]
    if engine.startswith("zero"):  # DeepSpeed casts the whole model to one dtype
        trained = [replace(weight, itemsize=shapes.itemsize) for weight in trained]
        past = [replace(weight, itemsize=shapes.itemsize) for weight in past] if is_inside else past
    dense = [layer.parts * _rows(layer.out, spread if engine == "fsdp2" else 1) * layer.in_ for layer in shapes.layers]
    return Memory(
        base=_held(base, engine, spread),
        adapter=_held(trained, engine, spread),
        gradients=_gradients(shapes.layers, trained, engine, gpus),
        optimizer=_optimizer(trained, engine, gpus),
        past=_held(past, engine, spread) if is_inside else _held(past, "one", 1),
        penalty=_penalty(shapes, ranks, ella, engine, spread),
        buckets=_buckets(trained, engine),
        work=_work(shapes, ranks, ella, engine, spread, target),
        gathered=_gathered([*base, *trained, *past], shapes.itemsize, engine, spread) if spread > 1 else 0,
        host=_host(shapes, ranks, ella),
        dense_past=4 * sum(dense),
        dense_work=4 * sum(dense),
    )


def _rows(n: int, spread: int) -> int:
    """Rows of ``n`` on the first of ``spread`` GPUs."""
    return -(-n // spread)


def _held(weights: Iterable[Weight], engine: str, spread: int) -> int:
    return sum(_bytes(weight, engine, spread) for weight in weights)


def _bytes(weight: Weight, engine: str, spread: int) -> int:
    if engine == "fsdp2" and weight.shape and not weight.is_packed:
        return _rows(weight.shape[0], spread) * math.prod(weight.shape[1:]) * weight.itemsize
    is_left_whole = engine == "zero3" and weight.numel < ZERO_PERSISTED
    return weight.bytes(weight.itemsize, spread) + (weight.bytes(weight.itemsize) if is_left_whole else 0)


def _gradients(layers: Sequence[Layer], trained: Sequence[Weight], engine: str, gpus: int) -> int:
    if engine in ("one", "ddp") and all(layer.is_plain for layer in layers):
        # One allocation of the factors' gradients, each at a multiple of 64 elements.
        n = 2 * len(layers)
        aligned = sum(-(-w.numel // ALIGNMENT) * ALIGNMENT * w.itemsize for w in trained[:n])
        return aligned + _held(trained[n:], engine, 1)
    if engine == "zero2":
        return _in_partitions(trained, gpus)
    if engine == "zero3":
        return sum(-(-w.numel // gpus) * w.itemsize for w in trained)
    return _held(trained, engine, gpus if engine == "fsdp2" else 1)


def _in_partitions(trained: Sequence[Weight], gpus: int) -> int:
    """ZeRO-2 cuts the list of parameters into equal parts, and keeps the whole gradients of those that it cuts."""
    ends = list(accumulate(weight.numel for weight in trained))
    part = -(-ends[-1] // gpus)
    places = [(end - weight.numel, end, weight.numel) for end, weight in zip(ends, trained, strict=True)]
    largest = max(
        sum(numel for start, end, numel in places if start < (rank + 1) * part and end > rank * part)
        for rank in range(gpus)
    )
    return largest * trained[0].itemsize


def _optimizer(trained: Sequence[Weight], engine: str, gpus: int) -> int:
    if engine.startswith("zero"):
        return (1 + _MOMENTS) * 4 * sum(-(-w.numel // gpus) for w in trained)
    return _MOMENTS * _held(trained, engine, gpus if engine == "fsdp2" else 1)


def _buckets(trained: Sequence[Weight], engine: str) -> int:
    if engine == "ddp":
        return _held(trained, engine, 1)
    return ZERO_BUCKET * trained[0].itemsize if engine.startswith("zero") else 0


def penalty_sizes(layers: Sequence[Layer], ranks: Sequence[Ranks], engine: str, spread: int) -> list[Size]:
    """What one GPU's penalty is computed from: under FSDP2 its own rows of ``ΔW``, else all of it."""
    share = spread if engine == "fsdp2" else 1
    return [
        Size(_rows(layer.out, share), layer.in_, layer.r, own.used, own.has_energy)
        for layer, own in zip(layers, ranks, strict=True)
        for _ in range(layer.parts)
    ]


def is_kept(layers: Sequence[Layer], ranks: Sequence[Ranks], engine: str) -> bool:
    """Whether every rank keeps whole what the penalty needs so: ``right`` under FSDP2, all of the past under ZeRO-3."""
    pairs = zip(layers, ranks, strict=True)
    if engine == "zero3":
        return 4 * sum(layer.parts * (layer.out + layer.in_) * own.used for layer, own in pairs) <= KEPT
    return 4 * sum(layer.parts * layer.in_ * own.used for layer, own in pairs) <= KEPT


def _copies(shapes: ModelShapes, ranks: Sequence[Ranks], ella: EllaConfig, engine: str, spread: int) -> int:
    """Factors and energies that the penalty reads and that are not the stored ones themselves."""
    itemsize = shapes.itemsize if engine == "zero3" and ella.penalty_rank is None else 4
    kept, total = is_kept(shapes.layers, ranks, engine), 0
    for layer, own in zip(shapes.layers, ranks, strict=True):
        energy = 4 * int(own.is_truncated or own.used < own.stored)
        rows, columns = layer.out, layer.in_
        if engine == "fsdp2":
            rows = _rows(layer.out, spread)
            columns_held = columns * (own.used if kept else _rows(own.used, spread))
        elif engine == "zero3" or ella.penalty_rank is not None:
            columns_held = columns * own.used
        else:
            total += layer.parts * (rows + columns) * energy
            continue
        total += layer.parts * (itemsize * (rows * own.used + columns_held) + energy * (rows + columns))
    return total


def _penalty(shapes: ModelShapes, ranks: Sequence[Ranks], ella: EllaConfig, engine: str, spread: int) -> int:
    made_anew = engine == "zero3" and not is_kept(shapes.layers, ranks, engine)
    return 0 if made_anew else _copies(shapes, ranks, ella, engine, spread)


def _work(shapes: ModelShapes, ranks: Sequence[Ranks], ella: EllaConfig, engine: str, spread: int, target: str) -> int:
    layers = shapes.layers
    kernels = work_bytes(penalty_sizes(layers, ranks, engine, spread), target, ella.penalty)
    if engine == "fsdp2":
        # All of A, then its gradient, then that in the order in which it is reduced.
        whole = sum(whole_bytes(layer.adapter[0], 4, engine, spread) for layer in layers)
        return max(2 * whole + kernels, 3 * whole + whole // spread)
    # DeepSpeed takes the gradient through the loss; ZeRO-3 gathers what it is computed from.
    adapter = shapes.itemsize * sum(weight.numel for layer in layers for weight in layer.adapter)
    if engine == "zero3":
        known = sum(w.numel for layer, own in zip(layers, ranks, strict=True) for w in layer.factors(own.stored))
        anew = 0 if is_kept(layers, ranks, engine) else _copies(shapes, ranks, ella, engine, spread)
        return kernels + 2 * adapter + shapes.itemsize * known + anew
    return kernels + (adapter if engine == "zero2" else 0)


def whole_bytes(weight: Weight, itemsize: int, engine: str, gpus: int) -> int:
    """Of a parameter gathered from all GPUs, which FSDP2 fills up to equal rows: four rows from 64 GPUs are 64."""
    if engine != "fsdp2" or weight.is_packed or not weight.shape:
        return weight.bytes(itemsize)
    rows = gpus * _rows(weight.shape[0], gpus)
    return rows * math.prod(weight.shape[1:]) * min(itemsize, weight.itemsize)


def _gathered(weights: Iterable[Weight], itemsize: int, engine: str, gpus: int) -> int:
    """Two blocks at a time, the second one on its way, and what is in no block."""
    units: dict[str, int] = {}
    for weight in weights:
        units[weight.unit] = units.get(weight.unit, 0) + whole_bytes(weight, itemsize, engine, gpus)
    outside = units.pop("", 0)
    return outside + sum(sorted(units.values())[-2:])


def _host(shapes: ModelShapes, ranks: Sequence[Ranks], ella: EllaConfig) -> int:
    pairs = zip(shapes.layers, ranks, strict=True)
    energies = sum(4 * layer.parts * (layer.out + layer.in_) for layer, own in pairs if own.is_truncated)
    if ella.keep_past != "merge":
        return energies
    return energies + sum(layer.out * layer.in_ * shapes.itemsize for layer in shapes.layers)
