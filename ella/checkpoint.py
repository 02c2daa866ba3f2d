"""The past on disk: one safetensors file, its description as json in the file's header.

One file makes the write whole or absent: it is written under a temporary name, flushed and renamed. No pickle is read.
The description holds the sha256 of each layer's tensors, and the header that of the description.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ella_kernels import LowRank

from .atomic import make_folder, write_atomically
from .tensorfile import digest, read_tensors

__all__ = ["PAST_FILE", "Importance", "PastState", "StoredLayer", "load_past", "save_past"]

PAST_FILE = "ella_past.safetensors"
FORMAT = 2
# What a description holds.
_KEYS = {
    "format": int, "config": dict, "tasks": list, "shapes": dict, "relative_error": dict, "extra": dict, "sha256": dict
}  # fmt: skip
_FIELDS = ("left", "right", "row_energy", "col_energy", "bias", "row_importance", "col_importance")


class Importance(NamedTuple):
    """``F ≈ ρκᵀ/τ`` of a layer: ``rows`` is ``ρ (out,)``, ``cols`` is ``κ (in,)``, float32; ``τ = Σρ = Σκ``."""

    rows: Tensor
    cols: Tensor

    @property
    def total(self) -> float:
        return self.rows.double().sum().item()

    def scaled(self, factor: float) -> Importance:
        # By one after the other: the gradients' scale may leave float32 where their product does not.
        return Importance(*((factor * part.double()).to(part.dtype) for part in self))

    def plus(self, other: Importance | None) -> Importance:
        return self if other is None else Importance(self.rows + other.rows, self.cols + other.cols)

    def to(self, device: str | torch.device) -> Importance:
        return Importance(self.rows.to(device), self.cols.to(device))


@dataclass
class StoredLayer:
    """One layer's past: a :class:`~ella_kernels.LowRank` per part (experts have many), all of one rank.

    Attributes:
        parts: ``left (out, k)``, ``right (k, in)``, energies or None.
        bias: ``(out,)`` sum of the scaled ``lora_B`` biases, or None.
        relative_error: ``‖dropped‖_F / ‖W‖_F`` of every fold so far, in order.
        importance: ``(out,)`` and ``(in,)`` sums of squared gradients, or None (:mod:`ella.importance`).
    """

    parts: list[LowRank]
    bias: Tensor | None = None
    relative_error: list[float] = field(default_factory=list)
    importance: Importance | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].left.shape[0], self.parts[0].right.shape[1]

    @property
    def rank(self) -> int:
        return self.parts[0].right.shape[0]

    def factors(self, rank: int | None = None) -> list[tuple[Tensor, Tensor]]:
        """``(R (rank, in), L (out, rank))`` per part, with zeros behind what is stored."""
        more = 0 if rank is None else rank - self.rank
        return [
            (
                torch.cat([part.right, part.right.new_zeros(more, part.right.shape[1])]),
                torch.cat([part.left, part.left.new_zeros(part.left.shape[0], more)], 1),
            )
            for part in self.parts
        ]

    def to(self, device: str | torch.device) -> StoredLayer:
        """A copy on ``device``."""
        parts = [LowRank._make(None if t is None else t.to(device) for t in part) for part in self.parts]
        bias = None if self.bias is None else self.bias.to(device)
        importance = None if self.importance is None else self.importance.to(device)
        return StoredLayer(parts, bias, self.relative_error, importance)

    def all_tensors(self) -> list[Tensor]:
        """Every tensor in it, part by part."""
        return [t for part in (*self.parts, (self.bias,), self.importance or ()) for t in part if t is not None]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, parts stacked in front: ``left (n, out, k)`` and so on."""
        found = {
            name: torch.stack([getattr(part, name) for part in self.parts])
            for name in _FIELDS[:4]
            if getattr(self.parts[0], name) is not None
        }
        if self.bias is not None:
            found["bias"] = self.bias
        if self.importance is not None:
            found |= zip(_FIELDS[5:], self.importance, strict=True)
        return found


@dataclass
class PastState:
    """A whole saved state.

    Attributes:
        config: ``EllaConfig.to_dict()``.
        tasks: names of the folded tasks, in order.
        layers: by layer name; empty before the first fold.
        shapes: ``(n_parts, out, in)`` of every penalised layer, also before the first fold.
        extra: what only some states have (checksums of merged base weights).
    """

    config: dict[str, Any]
    tasks: list[str]
    layers: dict[str, StoredLayer]
    shapes: dict[str, tuple[int, int, int]]
    extra: dict[str, Any] = field(default_factory=dict)


