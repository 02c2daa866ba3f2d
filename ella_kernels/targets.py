"""What the in-place form may add to: every element of a target is one number, in memory that nothing else here uses.

Looked at before anything is added, since what is half done cannot be told from what is not begun.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Room", "check_apart", "check_writable"]


def check_writable(name: str, target: Tensor) -> None:
    """Refuse a target that cannot be added to, whatever the others are.

    Raises:
        ValueError: elements that share memory, a lazily negated view, or an inference tensor outside inference mode.
    """
    if torch.compiler.is_compiling():
        # Addresses are sizes to be found out, and torch writes what views stand for.
        repeats_itself = any(n > 1 and step == 0 for n, step in zip(target.shape, target.stride(), strict=True))
    else:
        repeats_itself = _repeats_itself(target)
        if target.is_neg():
            raise ValueError(f"{name} must not be a negated view; pass {name}.resolve_neg()")
        if target.is_inference() and not torch.is_inference_mode_enabled():
            raise ValueError(f"{name} must not be an inference tensor outside inference mode; pass {name}.clone()")
    if repeats_itself:
        raise ValueError(
            f"{name} must have an element of memory for each of its own, found strides {target.stride()} for shape "
            f"{tuple(target.shape)}; pass {name}.contiguous()"
        )


def _repeats_itself(matrix: Tensor) -> bool:
    (rows, cols), (per_row, per_col) = matrix.shape, matrix.stride()
    if rows <= 1 or cols <= 1:
        return rows * cols > 1 and (per_col if rows == 1 else per_row) == 0
    # i·per_row = j·per_col has its smallest solution there.
    step = gcd(per_row, per_col)
    return step == 0 or (per_col // step < rows and per_row // step < cols)


class _Span(NamedTuple):
    """A tensor's bytes: where they start and stop, how far apart its elements are; ``role`` of a target or None."""

    start: int
    stop: int
    name: str
    steps: tuple[tuple[int, int], ...]
    itemsize: int
    role: tuple | None


def check_apart(
    targets: Sequence[tuple[str, Sequence[Tensor], Sequence[Tensor]]],
    operands: Sequence[tuple[str, Sequence[Tensor | None]]],
) -> None:
    """Refuse targets that share memory with each other or with what is read.

    A target may be listed again for the same factor, which then has its gradients added up.

    Args:
        targets: name of a list, the list, and the factors that it has the gradients of.
        operands: name of a list, and the list; absent ones are None.

    Raises:
        ValueError: naming a target and what it shares memory with.
    """
    spans: dict[tuple, _Span] = {}
    for name, tensors, factors in targets:
        for i, (tensor, factor) in enumerate(zip(tensors, factors, strict=True)):
            _add(spans, f"{name}[{i}]", tensor, (name, factor.data_ptr(), factor.shape, factor.stride()))
    for name, read in operands:
        for i, operand in enumerate(read):
            _add(spans, f"{name}[{i}]", operand, None)
    cluster: list[_Span] = []
    stop = 0
    for span in [*sorted(spans.values()), None]:
        if span is None or span.start >= stop:
            _check_cluster(cluster)
            cluster, stop = [], 0
        if span is not None:
            cluster.append(span)
            stop = max(stop, span.stop)


class Room(NamedTuple):
    """Where targets lie beside what is read, to tell whether they may lie elsewhere in the same pattern.

    Attributes:
        low, high: bytes of all targets, from the address of the first one.
        starts, stops: bytes of what is read, sorted.
    """

    low: int
    high: int
    starts: list[int]
    stops: list[int]

    @classmethod
    def of(cls, targets: Sequence[Tensor], operands: Sequence[Tensor]) -> Room:
        written: dict[tuple, _Span] = {}
        read: dict[tuple, _Span] = {}
        for spans, tensors in ((written, targets), (read, operands)):
            for tensor in tensors:
                _add(spans, "", tensor, None)
        first = targets[0].data_ptr()
        return cls(
            min((span.start - first for span in written.values()), default=0),
            max((span.stop - first for span in written.values()), default=0),
            sorted(span.start for span in read.values()),
            sorted(span.stop for span in read.values()),
        )

    def is_clear(self, first: int) -> bool:
        """Whether nothing that is read lies between the targets when the first one is at the address ``first``."""
        return bisect_left(self.starts, first + self.high) == bisect_right(self.stops, first + self.low)


def _add(spans: dict[tuple, _Span], name: str, tensor: Tensor | None, role: tuple | None) -> None:
    if tensor is None or tensor.numel() == 0 or tensor.data_ptr() == 0:
        return
    start, itemsize = tensor.data_ptr(), tensor.dtype.itemsize
    steps = tuple((n, itemsize * step) for n, step in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)
    stop = start + sum((n - 1) * step for n, step in steps) + itemsize
    spans.setdefault((start, steps, itemsize, role), _Span(start, stop, name, steps, itemsize, role))


def _check_cluster(cluster: list[_Span]) -> None:
    """Spans that overlap may still be views between each other's elements, as columns of one matrix are."""
    if len(cluster) < 2 or all(span.role is None for span in cluster):
        return
    # Elements are multiples of this apart: tensors of one dtype that are not are never at the same place.
    grain = gcd(*(step for span in cluster for _, step in span.steps))
    grain = grain if grain and len({span.itemsize for span in cluster}) == 1 else 1
    groups: dict[int, list[_Span]] = {}
    for span in cluster:
        groups.setdefault(span.start % grain, []).append(span)
    for group in groups.values():
        written = [span for span in group if span.role is not None]
        read = [span for span in group if span.role is None]
        if not written or len(group) < 2:
            continue
        places = torch.cat([_places(span) for span in written])
        is_apart = places.unique().numel() == places.numel()
        if is_apart and not (read and torch.isin(places, torch.cat([_places(span) for span in read])).any()):
            continue
        for i, span in enumerate(written):
            for other in (*written[i + 1 :], *read):
                if torch.isin(_places(span), _places(other)).any():
                    raise ValueError(f"{span.name} must have memory of its own, found some that {other.name} has too")


def _places(span: _Span) -> Tensor:
    """Addresses of all bytes, in pairs: no dtype here has fewer than two."""
    places = torch.tensor([span.start], device="cpu")
    for n, step in (*span.steps, (span.itemsize // 2, 2)):
        places = (places[:, None] + step * torch.arange(n, device="cpu")).flatten()
    return places // 2
