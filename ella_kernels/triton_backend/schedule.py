"""Dividing the layers of a class into chunks of rows, batches that fit the workspace, and launches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..layer import Layer
from .launch import multiprocessors
from .tables import (
    Item,
    LayerRecord,
    Side,
    Types,
    batches,
    float_bits,
    gradient_base,
    is_aligned,
    side_classes,
    side_record,
    to_device,
)

__all__ = ["Chunks", "Launch", "Owners", "Plan", "Work", "make_plans"]

# Bytes of partial blocks one batch of layers may need. More layers take further batches of three launches.
WORK_BYTES = 12 * 2**20


class Launch(NamedTuple):
    """Programs that share a compiled kernel.

    Attributes:
        items: ``(n_items, 8)`` int64, flat.
        types, other_types: of the sides that the items are of, and of the layers' other sides.
        is_rows, last: of every side among them, where the kernel is compiled for it.
    """

    items: Tensor
    n_items: int
    types: Types
    other_types: Types
    is_rows: bool
    last: bool


class Plan(NamedTuple):
    """Device tables and launches of one batch of layers.

    Attributes:
        sides, layers: ``(2 n_layers, 15)`` and ``(n_layers, 6)`` int64, flat. The sides of a layer are neighbours.
        n_slots: partial blocks of all layers together.
        launches: by kernel, under the last word of its name.
    """

    sides: Tensor
    layers: Tensor
    n_layers: int
    n_slots: int
    launches: dict[str, list[Launch]]


class Key(NamedTuple):
    """What items of one launch have in common: kernel, and what it is compiled for."""

    kernel: str
    is_rows: bool
    last: bool = True


class Work(Protocol):
    """How an algorithm divides the sides of a class among programs."""

    @property
    def touched(self) -> dict[str, tuple[str, ...]]:
        """Operands that each kernel touches."""

    @property
    def max_slots(self) -> int:
        """Partial blocks that a batch of layers may have."""

    @property
    def by_order(self) -> bool:
        """Launches are compiled for which side it is and for its memory order. Else sides of equal dtypes share theirs,
        and every kernel has one even without items."""

    def n_slots(self, size: int, is_rows: bool) -> int:
        """Partial blocks of a side of ``size`` rows."""

    def items(self, side: Side, i_side: int, is_rows: bool, slot: int, with_grad: bool) -> Iterator[tuple[str, Item]]:
        """The programs of a side, with the kernel each belongs to; its partial blocks begin at ``slot``."""


class Chunks(NamedTuple):
    """Partial blocks of chunks of rows of both sides, then gradients of (smaller) chunks: gram and spectral.

    Attributes:
        rows, grad_rows: of a chunk.
        tiles: the division of a partial block among programs, as four first components.
    """

    touched: dict[str, tuple[str, ...]]
    max_slots: int
    rows: int
    grad_rows: int
    tiles: Sequence[tuple[int, int, int, int]]
    by_order: bool = False

    @classmethod
    def of(
        cls,
        layers: Sequence[Layer],
        touched: dict[str, tuple[str, ...]],
        step: int,
        grad_step: int,
        tiles: Sequence[tuple[int, int, int, int]],
        block_bytes: int,
        programs: int = 4,
    ) -> Chunks:
        """Chunks of multiples of ``step`` and ``grad_step`` rows: enough to fill the device, and few enough for partial
        blocks of ``block_bytes`` to fit the workspace. A multiprocessor has ``programs`` to do.

        Functions of the whole class, so that results do not depend on the order of its layers.
        """
        n_programs = programs * multiprocessors(layers[0].lora_A.device)
        n_rows = sum(size for layer in layers for size in layer.sizes[:2])
        wanted, fitting = -(-n_rows * len(tiles) // n_programs), -(-n_rows * block_bytes // WORK_BYTES)
        rows = -(-max(wanted, fitting, 4 * step) // step) * step
        grad_steps = min(8, max(1, -(-n_rows // (n_programs * grad_step))))
        return cls(touched, WORK_BYTES // block_bytes, rows, grad_steps * grad_step, tiles)

    def n_slots(self, size: int, is_rows: bool) -> int:
        return -(-size // self.rows)

    def items(self, side: Side, i_side: int, is_rows: bool, slot: int, with_grad: bool) -> Iterator[tuple[str, Item]]:
        for i, start in enumerate(range(0, side.rows, self.rows)):
            stop = min(start + self.rows, side.rows)
            for tile in self.tiles:
                yield "blocks", Item(i_side, start, stop, slot + i, *tile)
        for start in range(0, side.rows if with_grad else 0, self.grad_rows):
            yield "factors", Item(i_side, start, min(start + self.grad_rows, side.rows))


class Owners(NamedTuple):
    """One program for ``rows`` rows of a side and a block of components; the rows' leave their part of the value.

    Attributes:
        components: the first components of the blocks.
    """

    touched: dict[str, tuple[str, ...]]
    rows: int
    components: Sequence[int]
    # A slot is one float64.
    max_slots: int = 2**31
    by_order: bool = True

    def n_slots(self, size: int, is_rows: bool) -> int:
        return -(-size // self.rows) if is_rows else 0

    def items(self, side: Side, i_side: int, is_rows: bool, slot: int, with_grad: bool) -> Iterator[tuple[str, Item]]:
        if not (is_rows or with_grad):
            return
        for i, start in enumerate(range(0, side.rows, self.rows)):
            for first in self.components if with_grad else (0,):
                yield "factors", Item(i_side, start, min(start + self.rows, side.rows), slot + i, first)


def make_plans(layers: Sequence[Layer], positions: Sequence[int], work: Work) -> list[Plan]:
    """Plans of the batches that together are ``layers``, all of one class; layer ``i``'s value has ``positions[i]``."""
    slots = [sum(work.n_slots(size, i == 0) for i, size in enumerate(layer.sizes[:2])) for layer in layers]
    grad_base = gradient_base(layers)
    return [
        _plan([layers[i] for i in chosen], [positions[i] for i in chosen], work, grad_base)
        for chosen in batches(layers, slots, work.max_slots)
    ]