def save_past(folder: str | Path, state: PastState) -> Path:
    """Write ``folder/ella_past.safetensors``, whole or not at all; returns its path.

    Half precision is stored as float32. Savers in one folder take turns.

    Raises:
        OSError: it cannot be written there.
        ValueError: a state that :func:`load_past` would refuse, named as there.
    """
    path = Path(folder) / PAST_FILE
    tensors = {
        f"{name}.{key}": _storable(tensor)
        for name, layer in state.layers.items()
        for key, tensor in layer.tensors().items()
    }
    description = {
        "format": FORMAT,
        "config": state.config,
        "tasks": state.tasks,
        "shapes": state.shapes,
        "relative_error": {name: layer.relative_error for name, layer in state.layers.items()},
        "extra": state.extra,
        "sha256": {name: digest(_of_layer(name, tensors)) for name in state.layers},
    }
    text = json.dumps(description)
    _checked(path, json.loads(text), tensors)
    metadata = {"ella": text, "sha256": _text_digest(text)}
    make_folder(path.parent)
    return write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_past(folder: str | Path) -> PastState:
    """Read what :func:`save_past` wrote. The tensors are copies: the file may change afterwards.

    Beside a save it finds the old state or the new one. Files of format 1 have no sha256; all else is checked in them.

    Raises:
        FileNotFoundError: no state in ``folder``.
        OSError: it cannot be read.
        ValueError: a file that is cut off, changed since it was written, of another format, or inconsistent in itself;
            names the file, and the layer where it is one layer's.
    """
    path = Path(folder) / PAST_FILE
    try:
        tensors, metadata = read_tensors(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no saved past at {path}") from None
    try:
        text = metadata["ella"]
        description = json.loads(text)
        found = description["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise ValueError(f"{path} was not written by this package: its header has no description") from None
    if type(found) is not int or not 1 <= found <= FORMAT:
        raise ValueError(f"{path} has format {found!r}; this version reads 1 to {FORMAT}")
    if found == 1:
        description = {"extra": {}, "sha256": {}} | description
    state = _checked(path, description, tensors)
    if found > 1 or "sha256" in metadata:
        _check_digests(path, text, metadata.get("sha256"), description["sha256"], tensors)
    return state


def _storable(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu().contiguous()
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _of_layer(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensors[f"{name}.{key}"] for key in _FIELDS if f"{name}.{key}" in tensors}


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _check_digests(path: Path, text: str, whole: str | None, layers: Mapping[str, str], tensors: Mapping) -> None:
    expected = "expected the one it was saved with; save the state again, or restore the file"
    if whole != _text_digest(text):
        raise ValueError(f"{path}: the sha256 of its description is {_text_digest(text)}; {expected}")
    for name, saved in layers.items():
        now = digest(_of_layer(name, tensors))
        if now != saved:
            raise ValueError(f"{path}, layer {name!r}: the sha256 of its tensors is {now}; {expected}")


def _checked(path: Path, description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> PastState:
    """The state, if its parts are of the right types and belong together."""
    for key, kind in _KEYS.items():
        if not isinstance(description.get(key), kind):
            found = type(description[key]).__name__ if key in description else "nothing"
            raise ValueError(f"{path}: expected a {kind.__name__} as {key!r} of its description, found {found}")
    _, config, tasks, shapes, errors, extra, _ = (description[key] for key in _KEYS)
    if unknown := sorted(description.keys() - _KEYS.keys()):
        raise ValueError(f"{path}: its description has unknown keys {unknown}; expected {list(_KEYS)}")
    if wrong := [task for task in tasks if not isinstance(task, str)]:
        raise ValueError(f"{path}: expected texts as 'tasks' of its description, found {wrong[0]!r}")
    for name, shape in shapes.items():
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"{path}, layer {name!r}: expected a shape [parts, out, in], found {shape!r}")
    for name, values in errors.items():
        if not isinstance(values, list) or not all(map(_is_error, values)):
            raise ValueError(f"{path}, layer {name!r}: expected relative errors of at least 0, found {values!r}")
    if errors and (differing := sorted(errors.keys() ^ shapes.keys())):
        raise ValueError(f"{path} has a past for some of its layers only; expected all or none, differing: {differing}")
    layers = {name: _stored_layer(path, name, shapes[name], tensors, errors[name]) for name in errors}
    known = {f"{name}.{key}" for name in layers for key in _FIELDS}
    if unknown := sorted(tensors.keys() - known):
        raise ValueError(f"{path} holds tensors that belong to no layer: {unknown[:8]}")
    return PastState(config, tasks, layers, {name: tuple(shape) for name, shape in shapes.items()}, extra)


def _is_error(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def _stored_layer(
    path: Path, name: str, shape: tuple[int, int, int], tensors: Mapping[str, Tensor], errors: list[float]
) -> StoredLayer:
    found = _of_layer(name, tensors)
    if not {"left", "right"} <= found.keys():
        raise ValueError(f"{path} lists layer {name!r} but holds no factors for it")
    if ("row_energy" in found) != ("col_energy" in found):
        raise ValueError(f"{path}, layer {name!r}: expected row and column energies or neither, found {list(found)}")
    n, out, in_ = shape
    k = found["left"].shape[-1] if found["left"].dim() else 0
    if ("row_importance" in found) != ("col_importance" in found):
        raise ValueError(f"{path}, layer {name!r}: expected the importance of rows and columns or neither")
    shapes = {
        "left": (n, out, k), "right": (n, k, in_), "row_energy": (n, out), "col_energy": (n, in_), "bias": (out,),
        "row_importance": (out,), "col_importance": (in_,),
    }  # fmt: skip
    for key, tensor in found.items():
        where = f"{path}, layer {name!r}, {key}"
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{where}: expected float32 or float64, found {tensor.dtype}")
        if tensor.shape != shapes[key]:
            raise ValueError(f"{where}: expected shape {shapes[key]}, found {tuple(tensor.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{where}: expected finite values, found {int((~tensor.isfinite()).sum())} that are not")
        if key.endswith(("energy", "importance")) and (tensor < 0).any():
            raise ValueError(f"{where}: expected energies of at least 0, found {tensor.min().item():.3g}")
    parts = zip(*(found.get(key, [None] * n) for key in _FIELDS[:4]), strict=True)
    importance = Importance(*(found[key] for key in _FIELDS[5:])) if "row_importance" in found else None
    return StoredLayer([LowRank(*part) for part in parts], found.get("bias"), errors, importance)
