"""What a step's penalty is computed from: every layer's past with the conventions of the config in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

import ella_kernels as ek

from .config import EllaConfig
from .distributed import any_partitioned
from .linear_layers import LinearLayers
from .lora import AdaptedLayer
from .past import Past, add_energies, squared_norm

__all__ = ["KEPT", "Operands", "Size", "Term", "Terms"]

# Bytes of what a step reads of the past, in all layers, up to which a rank that holds parts keeps it whole.
KEPT = 2**28


class Size(NamedTuple):
    """How large a past is: ``energy`` is ``‖W_past‖_F²``, ``by_chance`` the mean of ``P`` over random updates.

    Their entries are independent with variance 1. For the Hadamard penalty the two are one; for the spectral
    ``by_chance`` is ``‖L‖_F²·‖R‖_F²``, the square of the nuclear norm.
    """

    energy: float = 0.0
    by_chance: float = 0.0

    @classmethod
    def of(cls, sizes: Iterable[Size]) -> Size:
        """That of several layers together."""
        columns = list(zip(*sizes, strict=True))
        return cls(*map(math.fsum, columns)) if columns else cls()


class Term(NamedTuple):
    """One ``P``: a part of a layer against its past, ``scaling`` with every convention of the config in it.

    ``size`` is that of its past, 0 where no convention asks for it.
    """

    layer: int
    part: int
    past: ek.LowRank | None
    scaling: float
    size: Size = Size()


class Operands(NamedTuple):
    """All terms as long as the stored past is where and what ``key`` says, and what the kernels take of them as lists.

    ``stored`` are the factors it says it of, whose memory is held so that no other past can come to lie there;
    ``size`` is that of all pasts, where a convention asks for it.
    """

    key: tuple
    stored: list[Tensor]
    terms: list[Term]
    pasts: list[ek.LowRank | None]
    scalings: list[float]
    size: Size


class Terms:
    """The terms of ``layers``, made at a fold and whenever a stored factor was moved or written, or a scaling set."""

    def __init__(self, config: EllaConfig, layers: Sequence[AdaptedLayer], linear: LinearLayers) -> None:
        self.config, self.layers, self._linear = config, layers, linear
        self._made: Operands | None = None

    def current(self, past: Past) -> Operands:
        """Those of the model as it is now."""
        is_held = past and not past.is_external
        factors: Sequence[Tensor] | None = self._linear.parameters(past.adapter) if is_held else None
        if factors is None:
            parts = [past.factors(layer) or () for layer in self.layers]
            factors = [factor for part in parts for pair in part for factor in pair]
        if any_partitioned(factors):
            return self._of_partitioned(past, factors)
        key = (
            self._linear.scalings(self.layers[0].adapter) or tuple(layer.scaling() for layer in self.layers),
            tuple(map(Tensor.data_ptr, factors)),
            tuple(map(attrgetter("_version"), factors)),
            tuple(map(attrgetter("device"), factors)),
            tuple(map(Tensor.size, factors)),
            tuple(map(Tensor.stride, factors)),
        )
        if self._made is None or self._made.key != key:
            self._made = self._make(past, key, [factor.detach() for factor in factors])
        return self._made

    def _of_partitioned(self, past: Past, factors: Sequence[Tensor]) -> Operands:
        """Where ZeRO-3 moves factors about: theirs are copies, kept for the next step unless they are large."""
        key = (tuple(layer.scaling() for layer in self.layers), tuple(past.tasks), *map(id, factors))
        if self._made is None or self._made.key != key:
            made = self._make(past, key, [*factors])
            size = sum(4 * (t.past.left.numel() + t.past.right.numel()) for t in made.terms if t.past is not None)
            if size > KEPT:
                return made
            self._made = made
        return self._made

    def _make(self, past: Past, key: tuple, stored: list[Tensor]) -> Operands:
        terms = [term for i in range(len(self.layers)) for term in self.of_layer(past, i)]
        size = Size.of(term.size for term in terms)
        return Operands(key, stored, terms, [t.past for t in terms], [t.scaling for t in terms], size)

    def of_layer(self, past: Past, index: int) -> list[Term]:
        """The terms of one layer, from whole factors."""
        layer = self.layers[index]
        scaling = layer.scaling() if self.config.include_scaling else 1.0
        pasts = _important(past, layer) if self.config.penalty == "importance" else past.parts(layer)
        if pasts is None:
            return [Term(index, part, None, scaling) for part in range(layer.n_parts)]
        wants_size = self.config.normalize is not None or self.config.ella_lambda == "auto"
        sizes = [_size(past, self.config.penalty) if wants_size else Size() for past in pasts]
        if self.config.normalize == "rms":
            mean_square = sum(size.energy for size in sizes) / (layer.shape[0] * layer.shape[1] * len(pasts))
            if mean_square == 0:
                return [Term(index, part, None, scaling) for part in range(len(pasts))]
            scaling /= math.sqrt(mean_square)
        if self.config.penalty_rank is not None:
            pasts = [_keep(past, self.config.penalty_rank) for past in pasts]
        if not self.config.penalty_energies:
            pasts = [ek.LowRank(past.left, past.right) for past in pasts]
        return [Term(index, part, past, scaling, sizes[part]) for part, past in enumerate(pasts)]


def _important(past: Past, layer: AdaptedLayer) -> list[ek.LowRank] | None:
    """``F ≈ ρκᵀ/τ`` in place of ``W ⊙ W``: a past of no components, its energies the importance."""
    if not past:
        return None
    rows, cols = (part.to(layer.parameters()[0].device) for part in past.importance(layer))
    return [ek.LowRank(rows.new_zeros(len(rows), 0), cols.new_zeros(0, len(cols)), rows, cols)]


def _size(past: ek.LowRank, penalty: str) -> Size:
    """With what was dropped, where the penalty sees it, in float64."""
    energy = squared_norm(past)
    if past.row_energy is not None:
        energy += past.row_energy.double().sum().item()
    if penalty == "spectral":
        left, right = past.left.double(), past.right.double()
        return Size(energy, (left.square().sum() * right.square().sum()).item())
    return Size(energy, energy)


def _keep(past: ek.LowRank, rank: int) -> ek.LowRank:
    """The leading ``rank`` components, the rest and what was dropped before as energies."""
    kept = ek.truncate(past.left, past.right, rank)
    return add_energies(kept, past)
