"""Launching the spectral kernels: three launches for all layers of a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..dispatch import device_key
from ..layer import Layer
from . import spectral_kernels as kernels
from .launch import TL_DTYPES, dot_precision, sums_dtype, weight_arguments
from .schedule import Plan, Work, make_plans
from .tiles import SpectralTile, spectral_tile

__all__ = ["SpectralLaunches", "prepare_spectral", "spectral_constants"]


def spectral_constants(r: int, k: int, tile: SpectralTile) -> dict:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    return {
        "R": r,
        "K": k,
        "BR": max(16, triton.next_power_of_2(r)),
        "BK": min(tile.past_components, max(16, triton.next_power_of_2(k))),
    }


class SpectralLaunches(NamedTuple):
    """Layers of one class up to their launches; holds device tables, no operand."""

    plans: list[Plan]
    sizes: dict
    tile: SpectralTile
    dtype: torch.dtype
    sums: torch.dtype
    precision: str

    def launch(self, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        """As :meth:`gram.GramLaunches.launch`."""
        for plan in self.plans:
            self._launch_plan(plan, weight, values, grad_base)

    def _launch_plan(self, plan: Plan, weight: Tensor | float, values: Tensor, grad_base: int) -> None:
        tile, device, elements = self.tile, values.device, self.sizes["R"] * self.sizes["K"]
        n_slices = -(-self.sizes["K"] // self.sizes["BK"])
        blocks = torch.empty(plan.n_slots * elements, dtype=self.sums, device=device)
        coefficients = torch.empty(2 * plan.n_layers * elements, dtype=self.dtype, device=device)
        partials = torch.empty(plan.n_layers * n_slices, dtype=torch.float64, device=device)
        exact = "ieee" if self.sums == torch.float64 else self.precision
        sizes = self.sizes | {"ACC": TL_DTYPES[self.dtype]}
        compiled = {"num_warps": tile.warps, "num_stages": tile.stages}
        for launch in plan.launches:
            kernels.spectral_fwd_kernel_blocks[(launch.n_blocks,)](
                plan.sides,
                launch.blocks,
                blocks,
                **sizes | {"ACC": TL_DTYPES[self.sums]},
                **launch.constants,
                PRECISION=exact,
                BM=tile.rows,
                **compiled,
            )
        kernels.spectral_fwd_kernel_reduce[(plan.n_layers, 2, n_slices)](
            plan.layers, blocks, coefficients, partials, **sizes, num_warps=tile.warps
        )
        for i, launch in enumerate(plan.launches):
            # The first launch of a plan also finishes the values.
            n_layers = plan.n_layers if i == 0 else 0
            if n_layers + launch.n_grads == 0:
                continue
            kernels.spectral_bwd_kernel_factors[(n_layers + launch.n_grads,)](
                plan.layers, plan.sides, launch.grads, coefficients, partials, values,
                *weight_arguments(weight, values), grad_base, n_layers, **sizes, **launch.constants,
                WEIGHT_IS_TENSOR=isinstance(weight, Tensor), PRECISION=self.precision, BM=tile.grad_rows,
                SLICES=triton.next_power_of_2(n_slices), **compiled,
            )  # fmt: skip


def prepare_spectral(layers: Sequence[Layer], precision: str, positions: Sequence[int]) -> SpectralLaunches:
    """Spectral penalty of layers of one class; arguments as :func:`gram.prepare_gram`. Energies do not enter."""
    dtype, device = layers[0].dtype, layers[0].lora_A.device
    # The long sums, where nearly orthogonal factors cancel.
    sums = sums_dtype(precision != "tf32", layers)
    precision = dot_precision(precision, dtype, device)
    _, _, r, k = layers[0].sizes
    tile = spectral_tile(device_key(device), precision)
    sizes = spectral_constants(r, k, tile)
    work = Work(tile.rows, tile.grad_rows, k * r, sums.itemsize, [(c, 0, 0, 0) for c in range(0, k, sizes["BK"])])
    return SpectralLaunches(make_plans(layers, positions, work), sizes, tile, dtype, sums, precision)
