"""The past: finished tasks' aggregated update of every layer, ``W_past = L·R``, and what truncation dropped from it.

:class:`Past` owns it for a whole model. Its factors are the parameters of the knowledge adapter (``lora_B`` holds
``L``, ``lora_A`` holds ``R``), so that PEFT saves and moves them; with ``keep_past="external"`` they are held here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraConfig
from torch import Tensor

from ella_kernels import LowRank
from ella_kernels.lowrank import split_evenly, svd_factors

from .checkpoint import Importance, PastState, StoredLayer, save_past
from .distributed import is_spread, shape_of, whole
from .lora import AdaptedLayer, split_parts
from .merging import MergedBase
from .tensorfile import read_tensors

__all__ = [
    "FoldReport", "Past", "add_energies", "described", "energy_of", "fold_factors", "fold_layer", "squared_norm",
]  # fmt: skip


@dataclass(frozen=True)
class FoldReport:
    """What folding one task did.

    Attributes:
        task: its name.
        ranks: components stored per layer afterwards.
        relative_error: ``‖dropped‖_F / ‖W_past‖_F`` per layer; 0 while the past is exact.
        merge_error: ``‖rounded‖_F / ‖W_base + W_past‖_F`` per layer, the relative error of the layer's output for white
            inputs, where the past was merged into base weights; empty elsewhere.
    """

    task: str
    ranks: dict[str, int]
    relative_error: dict[str, float]
    merge_error: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, task: str, stored: Mapping[str, StoredLayer]) -> FoldReport:
        """The report on layers whose last fold was ``task``."""
        return cls(
            task,
            {name: layer.rank for name, layer in stored.items()},
            {name: layer.relative_error[-1] for name, layer in stored.items()},
        )

    @property
    def max_relative_error(self) -> float:
        return max(self.relative_error.values(), default=0.0)

    @property
    def max_merge_error(self) -> float:
        return max(self.merge_error.values(), default=0.0)


def fold_factors(
    past: LowRank | None, lora_A: Tensor, lora_B: Tensor, scaling: float, max_rank: int
) -> tuple[LowRank, float]:
    """``W_past + scaling · B A`` as even SVD factors of at most ``max_rank`` components.

    Args:
        past: the past so far, or None.
        lora_A: ``(r, in)``. lora_B: ``(out, r)``.
        max_rank: cap; beyond it the smallest components are dropped and their energies added to those stored
            (the sum over folds leaves out the cross terms between what was dropped at different times).

    Returns:
        The new past in float32, columns ordered by singular value, and the relative Frobenius error of this fold.
    """
    left, right = scaling * lora_B.detach().double(), lora_A.detach().double()
    if past is not None:
        left = torch.cat([past.left.double(), left], 1)
        right = torch.cat([past.right.double(), right], 0)
    u, s, vh = svd_factors(left, right)
    total = s.square().sum().item()
    error = math.sqrt(s[max_rank:].square().sum().item() / total) if total > 0 else 0.0
    folded = split_evenly(u, s, vh, max_rank, torch.float32)
    return (folded if past is None else add_energies(folded, past)), error


def add_energies(past: LowRank, dropped: LowRank) -> LowRank:
    """``past`` with the energies of ``dropped`` added to its own, if there are any."""
    if dropped.row_energy is None or dropped.col_energy is None:
        return past
    rows, cols = dropped.row_energy, dropped.col_energy
    if past.row_energy is not None and past.col_energy is not None:
        rows, cols = rows + past.row_energy, cols + past.col_energy
    return past._replace(row_energy=rows, col_energy=cols)


def squared_norm(past: LowRank) -> float:
    """``‖L·R‖_F²`` in float64, without what was dropped."""
    left, right = past.left.detach().double(), past.right.detach().double()
    return ((left.mT @ left) * (right @ right.mT)).sum().item()


def energy_of(stored: Mapping[str, StoredLayer]) -> float:
    """``Σ_layers ‖L·R‖_F²`` of a whole past, without what was dropped."""
    return math.fsum(squared_norm(part) for layer in stored.values() for part in layer.parts)


def fold_layer(
    before: StoredLayer | None,
    parts: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    bias: Tensor | None,
    max_rank: int,
    importance: Importance | None = None,
) -> StoredLayer:
    """:func:`fold_factors` of every part ``(A, B)`` of a layer, and the sum of the scaled ``lora_B`` biases.

    ``importance`` is the task's. Without it the layer has none any more: that of some of its tasks would mislead.
    """
    pasts = [None] * len(parts) if before is None else before.parts
    folded = [fold_factors(past, a, b, scaling, max_rank) for past, (a, b) in zip(pasts, parts, strict=True)]
    total = None if before is None else before.bias
    if bias is not None:
        scaled = scaling * bias.detach().float()
        total = scaled if total is None else total + scaled
    errors = [] if before is None else before.relative_error
    made = [part for part, _ in folded]
    if any(part.row_energy is not None for part in made):  # one expert's past may be exact where another's is not
        made = [_with_energies(part) for part in made]
    if importance is not None and before is not None:
        earlier = before.importance
        importance = None if earlier is None else importance.plus(earlier.to(importance.rows.device))
    return StoredLayer(made, total, [*errors, max(error for _, error in folded)], importance)


def described(config: LoraConfig) -> dict[str, Any]:
    """A LoRA configuration as plain json."""
    return {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}


def _with_energies(part: LowRank) -> LowRank:
    if part.row_energy is not None:
        return part
    return part._replace(
        row_energy=part.left.new_zeros(len(part.left)), col_energy=part.right.new_zeros(part.right.shape[1])
    )


@dataclass
class Past:
    """Finished tasks of a model, shared by every regularizer on it.

    Attributes:
        adapter: the PEFT adapter that holds the factors.
        config: ``EllaConfig.to_dict()`` of the regularizer that folded last.
        tasks: names of the finished tasks, in order.
    """

    adapter: str
    config: dict[str, Any]
    tasks: list[str] = field(default_factory=list)
    # By layer name: per part the row and column energies of what was dropped, on the CPU; the error of every fold; and
    # with keep_past="external" all of the layer. A layer without dropped components has no energies.
    _energies: dict[str, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    _errors: dict[str, list[float]] = field(default_factory=dict)
    _importance: dict[str, Importance] = field(default_factory=dict)
    _held: dict[str, StoredLayer] = field(default_factory=dict)
    # What a file beside a saved adapter says of it.
    _shapes: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    _peft: dict[str, Any] = field(default_factory=dict)
    # keep_past="merge": the base weights without the past, and the checksums that tell a saved state's base.
    base: MergedBase | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self._errors)

    @property
    def is_external(self) -> bool:
        return self.config["keep_past"] == "external"

    def factors(self, layer: AdaptedLayer) -> list[tuple[Tensor, Tensor]] | None:
        """``(R (k, in), L (out, k))`` per part, views of what is stored; None where the layer has no past.

        Whole on every rank: a collective where the adapter is spread over ranks.
        """
        if self.is_external:
            held = self._held.get(layer.name)
            return None if held is None else [(part.right, part.left) for part in held.parts]
        if layer.name not in self._errors or not layer.has(self.adapter):
            return None
        return layer.factors(*layer.whole(self.adapter))

    def stored_in(self, layer: AdaptedLayer) -> list[Tensor]:
        """The tensors that hold a layer's factors, as they lie: this rank's parts where they are spread over ranks."""
        if self.is_external:
            held = self._held.get(layer.name)
            return [] if held is None else [t for part in held.parts for t in (part.right, part.left)]
        if layer.name not in self._errors or not layer.has(self.adapter):
            return []
        return list(layer.parameters(self.adapter))

    def rank(self, layer: AdaptedLayer) -> int:
        """Components stored of each part of a layer; 0 without a past."""
        stored = self.stored_in(layer)
        if self.is_external or not stored:
            return stored[0].shape[0] if stored else 0
        return shape_of(stored[0])[0] // layer.n_parts

    def parts(self, layer: AdaptedLayer) -> list[LowRank] | None:
        """One :class:`~ella_kernels.LowRank` per part, on the device of the layer's factors; None without a past."""
        factors = self.factors(layer)
        if factors is None:
            return None
        device = layer.parameters()[0].device
        found = [LowRank(left.to(device), right.to(device)) for right, left in factors]
        energies = self._energies.get(layer.name)
        if energies is None:
            return found
        return [
            part._replace(row_energy=rows.to(device), col_energy=cols.to(device))
            for part, (rows, cols) in zip(found, energies, strict=True)
        ]

    def stored(self, layer: AdaptedLayer) -> StoredLayer | None:
        """All that is known of a layer; None before its first fold."""
        parts = self.parts(layer)
        if parts is None:
            return None
        bias = self._held[layer.name].bias if self.is_external else layer.bias(self.adapter)
        importance = self._importance.get(layer.name)
        return StoredLayer(parts, None if bias is None else whole(bias), self._errors[layer.name], importance)

    def importance(self, layer: AdaptedLayer) -> Importance:
        """That of a layer's rows and columns to the finished tasks. Raises ValueError where one was folded without."""
        held = self._importance.get(layer.name)
        if held is None:
            raise ValueError(
                f"the finished tasks {self.tasks} were folded without the importance that penalty='importance' is of "
                "(measure_importance): use penalty='hadamard', which needs the past alone"
            )
        return held

    def adopt(self, layers: Iterable[AdaptedLayer], stored: Mapping[str, StoredLayer], trained: LoraConfig) -> None:
        """Take over ``stored`` in place of what was; the factors only where no adapter of the model holds them.

        ``trained`` is the configuration of the adapter in training.
        """
        layers = list(layers)
        self._errors = {name: list(layer.relative_error) for name, layer in stored.items()}
        self._energies = {
            name: [
                (part.row_energy.cpu(), part.col_energy.cpu())
                for part in layer.parts
                if part.row_energy is not None and part.col_energy is not None
            ]
            for name, layer in stored.items()
            if layer.parts[0].row_energy is not None
        }
        self._importance = {name: layer.importance.to("cpu") for name, layer in stored.items() if layer.importance}
        self._held = dict(stored) if self.is_external else {}
        self._shapes = {layer.name: (layer.n_parts, *layer.shape) for layer in layers}
        self._peft = {
            "config": described(trained),
            "layers": {layer.name: {"keys": layer.keys(), "tails": layer.tails} for layer in layers},
        }

    def state(self, layers: Iterable[AdaptedLayer]) -> PastState:
        """All of it as :func:`~ella.checkpoint.save_past` writes it."""
        found = {}
        for layer in layers:
            stored = self.stored(layer)
            if stored is not None:  # whole factors of a layer that is spread over ranks leave the device
                found[layer.name] = stored.to("cpu") if any(map(is_spread, self.stored_in(layer))) else stored
        shapes = {layer.name: (layer.n_parts, *layer.shape) for layer in layers}
        return PastState(self.config, list(self.tasks), found, shapes, self._extra())

    def save_beside(self, folder: str | Path) -> None:
        """Write the state beside an adapter that PEFT has just saved in ``folder``."""
        layers = self._held if self.is_external else self._read(Path(folder))
        save_past(folder, PastState(self.config, list(self.tasks), layers, self._shapes, self._extra()))

    def _extra(self) -> dict[str, Any]:
        return {**self.extra, **({"peft": self._peft} if self._peft else {})}

    def _read(self, folder: Path) -> dict[str, StoredLayer]:
        path = folder / "adapter_model.safetensors"
        if not path.is_file():
            raise ValueError(
                f"{folder} has no adapter_model.safetensors: ELLA's state goes with it and never into pickled weights; "
                "save with safe_serialization=True"
            )
        (tensors, _), found = read_tensors(path), {}
        for name, layer in self._peft["layers"].items():
            key_a, key_b = layer["keys"]
            parts = split_parts(tensors[key_a], tensors[key_b], self._shapes[name][0])
            energies = self._energies.get(name, [(None, None)] * len(parts))
            bias = tensors.get(key_b.removesuffix("weight") + "bias")
            made = [LowRank(left, right, *pair) for (right, left), pair in zip(parts, energies, strict=True)]
            found[name] = StoredLayer(made, bias, self._errors[name], self._importance.get(name))
        return found
