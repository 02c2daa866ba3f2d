"""Folding saved LoRA adapters into one past without their model: for any engine that writes PEFT adapter folders."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from peft.tuners.lora import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ella_kernels import LowRank

from .checkpoint import PastState, StoredLayer, save_past
from .config import EllaConfig
from .lora import unsupported_config
from .past import FoldReport, fold_layer, past_config

__all__ = ["fold_adapters"]

_PREFIX = "base_model.model."
_FLAGS = ("use_dora", "use_qalora", "use_bdlora", "arrow_config", "alora_invocation_tokens", "kasa_config",
          "monteclora_config", "target_parameters")  # fmt: skip


def fold_adapters(
    adapters: Sequence[str | Path], out_dir: str | Path, *, past_rank: int = 128, names: Sequence[str] | None = None
) -> list[FoldReport]:
    """Fold PEFT LoRA adapter folders, in task order, into one past.

    Writes ``out_dir`` whole or not at all: the state that :meth:`EllaRegularizer.from_pretrained` reads, and the same
    past as a plain PEFT adapter of scaling 1 that any engine loads.

    Args:
        adapters: folders with ``adapter_config.json`` and ``adapter_model.safetensors``, all on the same layers.
        out_dir: must not exist yet, or be empty.
        past_rank: cap on the components per layer.
        names: task names; by default the folders' names.

    Raises:
        FileNotFoundError, FileExistsError: no adapter there, or something in ``out_dir``.
        ValueError: an adapter kind that cannot be folded, layers that differ (listed), no adapters.
    """
    folders, out = [Path(folder) for folder in adapters], Path(out_dir)
    config = EllaConfig(past_rank=past_rank)
    if not folders:
        raise ValueError("expected at least one adapter folder, found none")
    names = [folder.resolve().name for folder in folders] if names is None else list(names)
    if len(names) != len(folders):
        raise ValueError(f"names must have one entry per adapter, found {len(names)} for {len(folders)}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty folder; give a new one")

    stored: dict[str, StoredLayer] = {}
    reports = []
    for name, folder in zip(names, folders, strict=True):
        _, layers = _read_adapter(folder)
        if stored and layers.keys() != stored.keys():
            raise ValueError(
                f"{folder} adapts other layers than {folders[0]}: {sorted(layers.keys() ^ stored.keys())[:8]}"
            )
        for layer, (a, b, scaling, bias) in layers.items():
            stored[layer] = _fold(stored.get(layer), layer, a, b, scaling, bias, past_rank)
        reports.append(FoldReport.of(name, stored))
    shapes = {name: (1, *layer.shape) for name, layer in stored.items()}
    state = PastState(config.to_dict(), names, stored, shapes)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        temporary.mkdir()
        save_past(temporary, state)
        _write_peft(temporary, folders[0], stored)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return reports


def _fold(
    before: StoredLayer | None, name: str, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None, rank: int
) -> StoredLayer:
    if before is not None and before.shape != (b.shape[0], a.shape[1]):
        raise ValueError(f"layer {name} is {(b.shape[0], a.shape[1])} here and {before.shape} in the first adapter")
    for factor, tensor in (("A", a), ("B", b)):
        if not tensor.isfinite().all():
            raise ValueError(f"lora_{factor} of {name} is not finite")
    return fold_layer(before, [(a, b)], scaling, bias, rank)


def _read_adapter(folder: Path) -> tuple[LoraConfig, dict[str, tuple[Tensor, Tensor, float, Tensor | None]]]:
    """Configuration, and per layer ``A (r, in)``, ``B (out, r)``, scaling and bias."""
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"no adapter_config.json in {folder}; expected a PEFT LoRA adapter folder")
    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise FileNotFoundError(f"no adapter_model.safetensors in {folder}; pickled weights are never read")
    config = LoraConfig.from_pretrained(folder)
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"{folder} holds a {config.peft_type} adapter; only LORA can be folded")
    reason = unsupported_config(config)
    used = [flag for flag in _FLAGS if getattr(config, flag, None)]
    if reason or used:
        raise ValueError(f"{folder} cannot be folded offline: {reason or f'it uses {used[0]}'}")
    try:
        tensors = load_file(weights)
    except SafetensorError as error:
        raise ValueError(f"{weights} is not a whole safetensors file: {error}") from error
    found = {}
    for key, a in tensors.items():
        for suffix_a, suffix_b in ((".lora_A.weight", ".lora_B.weight"), (".lora_embedding_A", ".lora_embedding_B")):
            if not key.endswith(suffix_a):
                continue
            path = key.removesuffix(suffix_a)
            b = tensors.get(path + suffix_b)
            if b is None:
                raise ValueError(f"{weights} has {key} but no {path + suffix_b}")
            path = path.removeprefix(_PREFIX).replace(".base_layer.", ".")
            scaling = _scaling(config, path, a.shape[0])
            bias = tensors.get(key.removesuffix(suffix_a) + ".lora_B.bias")
            found[path] = (a.flatten(1), b.flatten(1), scaling, bias)
    if not found:
        raise ValueError(f"{weights} holds no LoRA factors")
    return config, found


def _scaling(config: LoraConfig, path: str, rank: int) -> float:
    alpha = (config.alpha_pattern or {}).get(get_pattern_key((config.alpha_pattern or {}).keys(), path))
    alpha = config.lora_alpha if alpha is None else alpha
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _write_peft(folder: Path, like: Path, stored: dict[str, StoredLayer]) -> None:
    """The past as PEFT adapter files, with the first adapter's configuration and tensor shapes."""
    first = load_file(like / "adapter_model.safetensors")
    config = past_config(LoraConfig.from_pretrained(like), {name: layer.rank for name, layer in stored.items()})
    tensors = {}
    for key, tensor in first.items():
        path, dot, kind = key.partition(".lora_")
        name = path.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if not dot or name not in stored:
            continue
        past: LowRank = stored[name].parts[0]
        if kind.endswith("bias"):
            tensors[key] = stored[name].bias
        elif kind.startswith(("A", "embedding_A")):
            tensors[key] = past.right.reshape(past.right.shape[0], *tensor.shape[1:])
        else:
            tensors[key] = past.left.reshape(*past.left.shape, *tensor.shape[2:])
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    described = config.to_dict()
    described = {key: sorted(value) if isinstance(value, set) else value for key, value in described.items()}
    (folder / "adapter_config.json").write_text(json.dumps(described, indent=2, default=str), encoding="utf-8")
