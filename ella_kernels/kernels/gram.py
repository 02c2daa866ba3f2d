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
from .launch import TL_DTYPES, dot_precision, weight_arguments
from .plans import Plan, Work, make_plans
from .tables import address_key, cached, side_classes
from .tiles import GramTile, gram_tile

__all__ = ["GramLaunches", "compiled_constants", "gram_shape", "prepare_gram"]

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

    @property
    def n_slices(self) -> int:
        return -(-self.elements // _REDUCE_BLOCK)

    def work(self, itemsize: int) -> Work:
        """What planning needs to know."""
        tiles = [
            (p, q) for p in range(0, self.pairs, self.tile_pairs) for q in range(0, self.past_pairs, self.tile_past)
        ]
        return Work(self.rows, self.grad_rows, self.elements, itemsize, tiles)


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


def compiled_constants(shape: Shape) -> list[tuple[str, dict, int]]:
    """Name, compile-time sizes and warps of the three kernels, in launch order."""
    sizes = {"R": shape.r, "K": shape.k, "ENERGY": int(shape.energy)}
    blocks = sizes | {"BM": shape.rows, "TP": shape.tile_pairs, "TQ": shape.tile_past}
    reduce = sizes | {"BLOCK": _REDUCE_BLOCK}
    factors = sizes | {"BM": shape.grad_rows, "TQ": shape.grad_past, "RA": shape.grad_first, "RB": shape.grad_second}
    factors |= {"SLICES": _next_power(shape.n_slices, 1), "WEIGHT_IS_TENSOR": True}
    return [
        ("gram_fwd_kernel_blocks", blocks, shape.warps),
        ("gram_fwd_kernel_reduce", reduce, 4),
        ("gram_bwd_kernel_factors", factors, shape.grad_warps),
    ]


class GramLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    shape: Shape
    dtype: torch.dtype
    precision: str
    constants: list[tuple[str, dict, int]]

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """Values into their positions, ``weight`` times the gradients onto the targets, at most three launches a plan.

        Args:
            weight: a number or a 0-dim tensor, which is read on the device.
            values: float32 or float64.
            grad_base: address of the first layer's ``grad_B``, 0 without gradients.
        """
        for plan in self.plans:
            self._launch_plan(plan, weight, values, grad_base)

    def _launch_plan(self, plan: Plan, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        shape, dtype, device, acc = self.shape, self.dtype, values.device, TL_DTYPES[self.dtype]
        blocks = torch.empty(plan.n_slots * shape.elements, dtype=dtype, device=device)
        totals = torch.empty(plan.n_slots if shape.energy else 1, dtype=dtype, device=device)
        partials = torch.empty(plan.n_layers * shape.n_slices, dtype=torch.float64, device=device)
        (_, for_blocks, warps), (_, for_reduce, reduce_warps), (_, for_factors, grad_warps) = self.constants
        for_factors = for_factors | {"WEIGHT_IS_TENSOR": isinstance(weight, Tensor)}
        common = {"ACC": acc, "PRECISION": self.precision, "num_stages": shape.stages}
        for launch in plan.launches:
            kernels.gram_fwd_kernel_blocks[(launch.n_blocks,)](
                plan.sides, launch.blocks, blocks, totals, **for_blocks, **launch.constants, **common, num_warps=warps
            )
        kernels.gram_fwd_kernel_reduce[(plan.n_layers, shape.n_slices)](
            plan.layers, blocks, totals, partials, **for_reduce, ACC=acc, num_warps=reduce_warps
        )
        for i, launch in enumerate(plan.launches):
            # The first launch of a plan also finishes the values.
            n_layers = plan.n_layers if i == 0 else 0
            if n_layers + launch.n_grads == 0:
                continue
            kernels.gram_bwd_kernel_factors[(n_layers + launch.n_grads,)](
                plan.layers, plan.sides, launch.grads, blocks, partials, values, *weight_arguments(weight, values),
                grad_base, n_layers, shape.n_slices, **for_factors, **launch.constants, **common,
                num_warps=grad_warps,
            )  # fmt: skip


def prepare_gram(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> GramLaunches:
    """Hadamard penalty of layers that share ranks and dtypes; gradients go to ``grad_A``, ``grad_B`` if given.

    Args:
        layers: checked layers with low-rank pasts, none of them zero by shape, of one class and device.
        precision: "auto", "ieee" or "tf32", see :func:`launch.dot_precision`.
        positions: layer ``i``'s unweighted value is number ``positions[i]`` of the values.
    """
    dtype, device = layers[0].dtype, layers[0].lora_A.device
    precision = dot_precision(precision, dtype, device)
    _, _, r, k = layers[0].sizes
    shape = gram_shape(r, k, layers[0].row_energy is not None, gram_tile(device_key(device), precision))
    key = ("gram", shape, dtype, side_classes(layers[0]), tuple(positions), *address_key(layers))
    plans = cached(key, lambda: make_plans(layers, positions, shape.work(dtype.itemsize)))
    return GramLaunches(plans, shape, dtype, precision, compiled_constants(shape))
