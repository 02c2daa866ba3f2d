"""The penalty of an adapter that FSDP2 spreads over ranks: every rank computes its own rows of ``ΔW``.

A step costs two collectives, whatever the number of layers: one all-gather of ``lora_A`` (and of the past's ``right``
where that is too large to be kept whole), one reduce-scatter of its gradient with the value in it (for the spectral
penalty, one all-reduce of ``LᵀB``). The gradient of ``lora_B`` is complete where it is computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import ella_kernels as ek

from .distributed import Rows, refuse_tensor_parallel
from .lora import AdaptedLayer
from .past import Past
from .terms import KEPT, Size, Term, Terms

__all__ = ["ShardedPenalty"]

Compute = Callable[[list[Tensor], list[Tensor], list[ek.LowRank | None], list[float]], Tensor]


class _LocalTerm(NamedTuple):
    """A term of which ``past`` holds this rank's rows of ``left`` and energies, and of ``right`` unless ``is_kept``.

    ``rank`` is that of the past.
    """

    layer: int
    part: int
    past: ek.LowRank | None
    rank: int
    is_kept: bool
    scaling: float
    size: Size = Size()


class ShardedPenalty:
    """The terms of ``layers`` on this rank, made anew whenever the past or a scaling has changed."""

    def __init__(self, layers: Sequence[AdaptedLayer], terms: Terms) -> None:
        self.layers, self._whole_terms = layers, terms
        self._rows: tuple[Sequence[Tensor], Rows] | None = None
        self._terms: tuple[tuple, list[_LocalTerm], Size] | None = None

    def size(self, past: Past) -> Size:
        """That of all rows, where the strength depends on it."""
        return self._current(past)[2]

    @torch.no_grad()
    def values(self, past: Past, compute: Compute) -> tuple[list[int], Tensor]:
        """Each term's layer, and ``(n_terms,)`` values by ``compute(As, Bs, pasts, scalings)``, on every rank."""
        rows, terms, _ = self._current(past)
        a, b, pasts = self._operands(rows, terms)
        scalings = [term.scaling for term in terms]
        if self._is_spectral:
            found = compute(a, *_projected(rows, b, pasts), scalings)
        else:
            found = rows.sum(compute(a, b, pasts, scalings))
        return [term.layer for term in terms], found

    @torch.no_grad()
    def add_gradient_(
        self, past: Past, add_: Callable[..., Tensor], weight_of: Callable[[Size], float], scale: float | Tensor
    ) -> Tensor:
        """Add ``scale · w · ∂ΣP`` to ``.grad``, made where it is missing; returns ``w · ΣP``, 0-dim.

        ``w`` is ``weight_of`` the size of all rows.
        """
        rows, terms, size = self._current(past)
        if all(term.past is None for term in terms):
            return torch.zeros((), device=rows.device)
        own_weight = weight_of(size)
        weight = own_weight * scale
        a, b, pasts = self._operands(rows, terms)
        parameters = [layer.parameters() for layer in self.layers]
        of_a = [rows.padded(p.shape[0], math.prod(p.shape[1:]), _wide(p)) for p, _ in parameters]
        of_b = [self._target(rows, p) for _, p in parameters]
        into = [
            layer.factors(ga[: p.shape[0]].view(p.shape), gb)
            for layer, ga, gb, (p, _) in zip(self.layers, of_a, of_b, parameters, strict=True)
        ]
        grads = [into[term.layer][term.part] for term in terms]
        grads_a, grads_b, scalings = [g for g, _ in grads], [g for _, g in grads], [term.scaling for term in terms]
        if self._is_spectral:
            # Not a sum over rows: what every rank needs of all rows is LᵀB, and with it the gradient of A is whole.
            cores, small = _projected(rows, b, pasts)
            of_cores = [torch.zeros_like(core) for core in cores]
            total = add_(a, cores, small, scalings, grads_a, of_cores, weight=weight).sum()
            for grad, core, whole in zip(grads_b, of_cores, pasts, strict=True):
                if whole is not None:
                    grad.add_(whole.left.to(core.dtype) @ core)
            summed = [ga[rows.of(p.shape[0])] for ga, (p, _) in zip(of_a, parameters, strict=True)]
        else:
            values = add_(a, b, pasts, scalings, grads_a, grads_b, weight=weight)
            summed, total = rows.reduce(of_a, values.sum())
        for (p, q), ga, gb in zip(parameters, summed, of_b, strict=True):
            if p.requires_grad:
                target = _local_grad(rows, p)
                target.add_(ga[: target.shape[0]].view(target.shape))
            if q.requires_grad and gb is not (target := _local_grad(rows, q)):
                target.add_(gb.to(target.device))
        return total * own_weight

    @property
    def _is_spectral(self) -> bool:
        return self._whole_terms.config.penalty == "spectral"

    def _target(self, rows: Rows, parameter: Tensor) -> Tensor:
        """Where the gradient of this rank's rows is summed: in ``.grad`` itself, if the kernels can reach it."""
        if parameter.requires_grad:
            grad = _local_grad(rows, parameter)
            if grad.device == rows.device and grad.is_contiguous():
                return grad
        local = parameter.to_local()  # type: ignore[attr-defined]
        return torch.zeros(local.shape, dtype=local.dtype, device=rows.device)

    def _operands(self, rows: Rows, terms: Sequence[_LocalTerm]) -> tuple[list, list, list]:
        parameters = [layer.parameters() for layer in self.layers]
        local_a = [p.to_local().flatten(1) for p, _ in parameters]  # type: ignore[attr-defined]
        pasts = [term.past for term in terms]
        moved = {i: past.right for i, past in enumerate(pasts) if past is not None and not terms[i].is_kept}
        parts = [*local_a, *moved.values()]
        counts = [*(p.shape[0] for p, _ in parameters), *(terms[i].rank for i in moved)]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
        gathered = rows.gather(parts, counts, dtype)
        for i, right in zip(moved, gathered[len(parameters) :], strict=True):
            pasts[i] = pasts[i]._replace(right=right)  # type: ignore[union-attr]
        factors = [
            layer.factors(a.view(p.shape), q.to_local().to(rows.device))  # type: ignore[attr-defined]
            for layer, a, (p, q) in zip(self.layers, gathered, parameters, strict=False)
        ]
        pairs = [factors[term.layer][term.part] for term in terms]
        return [a for a, _ in pairs], [b for _, b in pairs], pasts

    def _current(self, past: Past) -> tuple[Rows, list[_LocalTerm], Size]:
        parameters = [p for layer in self.layers for p in layer.parameters()]
        if self._rows is not None and all(p is q for p, q in zip(parameters, self._rows[0], strict=True)):
            rows = self._rows[1]
        else:
            rows = Rows([named for layer in self.layers for named in layer.named_parameters()])
            refuse_tensor_parallel(self.layers, rows)
            self._rows, self._terms = (parameters, rows), None
        stored = [p for layer in self.layers for p in past.stored_in(layer)]
        local = [p.to_local() if hasattr(p, "to_local") else p for p in stored]
        key = (
            tuple(layer.scaling() for layer in self.layers),
            *((t.data_ptr(), t._version, t.shape) for t in local),
            *map(id, stored),
        )
        if self._terms is None or self._terms[0] != key:
            terms = self._localised(rows, past)
            self._terms = key, terms, Size.of(term.size for term in terms)
        return rows, *self._terms[1:]

    def _localised(self, rows: Rows, past: Past) -> list[_LocalTerm]:
        """This rank's part of all terms; one layer at a time is whole, but for ``right`` factors that are kept."""
        cap = self._whole_terms.config.penalty_rank
        most: float = math.inf if cap is None else cap
        size = sum(4 * layer.n_parts * layer.shape[1] * min(past.rank(layer), most) for layer in self.layers)
        found = []
        for index, layer in enumerate(self.layers):
            for term in self._whole_terms.of_layer(past, index):
                found.append(_local(rows, term, layer.shape[0], size <= KEPT))
        return found


