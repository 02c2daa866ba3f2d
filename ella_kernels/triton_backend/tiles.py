"""Tile shapes by device, with a default row. A table and no autotuning: a first call costs one compilation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from .. import recognition

__all__ = [
    "GRAM_TILES",
    "SPECTRAL_TILES",
    "STREAM_TILES",
    "VARIANTS",
    "GramTile",
    "SpectralTile",
    "StreamTile",
    "gram_tile",
    "spectral_tile",
    "stream_tile",
    "variant",
]


class GramTile(NamedTuple):
    """Blocks of the gram kernels, before they are cut to the problem.

    Attributes:
        rows, products, warps: the ``blocks`` kernel; one program accumulates (products, products) over rows.
        grad_rows, grad_components, grad_past_components, grad_warps: the ``factors`` kernel; a tile of coefficients is
            the square of its past components (at most ``products / 8``) by the square of its components.
        stages, grad_stages: software pipelining depth.
        maxnreg, grad_maxnreg: registers that the compiler may take, if fewer than it would.
        programs: how many a multiprocessor has to do.
    """

    rows: int
    products: int
    warps: int
    grad_rows: int
    grad_components: int
    grad_past_components: int
    grad_warps: int
    stages: int = 1
    grad_stages: int = 1
    maxnreg: int | None = None
    grad_maxnreg: int | None = None
    programs: int = 4


# The default row must compile without spills where registers are scarcest: it is checked as sm_80.
_GRAM_WGMMA = GramTile(32, 64, 4, 64, 8, 8, 4)
_GRAM_FMA = GramTile(32, 32, 4, 64, 8, 4, 4, grad_maxnreg=255)
# tcgen05 works on 128 rows at a time; sums outside of it need the registers of eight warps.
_GRAM_TCGEN05 = GramTile(32, 64, 4, 128, 8, 8, 8)
GRAM_TILES: dict[str, dict[str, GramTile]] = {
    "default": {
        "tf32x3": GramTile(32, 64, 4, 32, 8, 8, 4),
        "tf32": GramTile(32, 64, 4, 32, 8, 4, 4),
        # ptxas spills below a limit of its own choice, and not when it is told that it has all registers.
        "ieee": GramTile(32, 32, 4, 32, 8, 4, 4, grad_maxnreg=255),
        "float64": GramTile(32, 64, 8, 32, 8, 4, 8),
    },
    "sm_90": {"tf32x3": _GRAM_WGMMA, "tf32": _GRAM_WGMMA, "ieee": _GRAM_FMA},
    "sm_100": {"tf32x3": _GRAM_TCGEN05, "tf32": _GRAM_TCGEN05._replace(grad_warps=4)},
    "gfx942": {"ieee": GramTile(32, 64, 4, 64, 8, 8, 4)},
    # The interpreter: no registers to save, and every step is slow.
    "cpu": {"ieee": GramTile(64, 64, 4, 64, 8, 8, 4), "float64": GramTile(64, 64, 4, 64, 8, 8, 4)},
}


class StreamTile(NamedTuple):
    """Blocks of the stream kernel: owned rows × rows of the other side.

    Attributes:
        rows, other_rows: a tile of the weight. components: of the factors, at a time.
        past_held: components of the past up to which the owned rows' are split once and kept, in shared memory.
        past_block: components of a longer past at a time.
    """

    rows: int
    other_rows: int
    components: int
    past_held: int
    past_block: int
    warps: int
    stages: int = 1
    maxnreg: int | None = None


STREAM_TILES: dict[str, dict[str, StreamTile]] = {
    "default": {
        "tf32x3": StreamTile(64, 32, 32, 64, 32, 4),
        "tf32": StreamTile(64, 32, 64, 128, 32, 4),
        "ieee": StreamTile(32, 32, 32, 16, 16, 4, maxnreg=255),
        "float64": StreamTile(32, 32, 16, 16, 16, 4),
    },
    "sm_90": {"tf32x3": StreamTile(64, 32, 64, 128, 32, 4)},
    # More components would not fit the tensor memory.
    "sm_100": {"tf32x3": StreamTile(128, 64, 32, 64, 64, 8)},
    "gfx942": {"ieee": StreamTile(64, 64, 64, 32, 32, 4)},
    "cpu": {"ieee": StreamTile(64, 64, 64, 16, 16, 4), "float64": StreamTile(64, 64, 64, 16, 16, 4)},
}


class SpectralTile(NamedTuple):
    """Blocks of the spectral kernels: rows per step of the two passes, and components of the past at a time."""

    rows: int
    grad_rows: int
    past_components: int
    warps: int
    stages: int = 1


_SPECTRAL = {
    "tf32x3": SpectralTile(64, 64, 32, 4),
    "tf32": SpectralTile(64, 64, 32, 4),
    "ieee": SpectralTile(64, 32, 32, 4),
}
SPECTRAL_TILES: dict[str, dict[str, SpectralTile]] = {
    "default": _SPECTRAL,
}


# Rows to be timed beside the table's on a GPU: which algorithm, and what is different. Registers and spills of each:
# ``python -m ella_kernels.resources --variants``.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "gram, two stages in 128 registers": ("gram", {"stages": 2, "maxnreg": 128}),
    "gram, eight programs a multiprocessor": ("gram", {"programs": 8}),
    "gram, gradients in 168 registers": ("gram", {"grad_maxnreg": 168}),
    "stream, 128 rows and eight warps": ("stream", {"rows": 128, "warps": 8, "maxnreg": 128}),
}
_chosen: list[tuple[str, dict[str, Any]]] = []


@contextmanager
def variant(name: str) -> Iterator[None]:
    """While it lasts, calls take a row of :data:`VARIANTS` instead of the table's; not for several threads at once.

    Raises:
        ValueError: an unknown name.
    """
    if name not in VARIANTS:
        raise ValueError(f"variant must be one of {sorted(VARIANTS)}, found {name!r}")
    _chosen.append(VARIANTS[name])
    recognition.forget()
    try:
        yield
    finally:
        _chosen.pop()
        recognition.forget()


def _changes(algorithm: str) -> dict[str, Any]:
    return _chosen[-1][1] if _chosen and _chosen[-1][0] == algorithm else {}


def gram_tile(target: str, precision: str) -> GramTile:
    """The row for a target and a dot precision, or "float64" for sums in it; the default row where there is none."""
    return (GRAM_TILES["default"] | GRAM_TILES.get(target, {}))[precision]._replace(**_changes("gram"))


def stream_tile(target: str, precision: str) -> StreamTile:
    """As :func:`gram_tile`, for the stream kernel."""
    return (STREAM_TILES["default"] | STREAM_TILES.get(target, {}))[precision]._replace(**_changes("stream"))


def spectral_tile(target: str, precision: str) -> SpectralTile:
    """As :func:`gram_tile`, for the spectral kernels."""
    return (SPECTRAL_TILES["default"] | SPECTRAL_TILES.get(target, {}))[precision]
