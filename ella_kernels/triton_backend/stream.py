"""Launching the stream kernels: one launch per side and one for the values, for all layers of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import device_key
from ..layer import Layer
from . import records
from . import stream_kernels as kernels
from .launch import TL_DTYPES, arithmetic, register_limit, weight_arguments
from .tables import (
    batches,
    float_bits,
    gradient_base,
    is_aligned,
    side_classes,
    side_record,
    to_device,
)
from .tiles import StreamTile, stream_tile

__all__ = ["StreamLaunches", "prepare_stream", "stream_constants"]


class Launch(NamedTuple):
    """Programs of one side with one memory order, and what is compiled into them."""

    items: Tensor
    n_items: int
    constants: dict


class Plan(NamedTuple):
    """Device tables and grids of one batch of layers."""

    sides: Tensor
    layers: Tensor
    n_layers: int
    n_partials: int
    launches: list[Launch]


def stream_constants(r: int, k: int, tile: StreamTile) -> dict:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    return {
        "R": r,
        "K": k,
        "BM": tile.rows,
        "BN": tile.other_rows,
        "BR": min(tile.components, max(16, triton.next_power_of_2(r))),
        "BK": max(16, triton.next_power_of_2(k)) if 0 < k <= tile.past_held else tile.past_block,
    } | register_limit(tile.maxnreg)


class StreamLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    constants: dict
    precision: str

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        constants = self.constants | {"WEIGHT_IS_TENSOR": isinstance(weight, Tensor)}
        for plan in self.plans:
            partials = torch.empty(plan.n_partials, dtype=torch.float64, device=values.device)
            for launch in plan.launches:
                kernels.stream_kernel_factors[(launch.n_items,)](
                    plan.sides, launch.items, partials, *weight_arguments(weight, values), grad_base, **constants,
                    **launch.constants, PRECISION=self.precision,
                )  # fmt: skip
            kernels.stream_kernel_values[(plan.n_layers,)](plan.layers, partials, values, BLOCK=128, num_warps=1)


def prepare_stream(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> StreamLaunches:
    """Hadamard penalty by tiles, of factors or of a stored past; arguments as :func:`gram.prepare_gram`."""
    dtype, precision, products = arithmetic(precision, layers)
    _, _, r, k = layers[0].sizes
    tile = stream_tile(device_key(layers[0].lora_A.device), products)
    sizes = stream_constants(r, k, tile)
    energy = layers[0].row_energy is not None
    constants = sizes | {
        "STORED": layers[0].right is None,
        "ENERGY": energy,
        "WITH_GRAD": layers[0].grad_A is not None,
        "ACC": TL_DTYPES[dtype],
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    plans = _plans(layers, positions, sizes, gradient_base(layers))
    return StreamLaunches(plans, constants, precision)


def _plans(layers: Sequence[Layer], positions: Sequence[int], sizes: dict, grad_base: int) -> list[Plan]:
    return [
        _plan([layers[i] for i in chosen], [positions[i] for i in chosen], sizes, grad_base)
        for chosen in batches(layers, [0] * len(layers), 0)
    ]


def _plan(layers: Sequence[Layer], positions: Sequence[int], sizes: dict, grad_base: int) -> Plan:
    sides, rows, slot = [], [], 0
    items: dict[tuple[bool, bool], list] = {}
    for layer, position in zip(layers, positions, strict=True):
        for is_rows in (True, False):
            record = side_record(layer, is_rows, grad_base, 0)
            sides.append(record)
            size = record[records.ROWS.value]
            if is_rows:
                n_blocks = -(-size // sizes["BM"])
                rows.append([slot, n_blocks, 0, 0, float_bits(layer.scaling), position, 0, 0])
            elif layer.grad_A is None:
                continue
            components = range(0, sizes["R"], sizes["BR"]) if layer.grad_A is not None else (0,)
            chosen = items.setdefault((is_rows, bool(record[records.COMPONENTS_ARE_LAST.value])), [])
            for i in range(0, size, sizes["BM"]):
                chosen.extend([len(sides) - 1, i, 0, slot, c, 0, 0, 0] for c in components)
                slot += is_rows
    aligned = all(map(is_aligned, sides))
    on_sides, on_layers, *on_items = to_device([sides, rows, *items.values()], layers[0].lora_A.device)
    launches = []
    for ((is_rows, last), entries), table in zip(items.items(), on_items, strict=True):
        own, other = side_classes(layers[0])[:: 1 if is_rows else -1]
        constants = own.tl_dtypes | {f"{name}_2": t for name, t in other.tl_dtypes.items() if name != "GRAD"}
        constants |= {"ALIGNED": aligned, "IS_ROWS": is_rows, "LAST": last}
        launches.append(Launch(table, len(entries), constants))
    return Plan(on_sides, on_layers, len(layers), slot, launches)
