"""The past on disk: one safetensors file, its description as json in the file's header.

One file makes the write whole or absent: it is written under a temporary name, flushed and renamed. No pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ella_kernels import LowRank

from .atomic import write_atomically

__all__ = ["PAST_FILE", "PastState", "StoredLayer", "load_past", "save_past"]

PAST_FILE = "ella_past.safetensors"
FORMAT = 1
_FIELDS = ("left", "right", "row_energy", "col_energy", "bias")


@dataclass
class StoredLayer:
    """One layer's past: a :class:`~ella_kernels.LowRank` per part (experts have many), all of one rank.

    Attributes:
        parts: ``left (out, k)``, ``right (k, in)``, energies or None.
        bias: ``(out,)`` sum of the scaled ``lora_B`` biases, or None.
        relative_error: ``‖dropped‖_F / ‖W‖_F`` of every fold so far, in order.
    """

    parts: list[LowRank]
    bias: Tensor | None = None
    relative_error: list[float] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.parts[0].left.shape[0], self.parts[0].right.shape[1]

    @property
    def rank(self) -> int:
        return self.parts[0].right.shape[0]

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, parts stacked in front: ``left (n, out, k)`` and so on."""
        found = {
            name: torch.stack([getattr(part, name) for part in self.parts])
            for name in _FIELDS[:4]
            if getattr(self.parts[0], name) is not None
        }
        return found if self.bias is None else found | {"bias": self.bias}


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
    """Write ``folder/ella_past.safetensors``, whole or not at all; returns its path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{key}": tensor.detach().cpu().contiguous()
        for name, layer in state.layers.items()
        for key, tensor in layer.tensors().items()
    }
    header = {
        "format": FORMAT,
        "config": state.config,
        "tasks": state.tasks,
        "shapes": state.shapes,
        "relative_error": {name: layer.relative_error for name, layer in state.layers.items()},
        "extra": state.extra,
    }
    metadata = {"ella": json.dumps(header)}
    write_atomically(folder / PAST_FILE, lambda path: save_file(tensors, path, metadata=metadata))
    return folder / PAST_FILE


def load_past(folder: str | Path) -> PastState:
    """Read what :func:`save_past` wrote.

    Raises:
        FileNotFoundError: no state in ``folder``.
        ValueError: a file that is cut off, of another format, or inconsistent in itself.
    """
    path = Path(folder) / PAST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"no saved past at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    try:
        header = json.loads(metadata["ella"])
        found = header["format"]
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{path} was not written by this package: its header has no description") from None
    if found != FORMAT:
        raise ValueError(f"{path} has format {found}; this version reads {FORMAT}")
    shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
    errors = header["relative_error"]
    layers = {name: _stored_layer(path, name, shapes, tensors, errors[name]) for name in errors}
    return PastState(header["config"], list(header["tasks"]), layers, shapes, header.get("extra", {}))


def _stored_layer(
    path: Path, name: str, shapes: Mapping[str, tuple], tensors: Mapping[str, Tensor], errors: list[float]
) -> StoredLayer:
    left, right, rows, cols, bias = (tensors.get(f"{name}.{key}") for key in _FIELDS)
    if left is None or right is None:
        raise ValueError(f"{path} lists layer {name!r} but holds no factors for it")
    n, out, in_ = shapes[name]
    if left.shape[:2] != (n, out) or right.shape != (n, left.shape[2], in_):
        raise ValueError(
            f"{path}, layer {name!r}: expected factors ({n}, {out}, k) and ({n}, k, {in_}), "
            f"found {tuple(left.shape)} and {tuple(right.shape)}"
        )
    absent = [None] * n
    parts = zip(left, right, absent if rows is None else rows, absent if cols is None else cols, strict=True)
    return StoredLayer([LowRank(*part) for part in parts], bias, list(errors))
