"""``EllaRegularizer``: the penalty of a PEFT model against its own past, and the past's life from task to task."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

import ella_kernels as ek

from .checkpoint import PastState, StoredLayer, load_past, save_past
from .config import EllaConfig
from .lora import AdaptedLayer, adapted_layers
from .merging import check_mergeable, checksums, merge_adapter
from .past import PAST, FoldReport, activate_past, fold_layer, install_past, read_past, write_past
from .plain import PlainLayers, gradients

__all__ = ["EllaRegularizer"]


class _Term(NamedTuple):
    """One ``P``: a part of a layer against its past, ``scaling`` with every convention of the config in it."""

    layer: int
    part: int
    past: ek.LowRank | None
    scaling: float


class _Terms(NamedTuple):
    """All terms as long as the stored past is where and what ``key`` says, and what the kernels take of them as lists.

    ``stored`` are the factors it says it of, whose memory is held so that no other past can come to lie there.
    """

    key: tuple
    stored: list[Tensor]
    terms: list[_Term]
    pasts: list[ek.LowRank | None]
    scalings: list[float]


class EllaRegularizer:
    """Keeps a PEFT LoRA model's new update away from what its earlier tasks wrote (Das Biswas et al., EACL 2026).

    Args:
        peft_model: a ``PeftModel`` with a LoRA adapter named ``config.adapter_name``. If it already carries an adapter
            ``ella_past`` (loaded by PEFT), that is its past.
        config: see :class:`~ella.EllaConfig`.

    Attributes: ``model``, ``config``, ``layers`` (the penalised :class:`~ella.lora.AdaptedLayer`), ``tasks`` (names
    folded so far).

    Raises:
        TypeError: not a PEFT LoRA model.
        ValueError: no such adapter, a layer that cannot be penalised (named, with the reason), or base weights that
            ``keep_past="merge"`` cannot take.

    Example:
        >>> from torch import nn, ones; from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> reg = EllaRegularizer(model, EllaConfig(ella_lambda=10.0))
        >>> loss = model(ones(1, 4)).sum() + reg.penalty()   # zero before the first fold
        >>> reg.end_task("first").max_relative_error
        0.0
    """

    def __init__(self, peft_model: PeftModel, config: EllaConfig | None = None) -> None:
        self.config = config or EllaConfig()
        if not isinstance(self.config, EllaConfig):
            raise TypeError(f"config must be an EllaConfig, found {type(config).__name__}")
        self.model = peft_model
        self.layers = adapted_layers(
            peft_model, self.config.adapter_name, skip_unsupported=self.config.skip_unsupported
        )
        self.tasks: list[str] = []
        self._penalised = [i for i, layer in enumerate(self.layers) if layer.tied_to is None]
        self._hookless = [layer for layer in self.layers if layer.kind in ("attention", "experts")]
        self._energies: dict[str, list[tuple[Tensor, Tensor]]] = {}
        self._errors: dict[str, list[float]] = {}
        self._plain = PlainLayers([self.layers[i] for i in self._penalised])
        self._terms: _Terms | None = None
        self._unmerged: dict[str, int] | None = None
        if self.config.keep_past == "merge":
            check_mergeable(self.layers)
        if PAST in peft_model.peft_config:
            self._check_covered()
            self._install()

    # --- the penalty -------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """``λ · reduce(P)``, 0-dim, differentiable in the adapter: ``loss = task_loss + reg.penalty()``.

        Under gradient accumulation add it once per optimizer step, not per micro-batch, or use
        :meth:`add_gradient_`.
        """
        return self._call(self._evaluate).sum() * self._weight()

    @torch.no_grad()
    def add_gradient_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add ``scale · ∂(λ · reduce(P))`` to the adapter's ``.grad`` (made where missing), without autograd.

        Once per optimizer step, before or after ``backward()``, before clipping. ``scale`` is a gradient scaler's
        scale. Returns ``λ · reduce(P)``, 0-dim.
        """
        weight = self._weight() * scale
        add_ = ek.add_spectral_grad_ if self.config.penalty == "spectral" else ek.add_hadamard_grad_
        parameters = self._plain.trainable(self.config.adapter_name)
        if parameters is not None:
            terms, into, n = self._current_terms(), gradients(parameters), len(self._penalised)
            values = add_(
                parameters[:n], parameters[n:], terms.pasts, terms.scalings, into[:n], into[n:], weight=weight
            )  # fmt: skip
            return values.sum() * self._weight()
        grads = {i: self._gradients(self.layers[i]) for i in self._penalised}

        def add(terms: list[_Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
            into = [grads[t.layer][t.part] for t in terms]
            pasts, scalings = [t.past for t in terms], [t.scaling for t in terms]
            return add_(a, b, pasts, scalings, [g[0] for g in into], [g[1] for g in into], weight=weight)

        return self._call(add).sum() * self._weight()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Raw ``P`` per layer, without λ and reduction; an expert layer is the sum over its experts."""
        found = {self.layers[i].name: 0.0 for i in self._penalised}
        for term, value in zip(self._current_terms().terms, self._call(self._evaluate).tolist(), strict=True):
            found[self.layers[term.layer].name] += value
        return found

    def _weight(self) -> float:
        return self.config.ella_lambda / (len(self._penalised) if self.config.reduction == "mean" else 1)

    def _evaluate(self, terms: list[_Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
        grouped = ek.spectral_penalty_grouped if self.config.penalty == "spectral" else ek.hadamard_penalty_grouped
        return grouped(a, b, [t.past for t in terms], [t.scaling for t in terms])

    def _call(self, compute: Callable[[list[_Term], list[Tensor], list[Tensor]], Tensor]) -> Tensor:
        """Values of all terms, in their order; ``compute`` is called once per device the layers are on."""
        terms = self._current_terms().terms
        factors = {i: self.layers[i].factors(*self.layers[i].parameters()) for i in self._penalised}
        pairs = [factors[t.layer][t.part] for t in terms]
        by_device: dict[torch.device, list[int]] = {}
        for index, (a, _) in enumerate(pairs):
            by_device.setdefault(a.device, []).append(index)
        found: dict[int, Tensor] = {}
        for indices in by_device.values():
            chosen = [pairs[i] for i in indices]
            values = compute([terms[i] for i in indices], [p[0] for p in chosen], [p[1] for p in chosen])
            found.update(zip(indices, values.unbind(), strict=True))
        device = pairs[0][0].device
        return torch.stack([found[i].to(device) for i in range(len(terms))])

    def _gradients(self, layer: AdaptedLayer) -> list[tuple[Tensor, Tensor]]:
        """Views of ``.grad`` per part; a frozen factor gets a scratch tensor, its gradient is nobody's."""
        tensors = []
        for parameter in layer.parameters():
            if not parameter.requires_grad:
                tensors.append(torch.zeros_like(parameter, memory_format=torch.contiguous_format))
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            elif layer.kind in ("conv", "experts") and not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
            tensors.append(parameter.grad)
        return layer.factors(*tensors)

    # --- the past as the penalty sees it -----------------------------------------------------------------------------

    def _current_terms(self) -> _Terms:
        """Made at a fold and whenever a stored factor was moved or written, or a scaling set; kept otherwise."""
        if self.config.keep_past == "adapter":
            for layer in self._hookless:
                activate_past(layer)
        factors = self._plain.parameters(PAST)
        if factors is None:
            parts = [(read_past(self.layers[i]) or ())[:1] for i in self._penalised]
            factors = [factor for part in parts for past in part for factor in past[:2]]
        adapter = self.config.adapter_name
        key = (
            self._plain.scalings(adapter) or tuple(self.layers[i].scaling() for i in self._penalised),
            tuple(map(Tensor.data_ptr, factors)),
            tuple(map(attrgetter("_version"), factors)),
            tuple(map(attrgetter("device"), factors)),
            tuple(map(Tensor.size, factors)),
            tuple(map(Tensor.stride, factors)),
        )
        if self._terms is None or self._terms.key != key:
            terms = [term for i in self._penalised for term in self._layer_terms(i)]
            stored = [factor.detach() for factor in factors]
            self._terms = _Terms(key, stored, terms, [t.past for t in terms], [t.scaling for t in terms])
        return self._terms

    def _layer_terms(self, index: int) -> list[_Term]:
        layer = self.layers[index]
        scaling = layer.scaling() if self.config.include_scaling else 1.0
        pasts = self._pasts(layer)
        if pasts is None:
            return [_Term(index, part, None, scaling) for part in range(layer.n_parts)]
        if self.config.normalize == "rms":
            size = layer.shape[0] * layer.shape[1] * len(pasts)
            mean_square = sum(_squared_norm(past) for past in pasts) / size
            if mean_square == 0:
                return [_Term(index, part, None, scaling) for part in range(len(pasts))]
            scaling /= math.sqrt(mean_square)
        if self.config.penalty_rank is not None:
            pasts = [_keep(past, self.config.penalty_rank) for past in pasts]
        return [_Term(index, part, past, scaling) for part, past in enumerate(pasts)]

    def _pasts(self, layer: AdaptedLayer) -> list[ek.LowRank] | None:
        """The stored past with its energies on the factors' device."""
        parts = read_past(layer)
        energies = self._energies.get(layer.name)
        if parts is None or energies is None:
            return parts
        device = parts[0].left.device
        return [
            ek.LowRank(part.left, part.right, rows.to(device), cols.to(device))
            for part, (rows, cols) in zip(parts, energies, strict=True)
        ]

    # --- from task to task -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def end_task(self, name: str) -> FoldReport:
        """Fold the adapter's update into the past and start a fresh adapter; the model's output stays what it was.

        The trained parameters keep their identity but a new task wants a new optimizer. Nothing is changed unless
        every layer can be folded.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: an adapter is merged, or a factor is not finite (the layer is named).
        """
        if not isinstance(name, str):
            raise TypeError(f"the task's name must be a string, found {type(name).__name__}")
        for layer in self.layers:
            if layer.module.merged:
                raise ValueError(f"adapters {layer.module.merged_adapters} are merged in {layer.name}; unmerge first")
            for factor, parameter in zip("AB", layer.parameters(), strict=True):
                if not torch.isfinite(parameter).all():
                    raise ValueError(f"lora_{factor} of {layer.name} is not finite; {name!r} is not folded")
        folded = {layer.name: self._fold(layer) for layer in self.layers}
        if self.config.keep_past == "merge":
            if self._unmerged is None:
                self._unmerged = checksums(self.layers)
            for layer in self.layers:
                if layer.tied_to is None:
                    merge_adapter(layer, layer.adapter)
        self._adopt(folded)
        init = self.model.peft_config[self.config.adapter_name].init_lora_weights
        for layer in self.layers:
            if layer.tied_to is None:
                layer.reset(init)
        self.tasks.append(name)
        return FoldReport.of(name, folded)

    def _fold(self, layer: AdaptedLayer) -> StoredLayer:
        parts = layer.factors(*layer.parameters())
        return fold_layer(self._stored(layer), parts, layer.scaling(), layer.bias(), self.config.past_rank)

    def _stored(self, layer: AdaptedLayer) -> StoredLayer | None:
        pasts = self._pasts(layer)
        return None if pasts is None else StoredLayer(pasts, layer.bias(PAST), self._errors.get(layer.name, []))

    def _adopt(self, stored: Mapping[str, StoredLayer]) -> None:
        write_past(self.model, self.layers, stored)
        self._errors = {name: layer.relative_error for name, layer in stored.items()}
        self._energies = {
            name: [(part.row_energy, part.col_energy) for part in layer.parts]
            for name, layer in stored.items()
            if layer.parts[0].row_energy is not None
        }
        self._terms = None
        self._install()

    def _install(self) -> None:
        install_past(self.layers, in_forward=self.config.keep_past == "adapter")

    def _check_covered(self) -> None:
        missing = [layer.name for layer in self.layers if read_past(layer) is None]
        if missing:
            raise ValueError(
                f"the model's adapter {PAST!r} leaves out {len(missing)} of the layers of adapter "
                f"{self.config.adapter_name!r}: {missing[:8]}"
            )

    # --- on disk -----------------------------------------------------------------------------------------------------

    def state(self) -> PastState:
        """All that :meth:`save_pretrained` writes."""
        stored = {layer.name: self._stored(layer) for layer in self.layers}
        layers = {name: layer for name, layer in stored.items() if layer is not None}
        extra = {}
        if self._unmerged is not None:
            extra = {"base_before": self._unmerged, "base_after": checksums(self.layers)}
        return PastState(self.config.to_dict(), list(self.tasks), layers, self._shapes(), extra)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the past, the config and the task names as one safetensors file, whole or not at all.

        The trained adapter is not in it: save that with the PEFT model, or call this after :meth:`end_task`.
        """
        save_past(save_directory, self.state())

    @classmethod
    def from_pretrained(
        cls, peft_model: PeftModel, directory: str | Path, config: EllaConfig | None = None
    ) -> EllaRegularizer:
        """The regularizer that was saved, on a model with the same layers; ``config`` replaces the saved one.

        With ``keep_past="merge"`` the base may be the merged one or the original, which is then merged again.

        Raises:
            FileNotFoundError, ValueError: no or no whole state there, or other layers than the model's (listed).
        """
        state = load_past(directory)
        reg = cls(peft_model, config or EllaConfig.from_dict(state.config))
        reg._check_layers(state.shapes, directory)
        reg.tasks = list(state.tasks)
        unmerged = reg._unmerged_base(state, directory)
        if state.layers:
            reg._adopt(state.layers)
            if unmerged is not None:
                reg._unmerged = unmerged
                reg._merge_past_unless(state.extra.get("base_after"))
        return reg

    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        return {layer.name: (layer.n_parts, *layer.shape) for layer in self.layers}

    def _check_layers(self, saved: Mapping[str, Sequence[int]], directory: str | Path) -> None:
        own = self._shapes()
        lines = [f"{name} is saved but not in the model" for name in sorted(saved.keys() - own.keys())]
        lines += [f"{name} is in the model but not saved" for name in sorted(own.keys() - saved.keys())]
        lines += [
            f"{name} has (parts, out, in) {own[name]}, saved {tuple(saved[name])}"
            for name in sorted(own.keys() & saved.keys())
            if own[name] != tuple(saved[name])
        ]
        if lines:
            raise ValueError(f"the past in {directory} belongs to other layers than this model's: {'; '.join(lines)}")

    def _unmerged_base(self, state: PastState, directory: str | Path) -> dict[str, int] | None:
        """Checksums of the base before any merge; None where nothing is merged. Refuses a base that is neither."""
        before, after = state.extra.get("base_before"), state.extra.get("base_after")
        merging = self.config.keep_past == "merge"
        if before is None:
            return checksums(self.layers) if merging and state.layers else None
        now = checksums(self.layers)
        if merging and now in (before, after):
            return before
        if not merging and now == before:
            return None
        if not merging and now == after:
            raise ValueError(f"the base already holds the past in {directory}; load it with keep_past='merge'")
        other = sorted(name for name in now if now[name] not in (before.get(name), after.get(name)))
        raise ValueError(f"the past in {directory} was merged into other base weights than this model's: {other}")

    def _merge_past_unless(self, merged: Mapping[str, int] | None) -> None:
        if merged is not None and checksums(self.layers) == merged:
            return
        lost = max((error for errors in self._errors.values() for error in errors), default=0.0)
        if lost > 0:
            warnings.warn(
                f"merging the stored past, which was truncated (relative error up to {lost:.1e}), into the original "
                "base: not bit for bit what was merged task by task",
                stacklevel=3,
            )
        for layer in self.layers:
            if layer.tied_to is None:
                merge_adapter(layer, PAST)


def _squared_norm(past: ek.LowRank) -> float:
    """``‖W_past‖_F²`` with what was dropped, in float64."""
    left, right = past.left.double(), past.right.double()
    total = ((left.mT @ left) * (right @ right.mT)).sum().item()
    return total if past.row_energy is None else total + past.row_energy.double().sum().item()


def _keep(past: ek.LowRank, rank: int) -> ek.LowRank:
    """The leading ``rank`` components, the rest and what was dropped before as energies."""
    kept = ek.truncate(past.left, past.right, rank)
    if past.row_energy is None:
        return kept
    if kept.row_energy is None:
        return kept._replace(row_energy=past.row_energy, col_energy=past.col_energy)
    return kept._replace(row_energy=kept.row_energy + past.row_energy, col_energy=kept.col_energy + past.col_energy)
