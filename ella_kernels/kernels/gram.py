"""Launching the gram kernels: at most three launches for all layers of a class, whatever their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import device_key
from ..grouped import Layer
from . import gram_kernels as kernels
from .launch import TL_DTYPES, dot_precision, multiprocessors, weight_arguments
from .tables import address_key, batches, cached, float_bits, is_aligned, side_classes, side_record, to_device
from .tiles import GramTile, gram_tile

__all__ = ["hadamard_gram"]

# Bytes of partial Gram blocks one batch of layers may need. More layers take further batches of three launches.
WORK_BYTES = 12 * 2**20
_REDUCE_BLOCK = 1024


def _next_power(n: int, least: int = 16) -> int:
    return max(least, triton.next_power_of_2(max(1, n)))


class Shape(NamedTuple):
    """Compile-time sizes of a class: ranks, pairs, and the tiles cut to them."""

    r: int
    k: int
    energy: bool
    pairs: int
    past_pairs: int
    rows: int
    tile_pairs: int
    tile_past: int
    grad_rows: int
    grad_first: int
    grad_second: int
    grad_past: int
    warps: int
    grad_warps: int
    stages: int

    @property
    def elements(self) -> int:
        return self.pairs * self.past_pairs


def gram_shape(r: int, k: int, energy: bool, tile: GramTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    pairs, past_pairs = r * (r + 1) // 2, k * (k + 1) // 2 + energy
    second = min(_next_power(r, 1), tile.grad_pairs)
    first = max(min(_next_power(r, 1), tile.grad_pairs // second), -(-16 // second))
    return Shape(
        r, k, energy, pairs, past_pairs,
        tile.rows, min(tile.pairs, _next_power(pairs)), min(tile.past_pairs, _next_power(past_pairs)),
        tile.grad_rows, first, second, min(tile.grad_past_pairs, _next_power(past_pairs)),
        tile.warps, tile.grad_warps, tile.stages,
    )  # fmt: skip


class Launch(NamedTuple):
    """Items of one dtype class: a launch of the blocks kernel and one of the factors kernel."""

    blocks: Tensor
    grads: Tensor
    n_blocks: int
    n_grads: int
    constants: dict


class Plan(NamedTuple):
    """Device tables and grids of one batch of layers."""

    sides: Tensor
    layers: Tensor
    n_layers: int
    n_slots: int
    n_slices: int
    launches: list[Launch]


def _chunk_rows(sizes: Sequence[int], shape: Shape, itemsize: int, n_programs: int) -> int:
    """Rows per partial block: enough chunks to fill the device, few enough to fit the workspace."""
    tiles = -(-shape.pairs // shape.tile_pairs) * -(-shape.past_pairs // shape.tile_past)
    wanted = -(-sum(sizes) * tiles // n_programs)
    fitting = -(-sum(sizes) * shape.elements * itemsize // WORK_BYTES)
    rows = max(wanted, fitting, 4 * shape.rows)
    return -(-rows // shape.rows) * shape.rows


def _plans(layers: Sequence[Layer], positions: Sequence[int], shape: Shape, itemsize: int) -> list[Plan]:
    n_programs = 4 * multiprocessors(layers[0].lora_A.device)
    sizes = [size for layer in layers for size in layer.sizes[:2]]
    # Functions of the whole group, so that results do not depend on the order of its layers.
    chunk = _chunk_rows(sizes, shape, itemsize, n_programs)
    per_grad = -(-sum(sizes) // n_programs)
    per_grad = min(8, max(1, -(-per_grad // shape.grad_rows))) * shape.grad_rows
    slots = [sum(-(-size // chunk) for size in layer.sizes[:2]) for layer in layers]
    grad_base = 0 if layers[0].grad_B is None else layers[0].grad_B.data_ptr()
    return [
        _plan([layers[i] for i in chosen], [positions[i] for i in chosen], shape, chunk, per_grad, grad_base)
        for chosen in batches(layers, slots, WORK_BYTES // (shape.elements * itemsize))
    ]


def _plan(
    layers: Sequence[Layer], positions: Sequence[int], shape: Shape, chunk: int, per_grad: int, grad_base: int
) -> Plan:
    sides, records, slot = [], [], 0
    blocks: tuple[list, list] = ([], [])
    grads: tuple[list, list] = ([], [])
    for layer, position in zip(layers, positions, strict=True):
        counts = [-(-size // chunk) for size in layer.sizes[:2]]
        starts = (slot, slot + counts[0])
        records.append([starts[0], counts[0], starts[1], counts[1], float_bits(layer.scaling), position, 0, 0])
        for which, size in enumerate(layer.sizes[:2]):
            side = len(sides)
            sides.append(side_record(layer, which == 0, grad_base, starts[1 - which]))
            for i in range(counts[which]):
                rows = (side, i * chunk, min((i + 1) * chunk, size), starts[which] + i)
                blocks[which].extend(
                    [*rows, p, q, 0, 0]
                    for p in range(0, shape.pairs, shape.tile_pairs)
                    for q in range(0, shape.past_pairs, shape.tile_past)
                )
            if layer.grad_A is not None:
                grads[which].extend(
                    [side, start, min(start + per_grad, size), 0, 0, 0, 0, 0] for start in range(0, size, per_grad)
                )
        slot += sum(counts)
    classes = side_classes(layers[0])
    if classes[0] == classes[1]:
        classes, blocks, grads = classes[:1], (blocks[0] + blocks[1],), (grads[0] + grads[1],)
    aligned = all(map(is_aligned, sides))
    on_sides, on_layers, *items = to_device([sides, records, *blocks, *grads], layers[0].lora_A.device)
    launches = [
        Launch(items[i], items[len(classes) + i], len(blocks[i]), len(grads[i]), side.tl_dtypes | {"ALIGNED": aligned})
        for i, side in enumerate(classes)
    ]
    return Plan(on_sides, on_layers, len(layers), slot, -(-shape.elements // _REDUCE_BLOCK), launches)


def hadamard_gram(
    layers: Sequence[Layer], weight: Tensor | float, precision: str, values: Tensor, positions: Sequence[int]
) -> None:
    """Hadamard penalty of layers that share ranks and dtypes; gradients are added to ``grad_A``, ``grad_B`` if given.

    Args:
        layers: checked layers with low-rank pasts, none of them zero by shape, of one class and device.
        weight: factor on the gradients, a number or a 0-dim tensor, which is read on the device.
        precision: "auto", "ieee" or "tf32", see :func:`launch.dot_precision`.
        values, positions: layer ``i``'s unweighted value goes to ``values[positions[i]]``.
    """
    dtype, device = layers[0].dtype, layers[0].lora_A.device
    precision = dot_precision(precision, dtype, device)
    _, _, r, k = layers[0].sizes
    shape = gram_shape(r, k, layers[0].row_energy is not None, gram_tile(device_key(device), precision))
    key = ("gram", shape, dtype, side_classes(layers[0]), tuple(positions), *address_key(layers))
    grad_base = 0 if layers[0].grad_B is None else layers[0].grad_B.data_ptr()
    for plan in cached(key, lambda: _plans(layers, positions, shape, dtype.itemsize)):
        _run_plan(plan, shape, grad_base, weight, dtype, precision, values)


def _run_plan(
    plan: Plan, shape: Shape, grad_base: int, weight: Tensor | float, dtype: torch.dtype, precision: str, values: Tensor
) -> None:
    device, acc = values.device, TL_DTYPES[dtype]
    blocks = torch.empty(plan.n_slots * shape.elements, dtype=dtype, device=device)
    totals = torch.empty(plan.n_slots if shape.energy else 1, dtype=dtype, device=device)
    partials = torch.empty(plan.n_layers * plan.n_slices, dtype=torch.float64, device=device)
    sizes = {"R": shape.r, "K": shape.k, "ENERGY": int(shape.energy), "ACC": acc}
    for launch in plan.launches:
        kernels.gram_fwd_kernel_blocks[(launch.n_blocks,)](
            plan.sides, launch.blocks, blocks, totals, **sizes, **launch.constants, PRECISION=precision, BM=shape.rows,
            TP=shape.tile_pairs, TQ=shape.tile_past, num_warps=shape.warps, num_stages=shape.stages,
        )  # fmt: skip
    kernels.gram_fwd_kernel_reduce[(plan.n_layers, plan.n_slices)](
        plan.layers, blocks, totals, partials, **sizes, BLOCK=_REDUCE_BLOCK, num_warps=4
    )
    for i, launch in enumerate(plan.launches):
        # The first launch of a plan also finishes the values.
        n_layers = plan.n_layers if i == 0 else 0
        if n_layers + launch.n_grads == 0:
            continue
        kernels.gram_bwd_kernel_factors[(n_layers + launch.n_grads,)](
            plan.layers, plan.sides, launch.grads, blocks, partials, values, *weight_arguments(weight, values),
            grad_base, n_layers, plan.n_slices, **sizes, **launch.constants, PRECISION=precision,
            WEIGHT_IS_TENSOR=isinstance(weight, Tensor), BM=shape.grad_rows, TQ=shape.grad_past, RA=shape.grad_first,
            RB=shape.grad_second, SLICES=_next_power(plan.n_slices, 1), num_warps=shape.grad_warps,
            num_stages=shape.stages,
        )  # fmt: skip
