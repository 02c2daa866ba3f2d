"""The knowledge adapter in a PEFT model: finished tasks as a plain LoRA under the name the user gave.

At the end of the first task the trained modules move to the adapter :data:`~ella.acting.TASK`, the same Parameter
objects, and the user's adapter becomes a frozen LoRA of scaling 1 that holds the sum of all finished tasks. Whatever
saves, loads, merges or copies that adapter has everything that was learned. Why this form:
``docs/decisions/0001-knowledge-adapter.md``.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import re
import urllib.parse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer
from peft.tuners.lora.layer import MultiheadAttention
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import Tensor, nn

from .acting import TASK, PreviousModule, act_together, release
from .checkpoint import StoredLayer
from .distributed import SPREAD, spread_by
from .fsdp import manage, managed
from .lora import AdaptedLayer, AttentionLayer, ExpertsLayer, adapted_layers
from .merging import shared_weights
from .past import Past, energy_of

__all__ = [
    "EllaLoraConfig", "Marker", "TrainedLoraConfig", "add_trained_adapter", "follows", "install", "left_out_ranks",
    "move_adapter", "parameters_of", "past_of", "peft_ranks", "plain_config", "remove", "trained_adapter",
]  # fmt: skip

# Kinds of what an adapter's configuration says in a comment at the front of one of its patterns, which regular
# expressions ignore: PEFT keeps it through save and load.
_MARKER, _FOLLOWS = "ella", "ella-follows"
# Fields of the trained adapter's configuration that a fresh one for the next task needs.
_TASK_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern")


class EllaLoraConfig(LoraConfig):
    """The configuration that PEFT saves beside an adapter; ELLA's state of the past is saved with it.

    ``past`` is the :class:`~ella.past.Past` of the model. PEFT calls :meth:`save_pretrained` for every adapter folder
    that it writes, in whatever trainer or loop, after the weights. ``saved`` are fields that files get with other
    values than the model's.
    """

    past: Past | None = None
    saved: Mapping[str, Any] = {}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, **kwargs)
        if self.past is not None:
            self.past.save_beside(save_directory)

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | self.saved

    @classmethod
    def of(cls, config: LoraConfig, past: Past) -> EllaLoraConfig:
        """``config`` with the past; fields and whatever PEFT noted beside them are shared."""
        made = cls.__new__(cls)
        made.__dict__.update(config.__dict__, past=past, saved={})
        return made

    def tell_of_past(self, marker: Marker, path: str) -> None:
        """Files get ``marker``, in a pattern that gives the layer ``path`` the rank that it has.

        Whoever loads this adapter without the past that was saved beside it is told.
        """
        self.saved = {"rank_pattern": {marker.mark(_pattern(path)): _rank(self, path), **self.rank_pattern}}

    def without_effect(self, but: Iterable[str]) -> None:
        """Scaling 0 for whatever is made from this configuration in the model, except for the patterns ``but``.

        For a base that holds the past: a copy of the knowledge (TRL's "ref") would add it a second time.
        """
        self.saved = {"lora_alpha": self.lora_alpha, "alpha_pattern": self.alpha_pattern}
        but = set(but)
        pattern = {key: alpha if key in but else 0 for key, alpha in self.alpha_pattern.items()}
        self.__dict__.update(lora_alpha=0, alpha_pattern=pattern)


class TrainedLoraConfig(LoraConfig):
    """The configuration of the adapter in training: its file says which finished tasks it follows.

    ``follows_past`` has them; the layer ``path`` carries the note in its rank pattern. A save of the finished tasks
    alone would else leave the current task of another time beside them, and it would act twice.
    """

    follows_past: Past | None = None
    path: str = ""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        noted = LoraConfig.__new__(LoraConfig)
        noted.__dict__.update(self.__dict__)
        if self.follows_past is not None:
            pattern = _comment(_FOLLOWS, self.follows_past.tasks) + _pattern(self.path)
            noted.rank_pattern = {pattern: _rank(self, self.path), **self.rank_pattern}
        noted.save_pretrained(save_directory, **kwargs)

    @classmethod
    def of(cls, config: LoraConfig, past: Past, path: str) -> TrainedLoraConfig:
        """``config`` as that of the adapter in training."""
        made = cls.__new__(cls)
        made.__dict__.update(config.__dict__, follows_past=past, path=path)
        made.rank_pattern = _without_comment(_FOLLOWS, config.rank_pattern)
        return made


def follows(rank_pattern: Mapping[str, int] | None) -> list[str] | None:
    """The finished tasks that a trained adapter was saved with; None where its ``rank_pattern`` does not say."""
    return _commented(_FOLLOWS, rank_pattern)


def _comment(kind: str, data: Any) -> str:
    return f"(?#{kind}:{urllib.parse.quote(json.dumps(data), safe='')})"


def _commented(kind: str, patterns: Mapping[str, Any] | None) -> Any:
    """What the first comment of ``kind`` says; None without one."""
    found = next(filter(None, (re.match(rf"\(\?#{kind}:([^)]*)\)", key) for key in patterns or {})), None)
    return None if found is None else json.loads(urllib.parse.unquote(found[1]))


def _without_comment(kind: str, patterns: Mapping[str, int]) -> dict[str, int]:
    return {key: rank for key, rank in patterns.items() if not key.startswith(f"(?#{kind}:")}


@dataclasses.dataclass(frozen=True)
class Marker:
    """What a knowledge adapter says of itself in its ``rank_pattern``, in a comment of a regular expression.

    With ``keep_past="external"`` the files of the trained adapter say it, of the past that lies beside them.

    Attributes:
        tasks: names of the finished tasks.
        exact: whether the factors are the whole past; else energies of what was dropped belong to it.
        keep_past: of the config that wrote it.
        trained: fields of the trained adapter's configuration.
        energy: ``Σ_layers ‖L·R‖_F²`` of the factors; None in files that do not say it.
    """

    tasks: tuple[str, ...]
    exact: bool
    keep_past: str
    trained: Mapping[str, Any]
    energy: float | None = None

    def mark(self, pattern: str) -> str:
        """``pattern`` with this marker in front; it matches what it matched."""
        return _comment(_MARKER, dataclasses.asdict(self)) + pattern

    @classmethod
    def about(
        cls, trained: LoraConfig, tasks: Iterable[str], stored: Mapping[str, StoredLayer], keep_past: str
    ) -> Marker:
        """The marker of a knowledge adapter that holds ``stored``; ``trained`` is how its tasks were trained."""
        exact = not any(part.row_energy is not None for layer in stored.values() for part in layer.parts)
        fields = {name: getattr(trained, name) for name in _TASK_FIELDS}
        fields["rank_pattern"] = _without_comment(_FOLLOWS, fields["rank_pattern"] or {})
        return cls(tuple(tasks), exact, keep_past, fields, energy_of(stored))

    @classmethod
    def of(cls, config: Any) -> Marker | None:
        """The marker of an adapter's configuration; None for any other LoRA."""
        data = _commented(_MARKER, getattr(config, "rank_pattern", None))
        return None if data is None else cls(**data | {"tasks": tuple(data["tasks"])})

    @staticmethod
    def forget(config: LoraConfig) -> None:
        """Take the marker of a past that lay beside the adapter out of a configuration."""
        if Marker.of(config) is not None:
            config.rank_pattern = _without_comment(_MARKER, config.rank_pattern)


def past_of(model: PeftModel, adapter: str) -> Past | None:
    """The past that lives with ``adapter`` of ``model``; None before the first fold."""
    return getattr(model.peft_config.get(adapter), "past", None)


def trained_adapter(model: PeftModel, adapter: str) -> str:
    """Name of the adapter in training where the user's is ``adapter``."""
    return TASK if TASK in model.peft_config else adapter


def move_adapter(model: PeftModel, old: str, new: str) -> None:
    """Give an adapter another name: the same modules and Parameter objects, as active and as trainable as before."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name in (*module.adapter_layer_names, *module.other_param_names, "lora_variant"):
                held: Any = getattr(module, name, None)
                if hasattr(held, "keys") and old in held:
                    held[new] = held.pop(old)
        elif isinstance(module, ModulesToSaveWrapper):
            if old not in module.modules_to_save:
                continue
            module.modules_to_save[new] = module.modules_to_save.pop(old)
            module._adapters = module._adapters - {old} | {new}
        else:
            continue
        module._active_adapter = _renamed(module._active_adapter, old, new)
    model.peft_config[new] = model.peft_config.pop(old)
    for holder in (model, model.base_model):
        holder.active_adapter = _renamed(holder.active_adapter, old, new)


def _renamed(active: str | list[str], old: str, new: str) -> str | list[str]:
    if isinstance(active, str):
        return new if active == old else active
    return [new if name == old else name for name in active]


def install(
    model: PeftModel,
    layers: Iterable[AdaptedLayer],
    stored: Mapping[str, StoredLayer],
    past: Past,
    *,
    in_base: bool,
    folding: bool,
) -> None:
    """Write ``stored`` as the knowledge adapter ``past.adapter`` beside the trained one and make both act together.

    ``folding``: a task ends here, so what is trained beside the factors (``modules_to_save``) is finished too.
    """
    layers, knowledge = list(layers), past.adapter
    engine = spread_by(model, layers)
    if engine in SPREAD:
        check_spread(model, layers, TASK, past.config["keep_past"])
    merges = _merges(model, layers)
    ranks = peft_ranks(layers, {name: layer.rank for name, layer in stored.items()})
    for layer in layers:
        kept = stored[layer.name]
        before = managed(layer, knowledge)
        layer.write(knowledge, kept.factors(), kept.bias)
        if engine == "FSDP2":
            manage(model, layer, knowledge, before)
        act_together(
            layer.module,
            knowledge,
            in_base=in_base,
            forwarded=not isinstance(layer, AttentionLayer),
            folded=True,
            **merges.get(layer.name, {}),
        )
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and TASK in module.modules_to_save:
            _keep_module(module, knowledge, folding)
    for module in _left_out(model, layers, TASK).values():
        # Trained on through all tasks: the knowledge is a copy.
        if folding or knowledge not in module.scaling:
            _copy_adapter(module, TASK, knowledge)
        act_together(module, knowledge, in_base=False, forwarded=True, folded=False)
    left_out = left_out_ranks(model, layers, TASK)
    marker = Marker.about(model.peft_config[TASK], past.tasks, stored, past.config["keep_past"])
    config = EllaLoraConfig.of(plain_config(model.peft_config[TASK], ranks, left_out, marker), past)
    if in_base:
        config.without_effect(but=map(_pattern, left_out))
    model.peft_config[knowledge] = config


def check_spread(model: PeftModel, layers: Iterable[AdaptedLayer], adapter: str, keep_past: str) -> None:
    """Raise ValueError for what a past cannot be folded from, or kept in, where an engine spreads it over ranks."""
    if keep_past == "merge":
        raise ValueError(
            "keep_past='merge' needs whole base weights on every rank, which FSDP2 and DeepSpeed's ZeRO-3 do not keep; "
            "use keep_past='adapter'"
        )
    trained = [name for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)]
    others = [*trained, *_left_out(model, layers, adapter)]
    if others:
        raise ValueError(
            f"{others[0]} is trained beside the penalised LoRA factors (modules_to_save, a layer that was left out), "
            "and its copy for finished tasks cannot be spread over ranks: save the model, fold with `ella fold`, and "
            "train the next task in a new process"
        )


def _merges(model: PeftModel, layers: Sequence[AdaptedLayer]) -> dict[str, dict[str, Any]]:
    """How merging treats each layer whose base weight other modules use too: :func:`act_together`'s last arguments."""
    shared = shared_weights(model, layers)
    twins = {layer.tied_to for layer in layers}
    found: dict[str, dict[str, Any]] = {}
    for layer in layers:
        if layer.name not in shared:
            continue
        if layer.tied_to in shared:  # its adapter is tied as the weights are: one merge is both
            found[layer.name] = {"merged_by_twin": True}
        elif layer.name not in twins:
            found[layer.name] = {
                "unmergeable": f"the base weight of {layer.name} is another module's too (tied embeddings, replicated "
                "layers): merging would change both; use export_adapter, which keeps the update apart"
            }
    return found


def _left_out(model: PeftModel, layers: Iterable[AdaptedLayer], adapter: str) -> dict[str, LoraLayer]:
    """Layers of ``adapter`` that are trained on through all tasks, outside the past, by path."""
    folded = {id(layer.module) for layer in layers}
    modules = model.base_model.model.named_modules()
    return {
        path: module
        for path, module in modules
        if isinstance(module, LoraLayer) and adapter in module.scaling and id(module) not in folded
    }


def left_out_ranks(model: PeftModel, layers: Iterable[AdaptedLayer], adapter: str) -> dict[str, tuple[int, float]]:
    """Rank and α of the layers of ``adapter`` outside the past, by path."""
    found = _left_out(model, layers, adapter)
    return {path: (module.r[adapter], module.lora_alpha[adapter]) for path, module in found.items()}


def _keep_module(module: ModulesToSaveWrapper, knowledge: str, folding: bool) -> None:
    if folding or knowledge not in module.modules_to_save:
        module.modules_to_save[knowledge] = copy.deepcopy(module.modules_to_save[TASK]).requires_grad_(False)
    module._adapters.add(knowledge)
    release(module)
    module.register_forward_hook(PreviousModule(knowledge), with_kwargs=True)


def _copy_adapter(module: LoraLayer, source: str, to: str) -> None:
    """A copy of a layer's adapter under another name, as trainable as what was there."""
    for name in (*module.adapter_layer_names, *module.other_param_names):
        held: Any = getattr(module, name, None)
        if hasattr(held, "keys") and source in held:
            held[to] = copy.deepcopy(held[source])


def add_trained_adapter(model: PeftModel, knowledge: str, marker: Marker, folder: Path | None = None) -> None:
    """Add :data:`TASK` to a model that PEFT loaded with the knowledge alone: as saved in its ``folder``, else fresh."""
    config = copy.copy(model.peft_config[knowledge])
    for name, value in marker.trained.items():
        setattr(config, name, value)
    config.inference_mode = False
    model.peft_config[TASK] = config
    # Layer by layer, not by PEFT's injection: that would replicate layers again, and does not tie a second adapter.
    layers = adapted_layers(model, knowledge, skip_unsupported=True, warn=False)
    for layer in layers:
        if not layer.has(TASK):  # an attention module brings its output projection along
            _add_layer(layer.module, layer.name, config)
    for path, module in _left_out(model, layers, knowledge).items():
        _add_layer(module, path, config)
        _copy_adapter(module, knowledge, TASK)
    by_name = {layer.name: layer.module for layer in layers}
    for layer in layers:
        if layer.tied_to is not None:
            _tie(by_name[layer.tied_to], layer.module)
    model.base_model._cast_adapter_dtype(adapter_name=TASK, autocast_adapter_dtype=True)
    _add_modules(model, knowledge)
    if folder is not None and folder.is_dir():
        model.load_adapter(str(folder), TASK, is_trainable=True)
    model.set_adapter(TASK)


def _add_layer(module: LoraLayer, path: str, config: LoraConfig) -> None:
    rank = _rank(config, path)
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), path), config.lora_alpha)
    module.update_layer(TASK, r=rank, lora_alpha=alpha, config=config)


