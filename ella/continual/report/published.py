"""Published overall accuracies, to stand beside ours."""

from __future__ import annotations

from collections.abc import Mapping

from ..metrics import NAN
from .blocks import Block, Cell, Divider, Row, Table, Text
from .text import number

__all__ = ["PUBLISHED", "family_of", "published_blocks"]

#: T5-large, arm: (name, Standard, Long); percent, means over three orders each, from the methods' papers.
PUBLISHED: dict[str, tuple[str, float, float]] = {
    "ella": ("ELLA", 79.9, 73.6),
    "gorp": ("GORP", 79.8, 76.0),
    "pslora": ("PS-LoRA", 79.6, 75.5),
    "oliera": ("OLieRA", 79.6, 72.6),
    "nlora": ("N-LoRA", 78.8, 72.4),
    "osf": ("OSF", 75.9, 71.3),
    "olora": ("O-LoRA", 75.8, 69.6),
    "joint": ("joint training", 80.0, 76.5),
}
FAMILIES = ("standard", "long")


def family_of(order: str) -> str:
    """Which of :data:`FAMILIES` an order of the literature is of, "" for any other."""
    return next((family for family in FAMILIES if order.startswith(f"{family}-")), "")


def published_blocks(family: str, ours: Mapping[str, float]) -> list[Block]:
    """The table beside ``ours`` (overall accuracy by arm), and what may be read from it; nothing for family ""."""
    if not family:
        return []
    column = 1 + FAMILIES.index(family)
    order = sorted(PUBLISHED, key=lambda arm: (arm == "joint", -float(PUBLISHED[arm][column])))
    rows: list[Row | Divider] = []
    for arm in order:
        if arm == "joint":
            rows.append(Divider("Reference"))
        cells = [Cell(f"{PUBLISHED[arm][column]:.1f}"), Cell(number(ours.get(arm, NAN), "–"))]
        rows.append(Row(PUBLISHED[arm][0], cells, ours=arm == "ella"))
    return [
        Table(f"Published overall accuracy, {family} orders", ["T5-large, as published", "this run"], rows),
        Text(
            "The published numbers are of another model, T5-large, and of another data size, and are means over three "
            "orders; they are taken from the papers. Only the order of the methods can be compared."
        ),
    ]
