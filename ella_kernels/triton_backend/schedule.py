"""Dividing the layers of a class into chunks of rows, batches that fit the workspace, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..layer import Layer
from .launch import multiprocessors
from .tables import batches, float_bits, is_aligned, side_classes, side_record, to_device

__all__ = ["Launch", "Plan", "Work", "make_plans"]

# Bytes of partial blocks one batch of layers may need. More layers take further batches of three launches.
WORK_BYTES = 12 * 2**20


class Work(NamedTuple):
    """One class's units of work.

    Attributes:
        rows, grad_rows: rows per step of the block kernel and of the gradient kernel.
        elements, itemsize: of one partial block. tiles: its division among programs, as four first components.
        programs: how many a multiprocessor has to do.
    """

    rows: int
    grad_rows: int
    elements: int
    itemsize: int
    tiles: list[tuple[int, int, int, int]]
    programs: int = 4


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
    launches: list[Launch]


def _chunk_rows(sizes: Sequence[int], work: Work, n_programs: int) -> int:
    """Rows per partial block: enough chunks to fill the device, few enough to fit the workspace."""
    wanted = -(-sum(sizes) * len(work.tiles) // n_programs)
    fitting = -(-sum(sizes) * work.elements * work.itemsize // WORK_BYTES)
    return -(-max(wanted, fitting, 4 * work.rows) // work.rows) * work.rows


def make_plans(layers: Sequence[Layer], positions: Sequence[int], work: Work) -> list[Plan]:
    """Plans of the batches that together are ``layers``, all of one class; layer ``i``'s value has ``positions[i]``."""
    n_programs = work.programs * multiprocessors(layers[0].lora_A.device)
    sizes = [size for layer in layers for size in layer.sizes[:2]]
    # Functions of the whole group, so that results do not depend on the order of its layers.
    chunk = _chunk_rows(sizes, work, n_programs)
    per_grad = -(-sum(sizes) // n_programs)
    per_grad = min(8, max(1, -(-per_grad // work.grad_rows))) * work.grad_rows
    slots = [sum(-(-size // chunk) for size in layer.sizes[:2]) for layer in layers]
    grad_base = 0 if layers[0].grad_B is None else layers[0].grad_B.data_ptr()
    return [
        _plan([layers[i] for i in chosen], [positions[i] for i in chosen], work, chunk, per_grad, grad_base)
        for chosen in batches(layers, slots, WORK_BYTES // (work.elements * work.itemsize))
    ]


def _plan(
    layers: Sequence[Layer], positions: Sequence[int], work: Work, chunk: int, per_grad: int, grad_base: int
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
                blocks[which].extend([*rows, *tile] for tile in work.tiles)
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
    return Plan(on_sides, on_layers, len(layers), slot, launches)
