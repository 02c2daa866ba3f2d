"""Launching the gram kernels: at most three launches for all layers of a class, whatever their shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import device_key
from ..layer import Layer
from . import gram_kernels as kernels
from .launch import TL_DTYPES, arithmetic, register_limit, weight_arguments
from .primitives import n_pairs
from .schedule import Plan, Work, make_plans
from .tiles import GramTile, gram_tile

__all__ = ["GramLaunches", "compiled_constants", "gram_shape", "prepare_gram"]

_REDUCE_BLOCK = 1024
_ENERGY_TILE = 16


class Shape(NamedTuple):
    """Compile-time sizes of a class: ranks, and the tiles cut to them.

    Attributes:
        rows, tile_r, tile_k, warps: the ``blocks`` kernel's rows per step, and components of factor and past in a tile.
        grad_rows, grad_r, grad_k, grad_warps: of the ``factors`` kernel.
        stages to programs: as in :class:`tiles.GramTile`.
    """

    r: int
    k: int
    energy: bool
    rows: int
    tile_r: int
    tile_k: int
    warps: int
    grad_rows: int
    grad_r: int
    grad_k: int
    grad_warps: int
    stages: int
    grad_stages: int
    maxnreg: int | None
    grad_maxnreg: int | None
    programs: int

    @property
    def past_pairs(self) -> int:
        """Pairs of the past that a row of a Gram block holds, and its energy."""
        return n_pairs(self.k, self.grad_k) + self.energy

    @property
    def elements(self) -> int:
        """Of a Gram block; rows are padded to 16 bytes."""
        return n_pairs(self.r, 1) * -(-self.past_pairs // 4) * 4

    @property
    def n_slices(self) -> int:
        return -(-self.elements // _REDUCE_BLOCK)

    def work(self, itemsize: int) -> Work:
        """What planning needs to know: of equal entries only those of ordered tiles are computed."""

        def ordered(n: int, step: int) -> list[tuple[int, int]]:
            return [(first, second) for first in range(0, n, step) for second in range(first, n, step)]

        factor, past = ordered(self.r, self.tile_r), ordered(self.k, self.tile_k)
        tiles = [(*of_factor, *of_past) for of_factor in factor for of_past in past]
        if self.energy:
            # The past's component k does not exist: it stands for the energies.
            tiles += [(*of_factor, self.k, self.k) for of_factor in ordered(self.r, _ENERGY_TILE)]
        return Work(self.rows, self.grad_rows, self.elements, itemsize, tiles, self.programs)


def gram_shape(r: int, k: int, energy: bool, tile: GramTile) -> Shape:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    tile_r, tile_k = _components(r, 16), _components(k, 16)
    while tile_r * tile_k > tile.products:
        tile_r, tile_k = (tile_r // 2, tile_k) if tile_r > tile_k else (tile_r, tile_k // 2)
    return Shape(
        r, k, energy, tile.rows, tile_r, tile_k, tile.warps,
        tile.grad_rows, _components(r, tile.grad_components), _components(k, tile.grad_past_components),
        tile.grad_warps, tile.stages, tile.grad_stages, tile.maxnreg, tile.grad_maxnreg, tile.programs,
    )  # fmt: skip


def _components(rank: int, most: int) -> int:
    return min(most, max(4, triton.next_power_of_2(max(1, rank))))


def compiled_constants(shape: Shape) -> list[tuple[str, dict, int]]:
    """Name, compile-time sizes and options, and warps of the three kernels, in launch order."""
    sizes = {"R": shape.r, "K": shape.k, "GK": shape.grad_k, "Q": shape.past_pairs, "ENERGY": int(shape.energy)}
    blocks = sizes | {"BM": shape.rows, "TR": shape.tile_r, "TK": shape.tile_k, "TE": _ENERGY_TILE}
    blocks |= {"num_stages": shape.stages} | register_limit(shape.maxnreg)
    reduce = sizes | {"BLOCK": _REDUCE_BLOCK}
    factors = sizes | {"BM": shape.grad_rows, "GR": shape.grad_r}
    factors |= {"SLICES": triton.next_power_of_2(shape.n_slices), "WEIGHT_IS_TENSOR": True}
    factors |= {"num_stages": shape.grad_stages} | register_limit(shape.grad_maxnreg)
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
        totals = torch.empty(plan.n_slots if shape.energy else 1, dtype=torch.float64, device=device)
        partials = torch.empty(plan.n_layers * shape.n_slices, dtype=torch.float64, device=device)
        (_, for_blocks, warps), (_, for_reduce, reduce_warps), (_, for_factors, grad_warps) = self.constants
        for_factors = for_factors | {"WEIGHT_IS_TENSOR": isinstance(weight, Tensor)}
        common = {"ACC": acc, "PRECISION": self.precision}
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
        precision: "auto", "ieee" or "tf32", see :func:`launch.arithmetic`.
        positions: layer ``i``'s unweighted value is number ``positions[i]`` of the values.
    """
    dtype, precision, products = arithmetic(precision, layers)
    _, _, r, k = layers[0].sizes
    tile = gram_tile(device_key(layers[0].lora_A.device), products)
    shape = gram_shape(r, k, layers[0].row_energy is not None, tile)
    plans = make_plans(layers, positions, shape.work(dtype.itemsize))
    return GramLaunches(plans, shape, dtype, precision, compiled_constants(shape))