def _rank(config: LoraConfig, path: str) -> int:
    return config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), path), config.r)


def _tie(embedding: LoraLayer, head: LoraLayer) -> None:
    """PEFT ties the adapter of an output head to the embedding's, transposed."""
    a, b = embedding.lora_embedding_A[TASK], embedding.lora_embedding_B[TASK]
    head.lora_A[TASK].weight, head.lora_B[TASK].weight = nn.Parameter(b.data.t()), nn.Parameter(a.data.t())


def _add_modules(model: PeftModel, knowledge: str) -> None:
    tied: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and knowledge in module.modules_to_save:
            held = module.modules_to_save[knowledge]
            module.update(TASK)
            made = module.modules_to_save[TASK]
            made.load_state_dict(held.state_dict())
            for name, parameter in held.named_parameters():
                own = made.get_parameter(name)
                if tied.setdefault(parameter.data_ptr(), own) is not own:
                    parent, _, last = name.rpartition(".")
                    setattr(made.get_submodule(parent), last, tied[parameter.data_ptr()])


def load_rest(model: PeftModel, knowledge: str, folder: Path) -> None:
    """What finished tasks left beside the factors, from the adapter that was saved in ``folder``.

    A module that the trained adapter has not trained yet goes on from there.
    """
    wrappers = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper) and TASK in m.modules_to_save]
    left_out = any(isinstance(m, LoraLayer) and TASK in m.scaling and not m.lora_variant for m in model.modules())
    if not (wrappers or left_out) or not (folder / "adapter_model.safetensors").is_file():
        return
    untouched = [module for module in wrappers if _equal(module.modules_to_save[TASK], module.original_module)]
    model.load_adapter(str(folder), knowledge)
    for module in untouched:
        module.modules_to_save[TASK].load_state_dict(module.modules_to_save[knowledge].state_dict())