def _local(rows: Rows, term: Term, n_rows: int, is_kept: bool) -> _LocalTerm:
    if term.past is None:
        return _LocalTerm(term.layer, term.part, None, 0, True, term.scaling)
    left, right, row_energy, col_energy = (None if t is None else t.to(rows.device) for t in term.past)
    assert left is not None and right is not None
    own, rank = rows.of(n_rows), right.shape[0]
    if row_energy is not None and col_energy is not None:
        # The kernels divide by the sum of the row energies that they see: the others' share is taken here.
        share = row_energy[own].double().sum() / row_energy.double().sum().clamp_min(torch.finfo(torch.float64).tiny)
        row_energy, col_energy = row_energy[own].clone(), (col_energy.double() * share).to(col_energy.dtype)
    # Copies: the whole factors may go.
    right = right.clone() if is_kept else right[rows.of(rank)].clone()
    past = ek.LowRank(left[own].clone(), right, row_energy, col_energy)
    return _LocalTerm(term.layer, term.part, past, rank, is_kept, term.scaling, term.size)


def _projected(
    rows: Rows, b: Sequence[Tensor], pasts: Sequence[ek.LowRank | None]
) -> tuple[list[Tensor], list[ek.LowRank | None]]:
    """The spectral penalty's ``LᵀB (k, r)`` of all rows in place of ``B``, with pasts to match, in one all-reduce.

    ``‖(LᵀB)(A Rᵀ)‖`` is that of a ``B`` which is ``LᵀB`` and an ``L`` which is the identity. Summed in float64: nearly
    orthogonal factors cancel there.
    """
    own = [q if past is None else past.left.double().mT @ q.double() for q, past in zip(b, pasts, strict=True)]
    moved = [core.flatten() for core, past in zip(own, pasts, strict=True) if past is not None]
    sums = iter(rows.sum(torch.cat(moved)).split([core.numel() for core in moved])) if moved else iter(())
    cores: list[Tensor] = []
    small: list[ek.LowRank | None] = []
    for q, core, past in zip(b, own, pasts, strict=True):
        if past is None:
            cores.append(q)
            small.append(None)
            continue
        cores.append(next(sums).view(core.shape).to(_wide(q)))
        small.append(ek.LowRank(torch.eye(core.shape[0], dtype=past.left.dtype, device=q.device), past.right))
    return cores, small


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.float64 if parameter.dtype == torch.float64 else torch.float32


def _local_grad(rows: Rows, parameter: Tensor) -> Tensor:
    """This rank's part of ``.grad``, made where it is missing."""
    if parameter.grad is None:
        local = parameter.to_local()  # type: ignore[attr-defined]
        parameter.grad = rows.like(parameter, torch.zeros(local.shape, dtype=local.dtype, device=local.device))
    return parameter.grad.to_local()  # type: ignore[attr-defined]
