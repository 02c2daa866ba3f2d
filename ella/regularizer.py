"""``EllaRegularizer``: the penalty of a PEFT model against its own past, and the past's life from task to task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

import ella_kernels as ek

from .checkpoint import PAST_FILE, PastState, load_past, save_past
from .config import AUTO_LAMBDA, MAX_LAMBDA, EllaConfig
from .distributed import SPREAD, is_writer, refuse_tensor_parallel, wait_for_all
from .export import ExportReport, export_live
from .finished import FinishedTasks
from .importance import refuse_unmeasured
from .linear_layers import LinearLayers, gradients
from .lora import AdaptedLayer
from .past import FoldReport
from .sharded import ShardedPenalty
from .terms import Operands, Size, Term, Terms

__all__ = ["EllaRegularizer"]


class EllaRegularizer:
    """Keeps a PEFT LoRA model's new update away from what its earlier tasks wrote (Das Biswas et al., EACL 2026).

    Args:
        peft_model: a ``PeftModel`` with a LoRA adapter named ``config.adapter_name``: a fresh one, or the knowledge
            adapter that an earlier run saved (loaded by PEFT), to which a fresh trained adapter is added.
        config: see :class:`~ella.EllaConfig`.

    Attributes: ``model``, ``config`` (another one may be assigned), ``layers`` (the penalised
    :class:`~ella.lora.AdaptedLayer`), ``tasks`` (names folded so far), ``adapter`` (name of the adapter in training).

    Raises:
        TypeError: not a PEFT LoRA model.
        ValueError: no such adapter, a layer that cannot be penalised (named, with the reason), base weights that
            ``keep_past="merge"`` cannot take, a frozen adapter, or a past that is only whole with its saved state.

    Example:
        >>> from torch import nn, ones; from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, target_modules=["0"]))
        >>> reg = EllaRegularizer(model, EllaConfig(ella_lambda=10.0))
        >>> loss = model(ones(1, 4)).sum() + reg.penalty()   # zero before the first fold
        >>> reg.end_task("first").max_relative_error
        0.0
    """

    def __init__(self, peft_model: PeftModel, config: EllaConfig | None = None) -> None:
        self._set_up(peft_model, EllaConfig() if config is None else config)

    def _set_up(
        self, model: PeftModel, config: EllaConfig, state: PastState | None = None, folder: Path | None = None
    ) -> None:
        _check_type(config)
        self.model = model
        self._finished = FinishedTasks(model, config, state, folder)
        self._follow()

    @property
    def config(self) -> EllaConfig:
        """The settings. Others can be assigned between steps, but for what the model was set up with."""
        return self._finished.config

    @config.setter
    def config(self, config: EllaConfig) -> None:
        _check_type(config)
        for name in ("adapter_name", "keep_past", "skip_unsupported"):
            now, given = getattr(self.config, name), getattr(config, name)
            if now != given:
                raise ValueError(
                    f"{name} is {now!r} and cannot become {given!r} on a model that was set up with it; make a new "
                    "EllaRegularizer"
                )
        self._finished.check()
        if config.penalty == "importance":
            refuse_unmeasured(self.layers)
        self._finished.config = config
        self._finished.past.config = config.to_dict()
        self._follow()

    def _follow(self) -> None:
        """Work from the adapter that is trained now."""
        self._layers = self._finished.layers
        self._penalised = [layer for layer in self._layers if layer.tied_to is None]
        self._size = sum(layer.n_parts * layer.shape[0] * layer.shape[1] for layer in self._penalised)
        self._linear = LinearLayers(self._penalised)
        self._terms = Terms(self.config, self._penalised, self._linear)
        self._plan = ek.Plan("spectral" if self._is_spectral else "hadamard")
        self._sharded = ShardedPenalty(self._penalised, self._terms)
        self._is_checked = False

    @property
    def _is_spectral(self) -> bool:
        return self.config.penalty == "spectral"

    @property
    def layers(self) -> list[AdaptedLayer]:
        """The layers of the adapter in training."""
        return self._finished.layers

    @property
    def adapter(self) -> str:
        """Name of the adapter in training."""
        return self._finished.adapter

    @property
    def tasks(self) -> list[str]:
        """Names of the finished tasks, in order."""
        return self._finished.tasks

    # --- the penalty -------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """``λ · reduce(P)``, 0-dim, differentiable in the adapter: ``loss = task_loss + reg.penalty()``.

        Under gradient accumulation add it once per optimizer step, not per micro-batch, or use
        :meth:`add_gradient_`.
        """
        if self._spread(training=True) == "FSDP2":
            raise ValueError(
                "penalty() has no derivative with respect to parameters that FSDP2 shards: call add_gradient_() once "
                "per optimizer step, after zero_grad() and before clipping"
            )
        operands = self._operands()
        return self._call(self._evaluate, operands).sum() * self._weight(operands.size)

    @torch.no_grad()
    def add_gradient_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add ``scale · ∂(λ · reduce(P))`` to the adapter's ``.grad`` (made where missing), without autograd.

        Once per optimizer step, before or after ``backward()``, before clipping. ``scale`` is a gradient scaler's
        scale. Returns ``λ · reduce(P)``, 0-dim.

        Under DDP and FSDP2 every rank calls it, on its model or the one inside the wrapper. Raises ValueError under
        DeepSpeed, which keeps gradients elsewhere.
        """
        add_ = self._plan.add_grad_
        engine = self._spread(training=True)
        if engine in ("ZeRO", "ZeRO-3"):
            raise ValueError(
                "DeepSpeed keeps gradients apart from the parameters, where add_gradient_() would be lost: use "
                "ella.with_penalty(loss, regularizer, engine), or attach(trainer, regularizer)"
            )
        if engine == "FSDP2":
            return self._sharded.add_gradient_(self._finished.past, add_, self._weight, scale)
        operands = self._operands()
        weight = self._weight(operands.size)
        parameters = self._linear.trainable(self.adapter)
        if parameters is not None:
            into, n = gradients(parameters), len(self._penalised)
            values = add_(
                parameters[:n], parameters[n:], operands.pasts, operands.scalings, into[:n], into[n:],
                weight=weight * scale,
            )  # fmt: skip
            return values.sum() * weight
        grads = [self._gradients(layer) for layer in self._penalised]
        return self._add(operands, grads, weight * scale) * weight

    @torch.no_grad()
    def gradients(self) -> tuple[Tensor, list[nn.Parameter], list[Tensor]]:
        """``λ · reduce(P)``, 0-dim, and its gradient: parameters and a tensor for each, ``.grad`` as it is.

        For engines that keep gradients elsewhere; the parameters must be whole (:meth:`spread_parameters`).
        """
        self._spread(training=True)
        operands, found, grads = self._operands(), {}, []
        for layer in self._penalised:
            pair = [torch.zeros_like(p, memory_format=torch.contiguous_format) for p in layer.parameters()]
            grads.append(layer.factors(*pair))
            found.update({p: g for p, g in zip(layer.parameters(), pair, strict=True) if p.requires_grad})
        weight = self._weight(operands.size)
        value = self._add(operands, grads, weight) * weight
        return value, list(found), list(found.values())

    def spread_parameters(self) -> list[nn.Parameter]:
        """The parameters that :meth:`gradients` reads, as they lie."""
        self._spread(training=True)
        past = self._finished.past
        stored = [p for layer in self._penalised for p in past.stored_in(layer) if isinstance(p, nn.Parameter)]
        return [*(p for layer in self._penalised for p in layer.parameters()), *stored]

    def _add(self, operands: Operands, grads: Sequence[list[tuple[Tensor, Tensor]]], weight: float | Tensor) -> Tensor:
        """Add ``weight · ∂ΣP`` to ``grads``, per layer and part ``(A, B)``; returns ``ΣP``."""
        add_ = ek.add_spectral_grad_ if self._is_spectral else ek.add_hadamard_grad_

        def add(terms: list[Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
            into = [grads[t.layer][t.part] for t in terms]
            pasts, scalings = [t.past for t in terms], [t.scaling for t in terms]
            return add_(a, b, pasts, scalings, [g[0] for g in into], [g[1] for g in into], weight=weight)

        return self._call(add, operands).sum()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Raw ``P`` per layer, without λ and reduction; an expert layer is the sum over its experts."""
        found = {layer.name: 0.0 for layer in self._penalised}
        if self._spread() == "FSDP2":
            terms, values = self._sharded.values(self._finished.past, self._penalties)
        else:
            operands = self._operands()
            terms, values = [term.layer for term in operands.terms], self._call(self._evaluate, operands)
        for layer, value in zip(terms, values.tolist(), strict=True):
            found[self._penalised[layer].name] += value
        return found

    def strength(self) -> float:
        """λ as it is now: a number for "auto" too, 0 before the first task has ended."""
        is_sharded = self._spread() == "FSDP2"
        return self._lambda(self._sharded.size(self._finished.past) if is_sharded else self._operands().size)

    def _weight(self, past: Size) -> float:
        """What ``ΣP`` is multiplied by."""
        return self._lambda(past) / (len(self._penalised) if self.config.reduction == "mean" else 1)

    def _lambda(self, past: Size) -> float:
        if not isinstance(self.config.ella_lambda, str):
            return self.config.ella_lambda
        # By one after the other: the square of a small past may be too small for a number.
        return min(AUTO_LAMBDA * self._size / past.energy / past.by_chance, MAX_LAMBDA) if past.by_chance else 0.0

    def _evaluate(self, terms: list[Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
        return self._penalties(a, b, [t.past for t in terms], [t.scaling for t in terms])

    def _penalties(
        self, a: list[Tensor], b: list[Tensor], pasts: list[ek.LowRank | None], scalings: list[float]
    ) -> Tensor:
        grouped = ek.spectral_penalty_grouped if self._is_spectral else ek.hadamard_penalty_grouped
        return grouped(a, b, pasts, scalings)

    def _spread(self, training: bool = False) -> str | None:
        """What spreads the model, as it is now, over ranks; ``training``: a gradient will be used."""
        self._finished.check(training)
        if self._layers is not self._finished.layers:
            self._follow()
        engine = self._finished.engine
        if engine is None and not self._is_checked:
            refuse_tensor_parallel(self._penalised, None)
            self._is_checked = True
        return engine

    def _operands(self) -> Operands:
        """What the penalty is computed from, after :meth:`_spread`."""
        return self._terms.current(self._finished.past)

    def _call(self, compute: Callable[[list[Term], list[Tensor], list[Tensor]], Tensor], operands: Operands) -> Tensor:
        """Values of all terms, in their order; ``compute`` is called once per device the layers are on."""
        terms = operands.terms
        factors = [layer.factors(*self._parameters(layer)) for layer in self._penalised]
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

    def _parameters(self, layer: AdaptedLayer) -> tuple[Tensor, Tensor]:
        a, b = layer.parameters()
        watch = self._finished.watch
        return a, b if watch is None else watch.seen_by_penalty(b)

    def _gradients(self, layer: AdaptedLayer) -> list[tuple[Tensor, Tensor]]:
        """Views of ``.grad`` per part; a frozen factor gets a scratch tensor, its gradient is nobody's."""
        tensors = []
        for parameter in layer.parameters():
            if not parameter.requires_grad:
                tensors.append(torch.zeros_like(parameter, memory_format=torch.contiguous_format))
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            elif not layer.plain and not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
            tensors.append(parameter.grad)
        return layer.factors(*tensors)

    # --- from task to task -------------------------------------------------------------------------------------------

    def end_task(self, name: str) -> FoldReport:
        """Fold the adapter's update into the past and start a fresh adapter; the model's output stays what it was.

        From the first fold on the adapter ``config.adapter_name`` holds all finished tasks, frozen, and "ella_task" is
        the trained one: the same Parameter objects, in place, under another name; a new task wants a new optimizer.
        A frozen adapter "ref", TRL's copy of the model before the task, is deleted. Nothing is changed unless every
        layer can be folded.

        Raises:
            TypeError: ``name`` is not a string.
            ValueError: an adapter is merged, another one is active, or a factor is not finite or not in memory (the
                layer is named).
        """
        return self._finished.fold(name)

    def measure_importance(self, losses: Iterable[Tensor]) -> None:
        """Measure what the task in training depends on, for ``penalty="importance"``: before its :meth:`end_task`.

        In eval mode, after the last step; no ``.grad`` is touched, and a second call replaces the first. Of several
        processes each measures losses of its own, of the model or the one inside DDP's wrapper.

        Args:
            losses: each 0-dim, made while it is asked for, by a forward of its own, best of a single record; a hundred
                are enough: ``(model(**record).loss for record in records)``.

        Raises:
            TypeError: not losses.
            ValueError: another penalty, finished tasks without importance, nothing to measure, a loss without a forward
                of its own, a gradient that is not finite or does not reach a layer.
        """
        self._finished.measure(losses)

    def reset_adapter(self) -> None:
        """Start the trained adapter afresh, in place: no effect, no gradient, the past as it is.

        Raises ValueError where an adapter is merged, whose update PEFT would no longer find to unmerge.
        """
        self._finished.reset()

    def export_adapter(self, directory: str | Path, rank: int | None = None) -> ExportReport:
        """Write finished and current tasks as one plain LoRA of scaling 1, whole or not at all.

        Args:
            directory: must not exist yet, or be empty.
            rank: cap on the components; None keeps all. The report names the rank with which vLLM serves it and the
                relative error of what was cut.

        Raises:
            TypeError, ValueError: no positive integer as rank. FileExistsError: something in ``directory``.
        """
        self._finished.check()
        return export_live(self.model, self.adapter, self.layers, self._finished.past, directory, rank)

    # --- on disk -----------------------------------------------------------------------------------------------------

    def state(self) -> PastState:
        """All that :meth:`save_pretrained` writes."""
        self._finished.check()
        past = self._finished.past
        past.config = self.config.to_dict()
        return past.state(self.layers)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the past, the config and the task names as one safetensors file, whole or not at all.

        The trained adapter is not in it: save that with the PEFT model, or call this after :meth:`end_task`. What PEFT
        saves (``model.save_pretrained``, any trainer's checkpoint) has the same state beside the adapter.

        Under FSDP2 and ZeRO-3 every rank calls it and the first one writes.
        """
        state = self.state()
        if self._finished.engine not in SPREAD:
            save_past(save_directory, state)
            return
        if is_writer():
            save_past(save_directory, state)
        wait_for_all()

    @classmethod
    def from_pretrained(
        cls, peft_model: PeftModel, directory: str | Path, config: EllaConfig | None = None
    ) -> EllaRegularizer:
        """The regularizer that was saved, on a model with the same layers; ``config`` replaces the saved one.

        ``directory`` is what :meth:`save_pretrained`, PEFT or a trainer wrote. The model brings the trained adapter:
        its own fresh one, or, where it was loaded by PEFT from ``directory``, "ella_task" from there. With
        ``keep_past="merge"`` the base may be the merged one or the original, which is then merged again.

        Raises:
            FileNotFoundError, ValueError: no or no whole state there, or other layers than the model's (listed).
        """
        folder = Path(directory)
        names = list(getattr(peft_model, "peft_config", ())) if config is None else [config.adapter_name]
        if config is not None or not (folder / PAST_FILE).exists():  # PEFT gives adapters but "default" their folders
            own = [folder / name for name in names if name != "default" and (folder / name / PAST_FILE).exists()]
            folder = own[0] if own else folder
        state = load_past(folder)
        reg = cls.__new__(cls)
        reg._set_up(peft_model, config or EllaConfig.from_dict(state.config), state, folder)
        return reg

    def restore(self, directory: str | Path) -> None:
        """Bring the model to the past saved in ``directory``: what a trainer does when it resumes.

        The model's past must be that one or none yet. The trained adapter keeps its weights.

        Raises FileNotFoundError or ValueError as :meth:`from_pretrained`, and ValueError where the model has finished
        other tasks or an adapter is merged.
        """
        self._finished.restore(directory)


def _check_type(config: EllaConfig) -> None:
    if not isinstance(config, EllaConfig):
        raise TypeError(f"config must be an EllaConfig, found {type(config).__name__}")
