"""Saved LoRA adapters and saved states without their model: folded into one past, or exported as one plain LoRA.

For any engine that writes PEFT adapter folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.tuners.lora import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from .acting import TASK
from .checkpoint import PastState, StoredLayer, load_past
from .config import EllaConfig
from .export import ExportReport, factor_tensors, fold_for_export, new_folder, write_adapter
from .knowledge import Marker, plain_config
from .lora import STATE_PREFIX, split_parts, unsupported_config
from .past import FoldReport, described, fold_layer
from .tensorfile import read_tensors

__all__ = ["export_state", "fold_adapters"]

_FLAGS = ("use_dora", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "kasa_config",
          "monteclora_config", "target_parameters")  # fmt: skip


@dataclass(frozen=True)
class _SavedLayer:
    """One layer of an adapter folder: names of its tensors, their filter dimensions, and ``ΔW = scaling · B @ A``."""

    keys: tuple[str, str]
    tails: tuple[tuple[int, ...], tuple[int, ...]]
    factors: tuple[Tensor, Tensor]
    scaling: float
    bias: Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        return self.factors[1].shape[0], self.factors[0].shape[1]


@dataclass(frozen=True)
class _SavedAdapter:
    folder: Path
    config: LoraConfig
    layers: dict[str, _SavedLayer]
    # Modules trained as a whole (``modules_to_save``), under their names in the file.
    others: dict[str, Tensor]


def fold_adapters(
    adapters: Sequence[str | Path], out_dir: str | Path, *, past_rank: int = 128, names: Sequence[str] | None = None
) -> list[FoldReport]:
    """Fold PEFT LoRA adapter folders, in task order, into one past.

    Writes ``out_dir`` whole or not at all: the state that :meth:`EllaRegularizer.from_pretrained` reads, and the same
    past as a plain PEFT adapter of scaling 1 that any engine loads. Modules trained as a whole (``modules_to_save``)
    are the last adapter's, as where the tasks were trained one after another.

    Args:
        adapters: folders with ``adapter_config.json`` and ``adapter_model.safetensors``, all on the same layers.
        out_dir: must not exist yet, or be empty.
        past_rank: cap on the components per layer.
        names: task names; by default the folders' names.

    Raises:
        TypeError: ``adapters`` or ``names`` is no sequence of paths or names.
        FileNotFoundError, FileExistsError: no adapter there, or something in ``out_dir``.
        ValueError: an adapter kind that cannot be folded, layers that differ (listed), no adapters.
    """
    folders = [Path(folder) for folder in _sequence("adapters", adapters, (str, Path))]
    config = EllaConfig(past_rank=past_rank)
    if not folders:
        raise ValueError("adapters must name at least one adapter folder, found none")
    named = [folder.resolve().name for folder in folders] if names is None else _sequence("names", names, (str,))
    if len(named) != len(folders):
        raise ValueError(f"names must have one entry per adapter, found {len(named)} for {len(folders)}")
    out = new_folder(out_dir)

    stored: dict[str, StoredLayer] = {}
    reports = []
    first = adapter = _read_adapter(folders[0])
    for i, (name, folder) in enumerate(zip(named, folders, strict=True)):
        adapter = _read_adapter(folder) if i else first
        if adapter.layers.keys() != first.layers.keys():
            differing = sorted(adapter.layers.keys() ^ first.layers.keys())
            raise ValueError(f"{folder} adapts other layers than {folders[0]}: {differing[:8]}")
        for layer, saved in adapter.layers.items():
            stored[layer] = _fold(stored.get(layer), layer, saved, past_rank)
        reports.append(FoldReport.of(name, stored))
    shapes = {name: (1, *layer.shape) for name, layer in stored.items()}
    peft = {
        "config": described(first.config),
        "layers": {name: {"keys": layer.keys, "tails": layer.tails} for name, layer in first.layers.items()},
    }
    state = PastState(config.to_dict(), named, stored, shapes, {"peft": peft})
    _write_peft(out, first, state, adapter.others)
    return reports


def export_state(directory: str | Path, out_dir: str | Path, rank: int | None = None) -> ExportReport:
    """Finished and current tasks in a saved state as one plain LoRA; the command ``ella export``.

    Args:
        directory: what ``EllaRegularizer.save_pretrained`` (finished tasks only), ``fold_adapters``, PEFT's
            ``save_pretrained`` or a trainer wrote.
        out_dir: must not exist yet, or be empty.
        rank: cap on the components; None keeps all.

    Raises:
        FileNotFoundError, FileExistsError: no state in ``directory``, or something in ``out_dir``.
        ValueError: a state that is not whole, or from before its adapter was described in it.
    """
    folder, out = Path(directory), new_folder(out_dir)
    state = load_past(folder)
    peft = state.extra.get("peft")
    if not state.layers or peft is None:
        what = "has no finished task" if not state.layers else "does not say which adapter it belongs to"
        raise ValueError(f"the state in {folder} {what}; export it with EllaRegularizer.export_adapter")
    trained = LoraConfig.from_peft_type(**peft["config"])
    current, others = _current(folder, state, trained)
    if trained.modules_to_save and not others:
        raise ValueError(
            f"the state in {folder} has no weights of modules_to_save {sorted(trained.modules_to_save)}; export from a "
            "folder that PEFT or a trainer saved"
        )
    empty: tuple[list[tuple[Tensor, Tensor]], float, Tensor | None] = ([], 1.0, None)
    parts = {name: current.get(name, empty) for name in state.layers}
    stored, report = fold_for_export(state.layers, parts, rank)
    tensors = dict(others)
    for name, layer in stored.items():
        held = peft["layers"][name]
        tensors |= factor_tensors(layer.factors(report.rank), held["keys"], held["tails"], layer.bias)
    ranks = dict.fromkeys((name for name in stored if not _is_nested(peft["layers"][name]["keys"])), report.rank)
    write_adapter(out, plain_config(trained, ranks), tensors)
    return report


def _current(folder: Path, state: PastState, trained: LoraConfig) -> tuple[dict[str, tuple], dict[str, Tensor]]:
    """Parts, scaling and bias of the adapter in training, if ``folder`` has it, and modules trained as a whole."""
    external = state.config.get("keep_past") == "external"
    place = folder if external or not (folder / TASK).is_dir() else folder / TASK
    path = place / "adapter_model.safetensors"
    if not path.is_file():
        return {}, {}
    (tensors, _), layers = read_tensors(path), state.extra["peft"]["layers"]
    factors = {key for layer in layers.values() for key in layer["keys"]}
    biases = {key.removesuffix("weight") + "bias" for key in factors}
    others = {key: tensor for key, tensor in tensors.items() if key not in factors | biases}
    if place == folder and not external:
        return {}, others
    found = {}
    for name, layer in layers.items():
        key_a, key_b = layer["keys"]
        n = state.shapes[name][0]
        a, b = tensors[key_a], tensors[key_b]
        scaling = _scaling(trained, _path(key_a), a.shape[0] // n)
        found[name] = (split_parts(a, b, n), scaling, tensors.get(key_b.removesuffix("weight") + "bias"))
    return found, others


def _sequence(name: str, value: Any, kinds: tuple[type, ...]) -> list:
    if isinstance(value, (str, bytes, Path, Mapping)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a list, found {value!r}")
    wrong = [item for item in value if not isinstance(item, kinds)]
    if wrong:
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{name} must be a list of {expected}, found {wrong[0]!r} in it")
    return list(value)


def _fold(before: StoredLayer | None, name: str, saved: _SavedLayer, rank: int) -> StoredLayer:
    if before is not None and before.shape != saved.shape:
        raise ValueError(f"layer {name} is {saved.shape} here and {before.shape} in the first adapter")
    for factor, tensor in zip("AB", saved.factors, strict=True):
        if not tensor.isfinite().all():
            raise ValueError(f"lora_{factor} of {name} is not finite")
    return fold_layer(before, [saved.factors], saved.scaling, saved.bias, rank)


def _read_adapter(folder: Path) -> _SavedAdapter:
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in {folder}; expected a PEFT LoRA adapter folder")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"no adapter_model.safetensors in {folder}; pickled weights are never read")
    config = LoraConfig.from_pretrained(folder)
    reason = unsupported_config(config)
    used = [flag for flag in _FLAGS if getattr(config, flag, None)]
    if reason or used:
        raise ValueError(f"{folder} cannot be folded offline: {reason or f'it uses {used[0]}'}")
    (tensors, _), layers = read_tensors(weights), {}
    others = dict(tensors)
    for key, a in tensors.items():
        for suffix_a, suffix_b in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if not key.endswith(suffix_a):
                continue
            key_b = key.removesuffix(suffix_a) + suffix_b
            b = tensors.get(key_b)
            if b is None:
                raise ValueError(f"{weights} has {key} but no {key_b}")
            key_bias = key.removesuffix(suffix_a) + ".lora_B.bias"
            for used_key in (key, key_b, key_bias):
                others.pop(used_key, None)
            name = _path(key).replace(".base_layer.", ".")
            layers[name] = _SavedLayer(
                (key, key_b), (tuple(a.shape[1:]), tuple(b.shape[2:])), (a.flatten(1), b.flatten(1)),
                _scaling(config, name, a.shape[0]), tensors.get(key_bias),
            )  # fmt: skip
    if not layers:
        raise ValueError(f"{weights} holds no LoRA factors")
    return _SavedAdapter(folder, config, layers, others)


def _path(key: str) -> str:
    """The module's path in the name of one of its tensors."""
    return key.removeprefix(STATE_PREFIX).rpartition(".lora_")[0]


def _is_nested(keys: Sequence[str]) -> bool:
    """Whether PEFT takes the layer's rank from the layer it is inside of (an attention's output projection)."""
    return ".base_layer." in keys[0]


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    alpha = (config.alpha_pattern or {}).get(get_pattern_key((config.alpha_pattern or {}).keys(), path))
    alpha = config.lora_alpha if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _write_peft(out: Path, like: _SavedAdapter, state: PastState, others: dict[str, Tensor]) -> None:
    """The past in ``state`` as a PEFT adapter on ``like``'s layers, with the state beside it."""
    stored = state.layers
    ranks = {name: layer.rank for name, layer in stored.items() if not _is_nested(like.layers[name].keys)}
    marker = Marker.about(like.config, state.tasks, stored, "adapter")
    tensors = dict(others)
    for name, layer in stored.items():
        saved = like.layers[name]
        tensors |= factor_tensors(layer.factors(), saved.keys, saved.tails, layer.bias)
    write_adapter(out, plain_config(like.config, ranks, {}, marker), tensors, state)
