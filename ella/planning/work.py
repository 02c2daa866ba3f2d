"""Operations, bytes moved, collectives and time of one optimizer step on one GPU: the formulae of docs/scaling.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ella.config import EllaConfig
from ella_kernels.dispatch import COSTS, gram_cost, select_algorithm, stream_cost
from ella_kernels.workspace import Size

from .gpus import Gpu
from .memory import Ranks, is_kept, whole_bytes
from .shapes import ModelShapes

__all__ = ["Collective", "Operations", "Times", "algorithms", "collectives", "operations", "penalty_bytes", "times"]

# Elements of DDP's buckets: 25 MiB, the first of 1 MiB.
_BUCKET = 25 * 2**20


@dataclass(frozen=True)
class Operations:
    """Floating-point operations, two for a multiply-add; elementwise ones of the Hadamard kernels are left out.

    Attributes:
        base, adapter, past: forward and backward of the frozen base weights, the trained factors and the knowledge.
            Attention scores are left out.
        penalty: value and gradients. dense_penalty: the same of the published form.
    """

    base: int
    adapter: int
    past: int
    penalty: int
    dense_penalty: int


@dataclass(frozen=True)
class Collective:
    """``count`` operations of one kind in a step that bring ``bytes`` to every GPU together.

    ``owner`` is "engine" for what training the adapter takes without ELLA, "past" for the finished tasks' share of
    those, "penalty" for ELLA's own.
    """

    owner: str
    kind: str
    count: int
    bytes: int


@dataclass(frozen=True)
class Times:
    """Seconds of a step at a GPU's rates. Bounds, except the penalty's where its rate is measured.

    Attributes: ``training``: products of base and adapter; ``past``: of the finished tasks; ``penalty``; ``engine`` and
    ``penalty_collectives``: what is sent, if nothing overlaps.
    """

    training: float
    past: float
    penalty: float
    engine: float
    penalty_collectives: float


def algorithms(sizes: Iterable[Size], target: str, penalty: str) -> dict[str, int]:
    """How many parts take which algorithm."""
    found: dict[str, int] = {}
    for size in sizes:
        name = "none" if size.is_zero else _algorithm(size, target, penalty)
        found[name] = found.get(name, 0) + 1
    return found


def _algorithm(size: Size, target: str, penalty: str) -> str:
    return "spectral" if penalty == "spectral" else select_algorithm(*size[:4], device=target)


def operations(
    shapes: ModelShapes, ella: EllaConfig, ranks: Sequence[Ranks], sizes: Sequence[Size], tokens: int, target: str,
    is_recomputed: bool,
) -> Operations:  # fmt: skip
    """Of a step over ``tokens`` tokens; ``is_recomputed``: activation checkpointing repeats the forward."""
    # Frozen weights: a product forward, one backward for the input's gradient, none for their own.
    frozen = 6 if is_recomputed else 4
    active = sum(weight.numel * weight.active for weight in shapes.base)
    pairs = list(zip(shapes.layers, ranks, strict=True))
    trained = sum(layer.active * (layer.out + layer.in_) * layer.r for layer, _ in pairs)
    known = sum(layer.active * (layer.out + layer.in_) * own.stored for layer, own in pairs)
    return Operations(
        base=round(frozen * active * tokens),
        adapter=round((frozen + 2) * trained * tokens),
        past=round(frozen * known * tokens) if ella.keep_past == "adapter" else 0,
        penalty=sum(_penalty_operations(size, target, ella.penalty) for size in sizes),
        dense_penalty=sum(size.out * size.in_ * (6 * size.r + 6) for size in sizes if not size.is_zero),
    )


def _penalty_operations(size: Size, target: str, penalty: str) -> int:
    if size.is_zero:
        return 0
    out, in_, r, k, energy = size
    match _algorithm(size, target, penalty):
        case "gram":
            return 4 * (out + in_) * (r * (r + 1) // 2) * (k * (k + 1) // 2 + energy)
        case "stream":
            builds = COSTS.get(target, COSTS["default"]).builds
            return 2 * out * in_ * (builds * (r + k) + 2 * r)
        case _:
            return 4 * (out + in_) * r * k + 6 * r * k * k


def penalty_bytes(sizes: Iterable[Size]) -> int:
    """To and from memory: factors and past read twice, gradients read and written; float32."""
    return sum(4 * (s.out + s.in_) * (2 * (s.r + s.k + s.energy) + 2 * s.r) for s in sizes if not s.is_zero)


def collectives(
    shapes: ModelShapes, ella: EllaConfig, ranks: Sequence[Ranks], engine: str, gpus: int
) -> list[Collective]:
    """What GPUs exchange in a step without accumulation."""
    if gpus == 1 or engine == "one":
        return []
    share = (gpus - 1) / gpus
    rest = [weight for weight in shapes.base if weight.is_trained]
    trained = [*(w for layer in shapes.layers for w in layer.adapter), *rest]
    base = [weight for weight in shapes.base if not weight.is_trained]
    known = [w for layer, own in zip(shapes.layers, ranks, strict=True) for w in layer.factors(own.stored)]
    grads = sum(weight.numel * weight.itemsize for weight in trained)
    if engine == "ddp":
        return [Collective("engine", "all-reduce", math.ceil(grads / _BUCKET), round(2 * share * grads))]
    if engine == "zero2":
        return [
            Collective("engine", "reduce-scatter", 1, round(share * grads)),
            Collective("engine", "all-gather", 1, round(share * grads)),
        ]
    units = len({weight.unit for weight in (*base, *trained)})
    # Forward and backward, in the dtype in which the model multiplies.
    both = 2 * share * sum(whole_bytes(weight, shapes.itemsize, engine, gpus) for weight in (*base, *trained))
    reduced = sum(whole_bytes(weight, weight.itemsize, engine, gpus) for weight in trained)
    found = [
        Collective("engine", "all-gather", 2 * units, round(both)),
        Collective("engine", "reduce-scatter", len({w.unit for w in trained}), round(share * reduced)),
    ]
    if ella.keep_past != "external":
        found.append(
            Collective("past", "all-gather", 0, round(2 * share * sum(w.bytes(shapes.itemsize) for w in known)))
        )
    return [*found, *_penalty_collectives(shapes, ella, ranks, engine, gpus)]


def _penalty_collectives(
    shapes: ModelShapes, ella: EllaConfig, ranks: Sequence[Ranks], engine: str, gpus: int
) -> list[Collective]:
    pairs, share = list(zip(shapes.layers, ranks, strict=True)), (gpus - 1) / gpus
    if engine == "zero3":
        # DeepSpeed sends a message for every factor.
        numels = [w.numel for layer, own in pairs for w in (*layer.adapter, *layer.factors(own.stored)) if w.numel]
        return [Collective("penalty", "all-gather", len(numels), round(share * shapes.itemsize * sum(numels)))]
    of_a = sum(whole_bytes(layer.adapter[0], 4, engine, gpus) for layer, _ in pairs)
    right = sum(whole_bytes(layer.factors(own.used)[0], 4, engine, gpus) for layer, own in pairs)
    moved = 0 if is_kept(shapes.layers, ranks, engine) else right
    gathered = Collective("penalty", "all-gather", 1, round(share * (of_a + moved)))
    if ella.penalty == "spectral":  # the gradient of A follows from LᵀB, which is a sum over rows
        products = 4 * sum(layer.parts * own.used * layer.r for layer, own in pairs)
        return [gathered, Collective("penalty", "all-reduce", 1, round(2 * share * products))]
    return [gathered, Collective("penalty", "reduce-scatter", 1, round(share * of_a))]


def times(
    gpu: Gpu, done: Operations, sizes: Sequence[Size], sent: Iterable[Collective], gpus: int, penalty: str
) -> Times:
    """The time that a GPU's rates leave for all of it."""
    rate = gpu.link if gpus <= gpu.node else gpu.network
    seconds = {"engine": 0.0, "past": 0.0, "penalty": 0.0}
    for collective in sent:
        seconds[collective.owner] += collective.bytes / rate
    return Times(
        training=(done.base + done.adapter) / gpu.bf16,
        past=done.past / gpu.bf16,
        penalty=penalty_bound(gpu, sizes, penalty) * (gpu.penalty_factor or 1.0),
        engine=seconds["engine"] + seconds["past"],
        penalty_collectives=seconds["penalty"],
    )


def penalty_bound(gpu: Gpu, sizes: Iterable[Size], penalty: str) -> float:
    """Seconds that the penalty needs at the least, by products and by bytes, whichever is longer."""
    sizes = list(sizes)
    cost = sum(_units(size, gpu.target, penalty) for size in sizes if not size.is_zero)
    return max(2 * gpu.products * cost / gpu.fp32_products, penalty_bytes(sizes) / gpu.bandwidth)


def _units(size: Size, target: str, penalty: str) -> float:
    """Multiply-adds as ``select_algorithm`` counts them, elementwise work included."""
    cost = COSTS.get(target, COSTS["default"])
    match _algorithm(size, target, penalty):
        case "gram":
            return gram_cost(*size[:4], cost)
        case "stream":
            return stream_cost(*size[:4], cost)
        case _:
            return _penalty_operations(size, target, penalty) / 2