def _equal(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a.to(b.device), b) for a, b in pairs)


def remove(model: PeftModel) -> None:
    """Take everything of ELLA but the adapters themselves out of a model."""
    for module in model.modules():
        release(module)


def plain_config(
    trained: LoraConfig,
    ranks: Mapping[str, int],
    left_out: Mapping[str, tuple[int, float]] = {},
    marker: Marker | None = None,
) -> LoraConfig:
    """A plain LoRA of scaling 1 on ``trained``'s layers, ``ranks`` by module path; ``left_out`` keep theirs and α."""
    config = copy.copy(trained)
    common = max(ranks.values(), default=1)
    others = {_pattern(name): rank for name, rank in ranks.items() if rank != common}
    alphas: dict[str, float] = dict(others)
    for name, (rank, alpha) in left_out.items():
        others[_pattern(name)], alphas[_pattern(name)] = rank, alpha
    if marker is not None and ranks:
        first = _pattern(next(iter(ranks)))
        # Read first by PEFT, also where the file sorts its keys.
        others = {marker.mark(first): others.pop(first, common), **others}
    plain = {
        "r": common, "lora_alpha": common, "rank_pattern": others, "alpha_pattern": alphas, "use_rslora": False,
        "lora_dropout": 0.0, "init_lora_weights": False, "inference_mode": False, "eva_config": None,
        "corda_config": None, "lora_ga_config": None,
    }  # fmt: skip
    for name, value in plain.items():
        setattr(config, name, value)
    for own in ("past", "saved", "follows_past", "path"):
        config.__dict__.pop(own, None)
    return config


def _pattern(path: str) -> str:
    """What PEFT matches a module's path with: anchored, as one module's path may end as another's reads."""
    return f"^{re.escape(path)}"


def peft_ranks(layers: Iterable[AdaptedLayer], by_name: Mapping[str, int]) -> dict[str, int]:
    """Ranks by the name that PEFT matches patterns with, modules before parameters.

    An attention's output projection takes the rank of the attention it is inside of.
    """
    layers = sorted(layers, key=lambda layer: isinstance(layer, ExpertsLayer))
    return {layer.name: by_name[layer.name] for layer in layers if not _is_inside_attention(layer)}


def _is_inside_attention(layer: AdaptedLayer) -> bool:
    return isinstance(layer, AttentionLayer) and not isinstance(layer.module, MultiheadAttention)


def parameters_of(layers: Iterable[AdaptedLayer], adapter: str) -> list[Tensor]:
    """Factors of ``adapter`` in all layers that have it."""
    return [parameter for layer in layers for parameter in layer.all_parameters(adapter)]
