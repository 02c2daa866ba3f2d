"""``EllaRegularizer``: the penalty of a PEFT model against its own past, and the past's life from task to task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor

import ella_kernels as ek

from . import knowledge
from .acting import TASK
from .bypass import ForwardWatch
from .checkpoint import PastState, StoredLayer, load_past, save_past
from .config import EllaConfig
from .export import ExportReport, export_live
from .knowledge import Marker, past_of, trained_adapter
from .linear_layers import LinearLayers, gradients
from .lora import AdaptedLayer, adapted_layers
from .merging import MergedBase, check_fits, check_mergeable, checksums
from .past import FoldReport, Past, fold_layer
from .terms import Term, Terms

__all__ = ["EllaRegularizer"]

# What a state says of the base weights that its past was merged into.
_BASE_EXTRA = ("base_before", "base_after")


class EllaRegularizer:
    """Keeps a PEFT LoRA model's new update away from what its earlier tasks wrote (Das Biswas et al., EACL 2026).

    Args:
        peft_model: a ``PeftModel`` with a LoRA adapter named ``config.adapter_name``: a fresh one, or the knowledge
            adapter that an earlier run saved (loaded by PEFT), to which a fresh trained adapter is added.
        config: see :class:`~ella.EllaConfig`.

    Attributes: ``model``, ``config``, ``layers`` (the penalised :class:`~ella.lora.AdaptedLayer`), ``tasks`` (names
    folded so far), ``adapter`` (name of the adapter in training).

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
        self._construct(peft_model, config or EllaConfig())

    def _construct(
        self, model: PeftModel, config: EllaConfig, state: PastState | None = None, folder: Path | None = None
    ):
        if not isinstance(config, EllaConfig):
            raise TypeError(f"config must be an EllaConfig, found {type(config).__name__}")
        self.model, self.config = model, config
        self._past = Past(config.adapter_name, config.to_dict())
        self._watch: ForwardWatch | None = None
        # Refuses a model that is no PEFT LoRA before anything is asked of it.
        self._find_layers(config.adapter_name, warn=True)
        self._take_up(state, folder)
        if config.keep_past == "merge" and not self._past.tasks:
            check_mergeable(model, self.layers)
        if not any(p.requires_grad for layer in self.layers for p in layer.all_parameters(layer.adapter)):
            raise ValueError(
                f"adapter {self.adapter!r} is frozen: nothing would be trained. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True), or switch adapters on again"
            )

    def _find_layers(self, adapter: str, warn: bool = False) -> None:
        self.adapter = adapter
        skip = self.config.skip_unsupported
        self.layers = adapted_layers(self.model, adapter, skip_unsupported=skip, warn=warn)
        self._penalised = [layer for layer in self.layers if layer.tied_to is None]
        self._linear = LinearLayers(self._penalised)
        self._terms = Terms(self.config, self._penalised, self._linear)
        # Where the layers hang: what PEFT unloads or replaces is noticed by its parent's dictionary.
        paths = [layer.path.rpartition(".") for layer in self.layers]
        root = self.model.base_model.model
        self._children = [(root.get_submodule(parent)._modules if parent else root._modules) for parent, _, _ in paths]
        self._child_names = [name for _, _, name in paths]
        self._modules = [layer.module for layer in self.layers]

    @property
    def tasks(self) -> list[str]:
        """Names of the finished tasks, in order."""
        return (past_of(self.model, self.config.adapter_name) or self._past).tasks

    # --- the penalty -------------------------------------------------------------------------------------------------

    def penalty(self) -> Tensor:
        """``λ · reduce(P)``, 0-dim, differentiable in the adapter: ``loss = task_loss + reg.penalty()``.

        Under gradient accumulation add it once per optimizer step, not per micro-batch, or use
        :meth:`add_gradient_`.
        """
        self._check(training=True)
        return self._call(self._evaluate).sum() * self._weight()

    @torch.no_grad()
    def add_gradient_(self, scale: float | Tensor = 1.0) -> Tensor:
        """Add ``scale · ∂(λ · reduce(P))`` to the adapter's ``.grad`` (made where missing), without autograd.

        Once per optimizer step, before or after ``backward()``, before clipping. ``scale`` is a gradient scaler's
        scale. Returns ``λ · reduce(P)``, 0-dim.
        """
        self._check(training=True)
        weight = self._weight() * scale
        add_ = ek.add_spectral_grad_ if self.config.penalty == "spectral" else ek.add_hadamard_grad_
        parameters = self._linear.trainable(self.adapter)
        if parameters is not None:
            terms, into, n = self._terms.current(self._past), gradients(parameters), len(self._penalised)
            values = add_(
                parameters[:n], parameters[n:], terms.pasts, terms.scalings, into[:n], into[n:], weight=weight
            )  # fmt: skip
            return values.sum() * self._weight()
        grads = [self._gradients(layer) for layer in self._penalised]

        def add(terms: list[Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
            into = [grads[t.layer][t.part] for t in terms]
            pasts, scalings = [t.past for t in terms], [t.scaling for t in terms]
            return add_(a, b, pasts, scalings, [g[0] for g in into], [g[1] for g in into], weight=weight)

        return self._call(add).sum() * self._weight()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """Raw ``P`` per layer, without λ and reduction; an expert layer is the sum over its experts."""
        self._check()
        found = {layer.name: 0.0 for layer in self._penalised}
        for term, value in zip(self._terms.current(self._past).terms, self._call(self._evaluate).tolist(), strict=True):
            found[self._penalised[term.layer].name] += value
        return found

    def _weight(self) -> float:
        return self.config.ella_lambda / (len(self._penalised) if self.config.reduction == "mean" else 1)

    def _evaluate(self, terms: list[Term], a: list[Tensor], b: list[Tensor]) -> Tensor:
        grouped = ek.spectral_penalty_grouped if self.config.penalty == "spectral" else ek.hadamard_penalty_grouped
        return grouped(a, b, [t.past for t in terms], [t.scaling for t in terms])

    def _call(self, compute: Callable[[list[Term], list[Tensor], list[Tensor]], Tensor]) -> Tensor:
        """Values of all terms, in their order; ``compute`` is called once per device the layers are on."""
        terms = self._terms.current(self._past).terms
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
        return a, b if self._watch is None else self._watch.seen_by_penalty(b)

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

    # --- the model as it is now --------------------------------------------------------------------------------------

    def _check(self, training: bool = False) -> None:
        """Raise unless the model is the one that was regularized; take up what another regularizer folded."""
        name = self.config.adapter_name
        past = past_of(self.model, name)
        if past is not self._past:
            self._lost_unless(
                past is not None or not self._past.tasks, f"adapter {name!r}, which holds them, was deleted"
            )
            if past is not None:
                self._past = past
                self._find_layers(trained_adapter(self.model, name))
        if not all(map(is_, map(dict.get, self._children, self._child_names), self._modules)):
            gone = next(
                layer.name
                for layer, held, child in zip(self.layers, self._children, self._child_names, strict=True)
                if held.get(child) is not layer.module
            )
            self._lost_unless(False, f"the LoRA layer {gone} is no longer in the model (unloaded, or replaced)")
        self._lost_unless(self.adapter in self.model.peft_config, f"adapter {self.adapter!r} was deleted")
        if training and self.adapter not in self.model.active_adapters:
            raise ValueError(
                f"adapter {self.adapter!r} is not active ({self.model.active_adapters} is), so the penalty would be on "
                f"an update that the forward does not use; call model.set_adapter({self.adapter!r}) first"
            )

    def _lost_unless(self, held: bool, what: str) -> None:
        if held:
            return
        knowledge.remove(self.model)
        tasks = f"its past of the tasks {self._past.tasks}" if self._past.tasks else "its penalty"
        raise ValueError(
            f"this EllaRegularizer has lost its model, and with it {tasks}: {what}. Make a new one for the model that "
            "is trained now; a saved state is taken up by EllaRegularizer.from_pretrained(model, folder)"
        )

    # --- from task to task -------------------------------------------------------------------------------------------

    @torch.no_grad()
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
        if not isinstance(name, str):
            raise TypeError(f"the task's name must be a string, found {type(name).__name__}")
        self._check(training=True)
        for layer in self.layers:
            self._check_foldable(layer, name)
        folded = {layer.name: self._fold(layer) for layer in self.layers}
        if self.config.keep_past == "merge":
            check_fits(self.layers, folded)
        self._drop_reference()
        self._past.tasks.append(name)
        merge_error = self._install(folded, folding=True)
        self.reset_adapter()
        return dataclasses.replace(FoldReport.of(name, folded), merge_error=merge_error)

    def _check_foldable(self, layer: AdaptedLayer, task: str) -> None:
        module = layer.module
        if module.merged:
            raise ValueError(f"adapters {module.merged_adapters} are merged in {layer.name}; unmerge first")
        if module.disable_adapters:
            raise ValueError(f"adapters are disabled in {layer.name}; enable them before {task!r} is folded")
        replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
        if replaced and self.config.keep_past == "adapter":
            raise ValueError(
                f"the forward of {layer.name} was replaced on the module (a fused LoRA kernel?), so finished tasks "
                "cannot act in it: give PEFT's own forward back, or use keep_past='merge'"
            )
        for factor, parameter in zip("AB", layer.parameters(), strict=True):
            if parameter.device.type == "meta":
                raise ValueError(f"lora_{factor} of {layer.name} is offloaded (on meta): {task!r} not folded")
            if not torch.isfinite(parameter).all():
                raise ValueError(f"lora_{factor} of {layer.name} is not finite; {task!r} is not folded")
        bias = layer.bias()
        if bias is not None and not torch.isfinite(bias).all():
            raise ValueError(f"the bias of lora_B of {layer.name} is not finite; {task!r} is not folded")

    def reset_adapter(self) -> None:
        """Start the trained adapter afresh, in place: no effect, no gradient, the past as it is."""
        init = self.model.peft_config[self.adapter].init_lora_weights
        for layer in self.layers:
            if layer.tied_to is None:
                layer.reset(init)

    def _fold(self, layer: AdaptedLayer) -> StoredLayer:
        parts = layer.factors(*layer.parameters())
        return fold_layer(self._past.stored(layer), parts, layer.scaling(), layer.bias(), self.config.past_rank)

    def _install(
        self, stored: Mapping[str, StoredLayer], *, folding: bool = False, merged: bool = False
    ) -> dict[str, float]:
        """Make ``stored`` the model's past, where the config keeps it; returns the errors of merging.

        ``folding``: a task ends with it. ``merged``: the base weights hold it already.
        """
        model, past, keep = self.model, self._past, self.config.keep_past
        past.config = self.config.to_dict()
        if keep == "external":
            held = model.peft_config[past.adapter]
            past.adopt(self.layers, stored, held)
            model.peft_config[past.adapter] = knowledge.EllaLoraConfig.of(held, past)
            return {}
        if keep == "merge" and past.base is None and not merged:
            past.base = MergedBase(self.layers)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        if TASK not in model.peft_config:
            knowledge.move_adapter(model, past.adapter, TASK)
        self._find_layers(TASK)
        past.adopt(self.layers, stored, model.peft_config[TASK])
        knowledge.install(model, self.layers, stored, past, in_base=keep == "merge", folding=folding)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in knowledge.parameters_of(self.layers, past.adapter):
            parameter.requires_grad_(False)
        if self._watch is not None:
            self._watch.close()
        self._watch = ForwardWatch(model.base_model.model, self.layers)
        if keep != "merge":
            past.extra = {}
            return {}
        if merged:
            past.base = MergedBase.without_past(self.layers, past.adapter, past.extra["base_before"])
            return {}
        errors = past.base.merge(self.layers, past.adapter)
        past.extra = {"base_before": past.base.checksums, "base_after": checksums(self.layers)}
        return errors

    def _drop_reference(self) -> None:
        """Delete TRL's frozen copy of the model before this task: the next trainer makes its own."""
        if "ref" in self.model.peft_config and self.adapter != "ref":
            trainable = any(p.requires_grad for n, p in self.model.named_parameters() if ".ref." in n)
            if not trainable and "ref" not in self.model.active_adapters:
                self.model.delete_adapter("ref")

    def export_adapter(self, directory: str | Path, rank: int | None = None) -> ExportReport:
        """Write finished and current tasks as one plain LoRA of scaling 1, whole or not at all.

        Args:
            directory: must not exist yet, or be empty.
            rank: cap on the components; None keeps all. The report names the rank with which vLLM serves it and the
                relative error of what was cut.

        Raises:
            TypeError, ValueError: no positive integer as rank. FileExistsError: something in ``directory``.
        """
        self._check()
        return export_live(self.model, self.adapter, self.layers, self._past, directory, rank)

    # --- a past that was saved ---------------------------------------------------------------------------------------

    def _take_up(self, state: PastState | None, folder: Path | None) -> None:
        """The past that ``state`` or the model itself brings along."""
        model, name = self.model, self.config.adapter_name
        living, marker = past_of(model, name), Marker.of(model.peft_config[name])
        if living is not None and living.config["keep_past"] != self.config.keep_past:
            raise ValueError(
                f"the model keeps its past with keep_past={living.config['keep_past']!r}, the config says "
                f"{self.config.keep_past!r}; give the model's own"
            )
        if state is not None:
            self._restore(state, folder, marker)
        elif living is not None:
            self._past = living
            self._find_layers(trained_adapter(model, name))
        elif marker is not None:
            if not marker.exact or {marker.keep_past, self.config.keep_past} != {"adapter"}:
                what = "what truncation dropped" if not marker.exact else "which base weights it belongs to"
                raise ValueError(
                    f"adapter {name!r} holds the finished tasks {list(marker.tasks)}, but not {what}: load it with "
                    "EllaRegularizer.from_pretrained(model, folder), from the folder that the adapter came from"
                )
            self._past.tasks = list(marker.tasks)
            self._install_loaded(marker)
        elif "ella_past" in model.peft_config:
            self._install_old()
        elif TASK in model.peft_config:
            raise ValueError(
                f"the model has an adapter {TASK!r}, but {name!r} is no knowledge adapter of ELLA; delete {TASK!r}, or "
                "load both from the folder they were saved in"
            )

    def _install_loaded(self, marker: Marker) -> None:
        """A knowledge adapter that PEFT loaded: its own factors, all of the past."""
        if TASK not in self.model.peft_config:
            knowledge.add_trained_adapter(self.model, self.config.adapter_name, marker)
        self.model.set_adapter(TASK)
        stored = {
            layer.name: StoredLayer(
                [ek.LowRank(b, a) for a, b in layer.factors(*(p.detach() for p in layer.parameters()))],
                layer.bias(),
                [0.0] * len(marker.tasks),
            )
            for layer in self.layers
        }
        self._install(stored)

    def _install_old(self) -> None:
        """The form of version 0.1.0: the past in an adapter "ella_past", the trained one under the user's name."""
        missing = [layer.name for layer in self.layers if not layer.has("ella_past")]
        if missing:
            raise ValueError(
                f"the model's adapter 'ella_past' leaves out {len(missing)} of the layers of adapter "
                f"{self.config.adapter_name!r}: {missing[:8]}"
            )
        stored = {
            layer.name: StoredLayer(
                [ek.LowRank(b, a) for a, b in layer.factors(*(p.detach() for p in layer.parameters("ella_past")))],
                layer.bias("ella_past"),
                [0.0],
            )
            for layer in self.layers
        }
        self._past.tasks = ["ella_past"]
        self.model.delete_adapter("ella_past")
        self._install(stored)

    def state(self) -> PastState:
        """All that :meth:`save_pretrained` writes."""
        self._check()
        self._past.config = self.config.to_dict()
        return self._past.state(self.layers)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write the past, the config and the task names as one safetensors file, whole or not at all.

        The trained adapter is not in it: save that with the PEFT model, or call this after :meth:`end_task`. What PEFT
        saves (``model.save_pretrained``, any trainer's checkpoint) has the same state beside the adapter.
        """
        save_past(save_directory, self.state())

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
        if config is not None and (folder / config.adapter_name).is_dir() and config.adapter_name != "default":
            folder = folder / config.adapter_name
        state = load_past(folder)
        reg = cls.__new__(cls)
        reg._construct(peft_model, config or EllaConfig.from_dict(state.config), state, folder)
        return reg

    def restore(self, directory: str | Path) -> None:
        """Bring the model to the past saved in ``directory``: what a trainer does when it resumes.

        The model's past must be that one or none yet. The trained adapter keeps its weights.

        Raises FileNotFoundError or ValueError as :meth:`from_pretrained`, and ValueError where the model has finished
        other tasks.
        """
        self._check()
        state = load_past(directory)
        if self.tasks and self.tasks != state.tasks:
            raise ValueError(f"{directory} has finished the tasks {state.tasks}, this model {self.tasks}")
        self._restore(state, Path(directory), None)

    def _restore(self, state: PastState, folder: Path | None, marker: Marker | None) -> None:
        model, name = self.model, self.config.adapter_name
        self._past = past_of(model, name) or self._past
        self._check_layers(state.shapes, folder)
        if not state.layers:
            self._past.tasks = list(state.tasks)
            return
        if marker is not None and TASK not in model.peft_config:
            knowledge.add_trained_adapter(model, name, marker, folder)
        if TASK in model.peft_config:
            model.set_adapter(TASK)
        # A reference copied from another state: whoever needs one makes or loads it anew.
        self._drop_reference()
        merged = self._is_merged(state, folder)
        self._past.tasks, self._past.base = list(state.tasks), None
        self._past.extra = {key: state.extra[key] for key in _BASE_EXTRA if key in state.extra}
        self._install(state.layers, merged=merged)
        if folder is not None and TASK in model.peft_config:
            training = model.training
            knowledge.load_rest(model, name, folder)
            model.train(training)

    def _check_layers(self, saved: Mapping[str, Sequence[int]], directory: str | Path) -> None:
        own = {layer.name: (layer.n_parts, *layer.shape) for layer in self.layers}
        lines = [f"{name} is saved but not in the model" for name in sorted(saved.keys() - own.keys())]
        lines += [f"{name} is in the model but not saved" for name in sorted(own.keys() - saved.keys())]
        lines += [
            f"{name} has (parts, out, in) {own[name]}, saved {tuple(saved[name])}"
            for name in sorted(own.keys() & saved.keys())
            if own[name] != tuple(saved[name])
        ]
        if lines:
            raise ValueError(f"the past in {directory} belongs to other layers than this model's: {'; '.join(lines)}")

    def _is_merged(self, state: PastState, directory: str | Path) -> bool:
        """Whether the base holds the past of ``state`` already. Refuses a base that is neither that nor without it."""
        merging = self.config.keep_past == "merge"
        if merging:
            check_mergeable(self.model, self.layers)
        before, after = state.extra.get("base_before"), state.extra.get("base_after")
        if before is None:
            return False
        now = checksums(self.layers)
        if now == before:
            return False
        if now == after:
            if merging:
                return True
            raise ValueError(f"the base already holds the past in {directory}; load it with keep_past='merge'")
        other = sorted(name for name in now if now[name] not in (before.get(name), after.get(name)))
        raise ValueError(f"the past in {directory} was merged into other base weights than this model's: {other}")
