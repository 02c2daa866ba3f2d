"""Safetensors files, read in one piece: what replaces or changes the file meanwhile or later does not mix in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

__all__ = ["digest", "read_tensors"]

# What safetensors, json and torch raise on bytes that are no such file.
_BROKEN = (SafetensorError, ArithmeticError, LookupError, RuntimeError, TypeError, ValueError)


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and bytes, in the order of the names."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        found.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors (ordinary ones on the CPU) and metadata of a safetensors file.

    Raises:
        OSError: it cannot be read, or is no file.
        ValueError: its content is cut off or not safetensors.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        kind = IsADirectoryError if path.is_dir() else OSError
        raise kind(f"{path} is no file; expected a safetensors file there")
    data = path.read_bytes()
    try:
        tensors = load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    except _BROKEN as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    return tensors, metadata