def _plan(layers: Sequence[Layer], positions: Sequence[int], work: Work, grad_base: int) -> Plan:
    classes = side_classes(layers[0])
    sides: list[Side] = []
    records: list[LayerRecord] = []
    items: dict[Key, list[Item]] = {}
    if not work.by_order:
        items = {Key(kernel, is_rows): [] for kernel in work.touched for is_rows in (True, False)}
    n_slots = 0
    for layer, position in zip(layers, positions, strict=True):
        n_rows, n_cols = (work.n_slots(size, i == 0) for i, size in enumerate(layer.sizes[:2]))
        first = (n_slots, n_slots + n_rows)
        records.append(LayerRecord(first[0], n_rows, first[1], n_cols, float_bits(layer.scaling), position))
        for which, is_rows in enumerate((True, False)):
            side = side_record(layer, is_rows, grad_base, first[1 - which])
            for kernel, item in work.items(side, len(sides), is_rows, first[which], layer.grad_A is not None):
                key = Key(kernel, is_rows, bool(side.components_are_last) if work.by_order else True)
                items.setdefault(key, []).append(item)
            sides.append(side)
        n_slots += n_rows + n_cols
    if not work.by_order and classes[0] == classes[1]:
        items = {Key(k, True): items[Key(k, True)] + items[Key(k, False)] for k in work.touched}
    on_sides, on_layers, *on_items = to_device([sides, records, *items.values()], layers[0].lora_A.device)
    aligned = all(map(is_aligned, sides))
    launches: dict[str, list[Launch]] = {kernel: [] for kernel in work.touched}
    for (key, entries), table in zip(items.items(), on_items, strict=True):
        own, other = classes[:: 1 if key.is_rows else -1]
        touched = work.touched[key.kernel]
        types = own.types(aligned, touched), other.types(aligned, [name for name in touched if name != "grad"])
        launches[key.kernel].append(Launch(table, len(entries), *types, key.is_rows, key.last))
    return Plan(on_sides, on_layers, len(layers), n_slots, launches)
