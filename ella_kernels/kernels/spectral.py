"""Launching the spectral kernels: three launches for all layers of a class."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from ..dispatch import device_key
from ..grouped import Layer
from . import spectral_kernels as kernels
from .launch import TL_DTYPES, dot_precision, weight_arguments
from .plans import Plan, Work, make_plans
from .tables import address_key, cached, side_classes
from .tiles import SpectralTile, spectral_tile

__all__ = ["projected_norm", "spectral_constants"]


def spectral_constants(r: int, k: int, tile: SpectralTile) -> dict:
    """Cut a row of the tile table to ranks ``r`` and ``k``; dots need at least 16 of everything."""
    return {
        "R": r,
        "K": k,
        "BR": max(16, triton.next_power_of_2(r)),
        "BK": min(tile.past_components, max(16, triton.next_power_of_2(k))),
    }


def projected_norm(
    layers: Sequence[Layer], weight: Tensor | float, precision: str, values: Tensor, positions: Sequence[int]
) -> None:
    """Spectral penalty of layers of one class; arguments as :func:`gram.hadamard_gram`. Energies do not enter."""
    dtype, device = layers[0].dtype, layers[0].lora_A.device
    # The long sums in float64, unless tf32 was asked for: nearly orthogonal factors cancel there. Not for half
    # operands, which Triton 3.7 cannot widen into a float64 dot.
    operands = [t for layer in layers for t in (layer.lora_A, layer.lora_B, layer.left, layer.right)]
    narrow = precision == "tf32" or any(t.dtype.itemsize == 2 for t in operands)
    sums = torch.float32 if narrow and dtype == torch.float32 else torch.float64
    precision = dot_precision(precision, dtype, device)
    _, _, r, k = layers[0].sizes
    tile = spectral_tile(device_key(device), precision)
    sizes = spectral_constants(r, k, tile)
    work = Work(tile.rows, tile.grad_rows, k * r, sums.itemsize, [(c, 0) for c in range(0, k, sizes["BK"])])
    key = (
        "spectral",
        tile,
        *sizes.values(),
        dtype,
        sums,
        side_classes(layers[0]),
        tuple(positions),
        *address_key(layers),
    )
    grad_base = 0 if layers[0].grad_B is None else layers[0].grad_B.data_ptr()
    for plan in cached(key, lambda: make_plans(layers, positions, work)):
        _run_plan(plan, sizes, tile, grad_base, weight, dtype, sums, precision, values)


def _run_plan(
    plan: Plan,
    sizes: dict,
    tile: SpectralTile,
    grad_base: int,
    weight: Tensor | float,
    dtype: torch.dtype,
    sums: torch.dtype,
    precision: str,
    values: Tensor,
) -> None:
    device, elements = values.device, sizes["R"] * sizes["K"]
    n_slices = -(-sizes["K"] // sizes["BK"])
    blocks = torch.empty(plan.n_slots * elements, dtype=sums, device=device)
    coefficients = torch.empty(2 * plan.n_layers * elements, dtype=dtype, device=device)
    partials = torch.empty(plan.n_layers * n_slices, dtype=torch.float64, device=device)
    exact = "ieee" if sums == torch.float64 else precision
    sizes = sizes | {"ACC": TL_DTYPES[dtype]}
    compiled = {"num_warps": tile.warps, "num_stages": tile.stages}
    for launch in plan.launches:
        kernels.spectral_fwd_kernel_blocks[(launch.n_blocks,)](
            plan.sides,
            launch.blocks,
            blocks,
            **sizes | {"ACC": TL_DTYPES[sums]},
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
            plan.layers, plan.sides, launch.grads, coefficients, partials, values, *weight_arguments(weight, values),
            grad_base, n_layers, **sizes, **launch.constants, WEIGHT_IS_TENSOR=isinstance(weight, Tensor),
            PRECISION=precision, BM=tile.grad_rows, SLICES=triton.next_power_of_2(n_slices), **compiled,
        )  # fmt: skip
