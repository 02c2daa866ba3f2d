"""The settings of the penalty and of the past it is measured against."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

__all__ = ["AUTO_LAMBDA", "MAX_LAMBDA", "EllaConfig"]

#: Of ``ella_lambda="auto"``: what an update adds to the loss that is as large as all earlier ones together and lies
#: where they lie by chance, in units of the task loss.
AUTO_LAMBDA = 4.0
#: At most, with a gradient scaler's scale on top: values and gradients are float32.
MAX_LAMBDA = 1e30

_CHOICES = {
    "penalty": ("hadamard", "spectral", "importance"),
    "reduction": ("sum", "mean"),
    "normalize": (None, "rms"),
    "keep_past": ("adapter", "merge", "external"),
}


@dataclass(frozen=True)
class EllaConfig:
    """Settings of an :class:`~ella.EllaRegularizer`.

    Attributes:
        ella_lambda: strength λ ≥ 0 of ``task loss + λ · reduce(P)``. What a number means depends on ``reduction``,
            ``include_scaling`` and ``normalize``: published strengths differ in all three. "auto" sets it anew after
            every task, to :data:`AUTO_LAMBDA` ``· N / E²``, ``E = Σ_layers ‖W_past‖_F²`` and ``N`` the number of its
            coordinates: a strength that does not depend on rank, scaling, learning rate and width. With the spectral
            penalty to :data:`AUTO_LAMBDA` ``· N / (E · Σ_layers ‖W_past‖_*²)``, the nuclear norm: as strong by chance.
            Never above :data:`MAX_LAMBDA`.
        penalty: "hadamard" ``‖ΔW ⊙ W_past‖_F²`` (Das Biswas et al., EACL 2026), "spectral", the projected norm, or
            "importance", ``Σ ΔW² F``: F says how much the finished tasks' losses depend on a coordinate
            (:mod:`ella.importance`; linear layers), from ``measure_importance`` before each task ends.
        past_rank: cap on the components stored per layer; the past is exact until it is reached.
        penalty_rank: components the penalty uses, the rest entering by its row and column energies; None uses all.
        penalty_energies: False leaves what is beyond those components, or was dropped at ``past_rank``, out of it: the
            penalty is then too small, for comparison.
        reduction: "sum" or "mean" over the penalised layers.
        include_scaling: whether ``ΔW`` carries the LoRA scaling ``α/r`` in the penalty. The past always is the true
            aggregated update, scaling included.
        normalize: "rms" divides ``W_past`` by its root mean square in every layer, which makes λ dimensionless.
        keep_past: where finished tasks act. "adapter": in the adapter ``adapter_name``, beside the one in training.
            "merge": in the base weights (fp32, bf16 or fp16, not quantised), always as base plus the whole past, the
            rounding reported. "external": the forward is the caller's (bases merged by another tool, say); the past is
            data and gives the penalty only.
        adapter_name: the PEFT adapter that is trained in the first task and from then on accumulates finished tasks;
            the trained one is then "ella_task" (with "external" it stays this one).
        skip_unsupported: leave layers out that cannot be penalised, with a warning, instead of refusing the model.

    Raises:
        TypeError, ValueError: naming the field, what was found and what was expected.
    """

    ella_lambda: float | str = "auto"
    penalty: str = "hadamard"
    past_rank: int = 128
    penalty_rank: int | None = None
    penalty_energies: bool = True
    reduction: str = "sum"
    include_scaling: bool = True
    normalize: str | None = None
    keep_past: str = "adapter"
    adapter_name: str = "default"
    skip_unsupported: bool = False

    def __post_init__(self) -> None:
        self._check_lambda()
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(map(repr, allowed))
                raise ValueError(f"{name} must be one of {expected}, found {getattr(self, name)!r}")
        _rank("past_rank", self.past_rank, 1)
        if self.penalty_rank is not None:
            _rank("penalty_rank", self.penalty_rank, 0)
        if self.penalty == "importance" and (self.penalty_rank is not None or not self.penalty_energies):
            raise ValueError(
                "penalty='importance' has no components: expected penalty_rank=None and penalty_energies=True, found "
                f"penalty_rank={self.penalty_rank}, penalty_energies={self.penalty_energies}"
            )
        for name in ("penalty_energies", "include_scaling", "skip_unsupported"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, found {getattr(self, name)!r}")
        if not isinstance(self.adapter_name, str) or not self.adapter_name:
            raise ValueError(f"adapter_name must be a non-empty string, found {self.adapter_name!r}")
        if self.adapter_name in ("ella_past", "ella_task"):
            raise ValueError(f"adapter_name must not be {self.adapter_name!r}: that name is ELLA's own")

    def _check_lambda(self) -> None:
        strength = self.ella_lambda
        if strength == "auto":
            if self.normalize is not None or self.reduction != "sum" or not self.include_scaling:
                raise ValueError(
                    "ella_lambda='auto' is a strength for normalize=None, reduction='sum' and include_scaling=True, "
                    f"found normalize={self.normalize!r}, reduction={self.reduction!r}, "
                    f"include_scaling={self.include_scaling}: give a number"
                )
            return
        if isinstance(strength, bool) or not isinstance(strength, (int, float)):
            raise TypeError(f"ella_lambda must be a number or 'auto', found {strength!r}")
        if not 0 <= strength <= sys.float_info.max:
            raise ValueError(f"ella_lambda must be finite and at least 0, found {strength}")

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain json; the inverse is :meth:`from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EllaConfig:
        """Raises ValueError for a field this version does not know."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(data) - known))
        if unknown:
            raise ValueError(f"unknown EllaConfig fields {unknown}; this version knows {sorted(known)}")
        return cls(**data)


def _rank(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, found {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, found {value}")
