"""What a step's penalty is computed from: every layer's past with the conventions of the config in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import attrgetter
from typing import NamedTuple

from torch import Tensor

import ella_kernels as ek

from .config import EllaConfig
from .distributed import any_partitioned
from .linear_layers import LinearLayers
from .lora import AdaptedLayer
from .past import Past, add_energies

__all__ = ["KEPT", "Operands", "Term", "Terms"]

# Bytes of what a step reads of the past, in all layers, up to which a rank that holds parts keeps it whole.
KEPT = 2**28


class Term(NamedTuple):
    """One ``P``: a part of a layer against its past, ``scaling`` with every convention of the config in it.

    ``energy`` is its share of ``‖W_past‖_F²``, 0 where no convention asks for that.
    """

    layer: int
    part: int
    past: ek.LowRank | None
    scaling: float
    energy: float = 0.0


class Operands(NamedTuple):
    """All terms as long as the stored past is where and what ``key`` says, and what the kernels take of them as lists.

    ``stored`` are the factors it says it of, whose memory is held so that no other past can come to lie there;
    ``energy`` is ``Σ ‖W_past‖_F²``, where a convention asks for it.
    """

    key: tuple
    stored: list[Tensor]
    terms: list[Term]
    pasts: list[ek.LowRank | None]
    scalings: list[float]
    energy: float


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
        energy = math.fsum(term.energy for term in terms)
        return Operands(key, stored, terms, [t.past for t in terms], [t.scaling for t in terms], energy)

    def of_layer(self, past: Past, index: int) -> list[Term]:
        """The terms of one layer, from whole factors."""
        layer = self.layers[index]
        scaling = layer.scaling() if self.config.include_scaling else 1.0
        pasts = past.parts(layer)
        if pasts is None:
            return [Term(index, part, None, scaling) for part in range(layer.n_parts)]
        wants_energy = self.config.normalize is not None or self.config.ella_lambda == "auto"
        energies = [_squared_norm(past) if wants_energy else 0.0 for past in pasts]
        if self.config.normalize == "rms":
            mean_square = sum(energies) / (layer.shape[0] * layer.shape[1] * len(pasts))
            if mean_square == 0:
                return [Term(index, part, None, scaling) for part in range(len(pasts))]
            scaling /= math.sqrt(mean_square)
        if self.config.penalty_rank is not None:
            pasts = [_keep(past, self.config.penalty_rank) for past in pasts]
        if not self.config.penalty_energies:
            pasts = [ek.LowRank(past.left, past.right) for past in pasts]
        return [Term(index, part, past, scaling, energies[part]) for part, past in enumerate(pasts)]


def _squared_norm(past: ek.LowRank) -> float:
    """``‖W_past‖_F²`` with what was dropped, in float64."""
    left, right = past.left.double(), past.right.double()
    total = ((left.mT @ left) * (right @ right.mT)).sum().item()
    return total if past.row_energy is None else total + past.row_energy.double().sum().item()


def _keep(past: ek.LowRank, rank: int) -> ek.LowRank:
    """The leading ``rank`` components, the rest and what was dropped before as energies."""
    kept = ek.truncate(past.left, past.right, rank)
    return add_energies(kept, past)
