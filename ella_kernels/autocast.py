"""Operators that must not take their dtype from the caller: autocast is for his layers, not for this arithmetic."""

from __future__ import annotations

import contextlib

import torch

__all__ = ["without_autocast"]


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which operators on ``device`` compute in the dtypes of their operands, whatever autocast is on."""
    kind = device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()
