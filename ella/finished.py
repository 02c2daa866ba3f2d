"""A model's finished tasks, from the first fold to the next process: noticed, folded, restored.

:class:`FinishedTasks` is what a regularizer has besides the penalty. It keeps to the model as it is now: another
regularizer may fold, PEFT may unload, an adapter may be switched.
"""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import attrgetter, is_
from pathlib import Path
from types import SimpleNamespace

import torch
from peft import PeftModel
from torch import Tensor

from ella_kernels import LowRank

from . import importance, knowledge
from .acting import TASK
from .bypass import ForwardWatch
from .checkpoint import Importance, PastState, StoredLayer, load_past
from .config import EllaConfig
from .distributed import SPREAD, agree, gathered, spread_by, whole
from .fsdp import rewritten
from .knowledge import Marker, TrainedLoraConfig, follows, past_of, trained_adapter
from .lora import AdaptedLayer, adapted_layers
from .merging import MergedBase, check_fits, check_mergeable, checksums
from .past import FoldReport, Past, energy_of, fold_layer, squared_norm

__all__ = ["FinishedTasks"]

# What a state says of the base weights that its past was merged into.
_BASE_EXTRA = ("base_before", "base_after")


class FinishedTasks:
    """The past of ``model`` as ``config`` keeps it.

    Args:
        model: a PEFT LoRA model; it may bring a past along.
        config: of the regularizer.
        state, folder: a saved past to take up, and where it is from.

    Attributes: ``layers`` of the adapter in training, ``adapter``, its name; ``past``; ``watch`` for forwards that go
    past a layer, None before the first fold. ``layers`` is a new list whenever another adapter is trained.

    Raises TypeError and ValueError as :class:`~ella.EllaRegularizer` says.
    """

    def __init__(
        self, model: PeftModel, config: EllaConfig, state: PastState | None = None, folder: Path | None = None
    ) -> None:
        self.model, self.config = model, config
        self.past = Past(config.adapter_name, config.to_dict())
        self.watch: ForwardWatch | None = None
        # What spreads the adapter over ranks: as spread_by says.
        self.engine: str | None = None
        # What was measured of the task in training, and what of.
        self._measured: tuple[dict[str, Importance], tuple] | None = None
        # Refuses a model that is no PEFT LoRA before anything is asked of it.
        self._find_layers(config.adapter_name, warn=True)
        if config.penalty == "importance":
            importance.refuse_unmeasured(self.layers)
        self._take_up(state, folder)
        if config.keep_past == "merge" and not self.past.tasks:
            check_mergeable(model, self.layers)
        if not any(p.requires_grad for layer in self.layers for p in layer.all_parameters(layer.adapter)):
            raise ValueError(
                f"adapter {self.adapter!r} is frozen: nothing would be trained. Load it with "
                "PeftModel.from_pretrained(..., is_trainable=True), or switch adapters on again"
            )

    @property
    def tasks(self) -> list[str]:
        return (past_of(self.model, self.config.adapter_name) or self.past).tasks

    def _find_layers(self, adapter: str, warn: bool = False) -> None:
        self.adapter = adapter
        skip = self.config.skip_unsupported
        self.layers = adapted_layers(self.model, adapter, skip_unsupported=skip, warn=warn)
        # Where the layers hang: what PEFT unloads or replaces is noticed by its parent's dictionary.
        paths = [layer.path.rpartition(".") for layer in self.layers]
        root = self.model.base_model.model
        self._children = [(root.get_submodule(parent)._modules if parent else root._modules) for parent, _, _ in paths]
        self._child_names = [name for _, _, name in paths]
        self._modules = [layer.module for layer in self.layers]
        self._note_adapters()

    def _note_adapters(self) -> None:
        """What is trained, and what must not be."""
        self._trained = self.model.peft_config[self.adapter]
        self._known = knowledge.parameters_of(self.layers, self.config.adapter_name) if self.adapter == TASK else []

    def check(self, training: bool = False) -> None:
        """Raise unless the model is the one that was regularized; take up what another regularizer folded."""
        name = self.config.adapter_name
        past = past_of(self.model, name)
        if past is not self.past:
            self._lost_unless(
                past is not None or not self.past.tasks, f"adapter {name!r}, which holds them, was deleted"
            )
            if past is not None:
                self.past = past
                self._find_layers(trained_adapter(self.model, name))
        if not all(map(is_, map(dict.get, self._children, self._child_names), self._modules)):
            gone = next(
                layer.name
                for layer, held, child in zip(self.layers, self._children, self._child_names, strict=True)
                if held.get(child) is not layer.module
            )
            self._lost_unless(False, f"the LoRA layer {gone} is no longer in the model (unloaded, or replaced)")
        self._lost_unless(self.adapter in self.model.peft_config, f"adapter {self.adapter!r} was deleted")
        self._lost_unless(
            self.adapter != TASK or self.model.peft_config[TASK] is self._trained,
            f"adapter {TASK!r} was deleted and made anew, without the finished tasks",
        )
        if TASK in self.model.peft_config and self.adapter != TASK:
            other = next((other for other in self.model.peft_config if past_of(self.model, other)), None)
            if other is not None:
                raise ValueError(
                    f"adapter {TASK!r} is that of {other!r}, which holds the finished tasks of this model: no other "
                    f"adapter can be regularized beside it, found {self.adapter!r}"
                )
            raise ValueError(
                f"the model has an adapter {TASK!r} of a later task that was loaded without its EllaRegularizer (a "
                "resumed checkpoint, say): attach(trainer, regularizer) and EllaRegularizer.from_pretrained restore it"
            )
        self.engine = spread_by(self.model, self.layers)
        if training and self.adapter not in self.model.active_adapters:
            raise ValueError(
                f"adapter {self.adapter!r} is not active ({self.model.active_adapters} is), so the penalty would be on "
                f"an update that the forward does not use; call model.set_adapter({self.adapter!r}) first"
            )
        if training and any(map(attrgetter("requires_grad"), self._known)):
            raise ValueError(
                f"the finished tasks, adapter {name!r}, are set to be trained (requires_grad): freeze its factors, and "
                f"give an optimizer made with them those of {TASK!r} alone"
            )

    def _lost_unless(self, held: bool, what: str) -> None:
        if held:
            return
        knowledge.remove(self.model)
        tasks = f"its past of the tasks {self.past.tasks}" if self.past.tasks else "its penalty"
        raise ValueError(
            f"this EllaRegularizer has lost its model, and with it {tasks}: {what}. Make a new one for the model that "
            "is trained now; a saved state is taken up by EllaRegularizer.from_pretrained(model, folder)"
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold(self, name: str) -> FoldReport:
        """:meth:`ella.EllaRegularizer.end_task`."""
        if not isinstance(name, str):
            raise TypeError(f"the task's name must be a string, found {type(name).__name__}")
        self.check(training=True)
        if self.engine in SPREAD:
            knowledge.check_spread(self.model, self.layers, self.adapter, self.config.keep_past)
        self._check_unmerged()
        for layer in self.layers:
            self._check_foldable(layer, name)
        measured = self._importance(name)
        folded = {layer.name: self._folded(layer, measured.get(layer.name)) for layer in self.layers}
        if self.config.keep_past == "merge":
            check_fits(self.layers, folded)
        self._drop_reference()
        self.past.tasks.append(name)
        merge_error = self.install(folded, folding=True)
        self.reset()
        return dataclasses.replace(FoldReport.of(name, folded), merge_error=merge_error)

    def _check_unmerged(self) -> None:
        """Refuse to write factors that PEFT would take out of the base weight as they were when it merged them."""
        for layer in self.layers:
            if layer.module.merged:
                raise ValueError(f"adapters {layer.module.merged_adapters} are merged in {layer.name}; unmerge first")

    def _check_foldable(self, layer: AdaptedLayer, task: str) -> None:
        module = layer.module
        if module.disable_adapters:
            raise ValueError(f"adapters are disabled in {layer.name}; enable them before {task!r} is folded")
        replaced = "forward" in module.__dict__ and not hasattr(module, "_hf_hook")
        if replaced and self.config.keep_past == "adapter":
            raise ValueError(
                f"the forward of {layer.name} was replaced on the module (a fused LoRA kernel?), so finished tasks "
                "cannot act in it: give PEFT's own forward back, or use keep_past='merge'"
            )
        scaling = layer.scaling(self.past.adapter) if self.adapter == TASK else 1.0
        if scaling != 1.0 and self.config.keep_past == "adapter":
            raise ValueError(
                f"the finished tasks in {layer.name} are scaled by {scaling:g} (set_scale, rescale_adapter_scale), "
                f"which a fold would not keep: scale {self.past.adapter!r} by 1 again before {task!r} is folded"
            )
        for factor, parameter in zip("AB", layer.parameters(), strict=True):
            if parameter.device.type == "meta":
                raise ValueError(f"lora_{factor} of {layer.name} is offloaded (on meta): {task!r} not folded")
            if not torch.isfinite(whole(parameter)).all():
                raise ValueError(f"lora_{factor} of {layer.name} is not finite; {task!r} is not folded")
        bias = layer.bias()
        if bias is not None and not torch.isfinite(whole(bias)).all():
            raise ValueError(f"the bias of lora_B of {layer.name} is not finite; {task!r} is not folded")

    def reset(self) -> None:
        """Start the trained adapter afresh, in place: no effect, no gradient, the past as it is."""
        self._check_unmerged()
        self._measured = None
        init = self.model.peft_config[self.adapter].init_lora_weights
        for layer in self.layers:
            if layer.tied_to is None and self.engine == "FSDP2":
                with rewritten(layer, layer.adapter):
                    layer.reset(init)
            elif layer.tied_to is None:
                with gathered(layer.all_parameters(layer.adapter), write=True):
                    layer.reset(init)

    def measure(self, losses: Iterable[Tensor]) -> None:
        """:meth:`ella.EllaRegularizer.measure_importance`."""
        self.check(training=True)
        if self.config.penalty != "importance":
            raise ValueError(
                f"penalty is {self.config.penalty!r}; what is measured here is for penalty='importance' alone"
            )
        for layer in self.layers if self.past else ():
            if layer.tied_to is None:
                self.past.importance(layer)
        found = importance.measure(self.model, self.layers, losses)
        self._measured = found, self._trained_now()

    def _trained_now(self) -> tuple:
        """What a measurement is of: the finished tasks and, where this process writes them, the factors in training."""
        parameters = [p for layer in self.layers for p in layer.parameters()] if self.engine is None else []
        return tuple(self.past.tasks), [p._version for p in parameters]

    def _importance(self, task: str) -> dict[str, Importance]:
        """What was measured of ``task``, by layer, in all as large as its update: no loss's own scale is left in it."""
        if self.config.penalty != "importance":
            return {}
        layers = [layer for layer in self.layers if layer.tied_to is None]
        size = math.fsum(
            squared_norm(LowRank(layer.scaling() * b, a)) for layer in layers for a, b in layer.factors(*layer.whole())
        )
        if size == 0:
            return {layer.name: importance.nothing(layer) for layer in layers}
        if self._measured is None:
            raise ValueError(
                f"the importance of {task!r} was not measured: before end_task({task!r}) call "
                "measure_importance(losses) with losses of a hundred or so of its records, or use penalty='hadamard', "
                "which needs none"
            )
        measured, of = self._measured
        if of != self._trained_now():
            raise ValueError(
                f"the importance was measured before {task!r} was trained to where it is now: call "
                "measure_importance(losses) after the last step"
            )
        total = math.fsum(held.total for held in measured.values())
        return {name: held.scaled(size / total) for name, held in measured.items()}

    def _folded(self, layer: AdaptedLayer, measured: Importance | None = None) -> StoredLayer:
        parts = layer.factors(*layer.whole())
        bias = None if (held := layer.bias()) is None else whole(held)
        before, cap = self.past.stored(layer), self.config.past_rank
        folded = fold_layer(before, parts, layer.scaling(), bias, cap, measured)
        if self.engine not in SPREAD:
            return folded
        # Every rank keeps its own rows: they must be of one decomposition, to the last bit.
        agree(folded.all_tensors())
        return folded.to("cpu")

    def install(
        self, stored: Mapping[str, StoredLayer], *, folding: bool = False, merged: bool = False
    ) -> dict[str, float]:
        """Make ``stored`` the model's past, where the config keeps it; returns the errors of merging.

        ``folding``: a task ends with it. ``merged``: the base weights hold it already.
        """
        model, past, keep = self.model, self.past, self.config.keep_past
        past.config = self.config.to_dict()
        if keep == "external":
            Marker.forget(model.peft_config[past.adapter])
            held = knowledge.EllaLoraConfig.of(model.peft_config[past.adapter], past)
            past.adopt(self.layers, stored, held)
            held.tell_of_past(Marker.about(held, past.tasks, stored, keep), self._first_path(stored))
            model.peft_config[past.adapter] = held
            return {}
        if keep == "merge" and past.base is None and not merged:
            past.base = MergedBase(self.layers)
        flags = [(p, p.requires_grad) for p in model.parameters()]
        if TASK not in model.peft_config:
            knowledge.move_adapter(model, past.adapter, TASK)
        self._find_layers(TASK)
        past.adopt(self.layers, stored, model.peft_config[TASK])
        knowledge.install(model, self.layers, stored, past, in_base=keep == "merge", folding=folding)
        if getattr(model.peft_config[TASK], "follows_past", None) is not past:
            model.peft_config[TASK] = TrainedLoraConfig.of(model.peft_config[TASK], past, self._first_path(stored))
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for parameter in knowledge.parameters_of(self.layers, past.adapter):
            parameter.requires_grad_(False)
        self._note_adapters()
        if self.watch is not None:
            self.watch.close()
        self.watch = ForwardWatch(model.base_model.model, self.layers)
        if keep != "merge":
            past.extra = {}
            return {}
        if merged or past.base is None:
            past.base = MergedBase.without_past(self.layers, past.adapter, past.extra["base_before"])
            return {}
        errors = past.base.merge(self.layers, past.adapter)
        past.extra = {"base_before": past.base.checksums, "base_after": checksums(self.layers)}
        return errors

    def _first_path(self, stored: Mapping[str, StoredLayer]) -> str:
        """A path that patterns of PEFT can name."""
        return next(iter(knowledge.peft_ranks(self.layers, {name: layer.rank for name, layer in stored.items()})))

    def _drop_reference(self) -> None:
        """Delete TRL's frozen copy of the model before this task: the next trainer makes its own."""
        if "ref" in self.model.peft_config and self.adapter != "ref":
            trainable = any(p.requires_grad for n, p in self.model.named_parameters() if ".ref." in n)
            if not trainable and "ref" not in self.model.active_adapters:
                self.model.delete_adapter("ref")

    @torch.inference_mode(False)
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
            self._check_acting(living)
            self.past = living
            self._find_layers(trained_adapter(model, name))
        elif marker is not None and marker.keep_past == "external":
            raise ValueError(
                f"the finished tasks {list(marker.tasks)} of adapter {name!r} are in the folder that it was loaded "
                "from, beside it (keep_past='external'): load them with EllaRegularizer.from_pretrained(model, folder)"
            )
        elif marker is not None:
            lacks_importance = self.config.penalty == "importance"
            if lacks_importance or not marker.exact or {marker.keep_past, self.config.keep_past} != {"adapter"}:
                what = "what truncation dropped" if not marker.exact else "which base weights it belongs to"
                what = "their importance to penalise by" if lacks_importance else what
                raise ValueError(
                    f"adapter {name!r} holds the finished tasks {list(marker.tasks)}, but not {what}: load it with "
                    "EllaRegularizer.from_pretrained(model, folder), from the folder that the adapter came from"
                )
            self.past.tasks = list(marker.tasks)
            self._install_loaded(marker)
        elif "ella_past" in model.peft_config:
            self._install_old()
        elif before := follows(model.peft_config[name].rank_pattern):
            raise ValueError(
                f"adapter {name!r} was saved as the task in training after the finished tasks {before}, which are not "
                "in it: load the folder above the one it came from with PeftModel.from_pretrained"
            )
        elif TASK in model.peft_config:
            raise ValueError(
                f"the model has an adapter {TASK!r}, but {name!r} is no knowledge adapter of ELLA; delete {TASK!r}, or "
                "load both from the folder they were saved in"
            )

    def _check_acting(self, living: Past) -> None:
        """Refuse finished tasks that no longer act: the adapter that brings them along was deleted."""
        name = living.adapter
        if not living.tasks or living.is_external:
            return
        if TASK not in self.model.peft_config or any("ella_knowledge" not in m.__dict__ for m in self._modules):
            raise ValueError(
                f"adapter {name!r} holds the finished tasks {living.tasks}, but {TASK!r}, which is trained beside it, "
                f"was deleted or replaced: model.save_pretrained(folder, selected_adapters=[{name!r}]), and load that "
                "with PeftModel.from_pretrained and EllaRegularizer"
            )

    def _install_loaded(self, marker: Marker) -> None:
        """A knowledge adapter that PEFT loaded: its own factors, all of the past."""
        name, tasks = self.config.adapter_name, list(marker.tasks)
        self._check_unmerged()
        stored = self._held_by(name, len(tasks))
        if marker.energy is not None:
            self._check_energy(energy_of(stored), marker.energy, tasks)
        if TASK in self.model.peft_config:
            _check_follows(self.model.peft_config[TASK].rank_pattern, tasks, f"the adapter {TASK!r}")
        else:
            knowledge.add_trained_adapter(self.model, name, marker)
        self.model.set_adapter(TASK)
        self.install(stored)

    def _check_energy(self, found: float, noted: float, tasks: list[str]) -> None:
        """Refuse factors that cannot be those of ``tasks``; rounding to half precision is under a percent."""
        said = f"‖W_past‖_F² of the finished tasks {tasks} is {found:.3g}, was {noted:.3g} when they were saved"
        if not noted / 2 <= found <= noted * 2:
            raise ValueError(
                f"the configuration of adapter {self.config.adapter_name!r} is that of finished tasks, but its factors "
                f"are not ({said}): load it from its folder with PeftModel.from_pretrained(..., is_trainable=True), or "
                "give get_peft_model a LoraConfig of its own. Factors that were trained on since are no finished tasks"
            )
        if not math.isclose(found, noted, rel_tol=0.05):
            warnings.warn(f"{said}: the adapter has been changed since, and is taken as it is", stacklevel=6)

    def _install_old(self) -> None:
        """The form of version 0.1.0: the past in an adapter "ella_past", the trained one under the user's name."""
        self._check_unmerged()
        missing = [layer.name for layer in self.layers if not layer.has("ella_past")]
        if missing:
            raise ValueError(
                f"the model's adapter 'ella_past' leaves out {len(missing)} of the layers of adapter "
                f"{self.config.adapter_name!r}: {missing[:8]}"
            )
        stored = self._held_by("ella_past", 1)
        self.past.tasks = ["ella_past"]
        self.model.delete_adapter("ella_past")
        self.install(stored)

    def _held_by(self, adapter: str, folds: int) -> dict[str, StoredLayer]:
        """The factors of an adapter as a past of that many folds in which nothing was dropped."""
        return {
            layer.name: StoredLayer(
                [LowRank(b, a) for a, b in layer.factors(*layer.whole(adapter))],
                None if (bias := layer.bias(adapter)) is None else whole(bias),
                [0.0] * folds,
            )
            for layer in self.layers
        }

    @torch.inference_mode(False)
    def restore(self, directory: str | Path) -> None:
        """:meth:`ella.EllaRegularizer.restore`."""
        self.check()
        state = load_past(directory)
        if self.tasks and self.tasks != state.tasks:
            raise ValueError(f"{directory} has finished the tasks {state.tasks}, this model {self.tasks}")
        self._restore(state, Path(directory), None)

    def _restore(self, state: PastState, folder: Path | None, marker: Marker | None) -> None:
        model, name = self.model, self.config.adapter_name
        self._check_unmerged()
        self.past = past_of(model, name) or self.past
        self._check_layers(state.shapes, folder)
        if folder is not None:
            _check_beside(state, folder, name)
        if state.config.get("keep_past") == "external" != self.config.keep_past:
            raise ValueError(
                f"the past in {folder} was kept outside the model (keep_past='external'), whose base may hold it "
                "already; load it so too, or export it as an adapter"
            )
        if not state.layers:
            self.past.tasks = list(state.tasks)
            return
        if TASK in model.peft_config:
            _check_follows(model.peft_config[TASK].rank_pattern, state.tasks, f"the adapter {TASK!r}")
        elif marker is not None and marker.keep_past != "external":
            knowledge.add_trained_adapter(model, name, marker, folder and _trained_folder(folder, name))
        if TASK in model.peft_config:
            model.set_adapter(TASK)
        # A reference copied from another state: whoever needs one makes or loads it anew.
        self._drop_reference()
        merged = self._is_merged(state, folder)
        if self.past.base is not None and self.past.base.checksums == state.extra.get("base_before"):
            merged = False  # the weights without any past are at hand
        else:
            self.past.base = None
        self.past.tasks = list(state.tasks)
        self.past.extra = {key: state.extra[key] for key in _BASE_EXTRA if key in state.extra}
        self.install(state.layers, merged=merged)
        if folder is not None and TASK in model.peft_config:
            training = model.training
            knowledge.load_rest(model, name, folder)
            model.train(training)

    def _check_layers(self, saved: Mapping[str, Sequence[int]], directory: str | Path | None) -> None:
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

    def _is_merged(self, state: PastState, directory: str | Path | None) -> bool:
        """Whether the base holds the past of ``state`` already. Refuses a base that is neither that nor without it."""
        merging = self.config.keep_past == "merge"
        if merging:
            check_mergeable(self.model, self.layers)
        before, after = state.extra.get("base_before"), state.extra.get("base_after", {})
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


def _check_beside(state: PastState, folder: Path, name: str) -> None:
    """Refuse a state and adapters of which one was written over that of another time or run."""
    pattern = _saved_pattern(folder)
    # Version 0.1.0 kept the past in an adapter of its own and noted nothing in the trained one.
    if not state.layers or pattern is None or (folder / "ella_past").is_dir():
        return
    marker = Marker.of(SimpleNamespace(rank_pattern=pattern))
    tasks = list(marker.tasks) if marker is not None else []
    if tasks != state.tasks:
        raise ValueError(
            f"the adapter in {folder} was saved with the finished tasks {tasks}, ELLA's state beside it with "
            f"{state.tasks}: one was written later, over that of another time or run; write both at once with "
            "model.save_pretrained(folder), or each into a folder of its own"
        )
    own = _trained_folder(folder, name)
    _check_follows(_saved_pattern(own), tasks, f"the adapter in {own}")


def _trained_folder(folder: Path, name: str) -> Path:
    """Where PEFT saves the trained adapter whose finished tasks are adapter ``name`` in ``folder``.

    Inside of it, or beside it: adapters of other names than "default" have folders of their own.
    """
    return (folder.parent if folder.name == name != "default" else folder) / TASK


def _check_follows(rank_pattern: Mapping[str, int] | None, tasks: list[str], what: str) -> None:
    """Refuse a trained adapter that was saved when other tasks were finished than ``tasks``."""
    noted = follows(rank_pattern)
    if noted is not None and noted != tasks:
        raise ValueError(
            f"{what} was trained after the finished tasks {noted}, the adapter beside it holds {tasks}: what both hold "
            f"would act twice. They were saved at different times: save all of a model at once, or delete {TASK!r} to "
            "start the task afresh"
        )


def _saved_pattern(folder: Path) -> dict[str, int] | None:
    """The rank pattern of a saved adapter; None where there is none."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8")).get("rank_pattern") or {}
