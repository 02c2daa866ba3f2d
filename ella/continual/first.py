"""The first task of a stream, trained once for all methods that begin as plain LoRA."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from .arms import Arm
from .state import StreamState

__all__ = ["FirstTask"]


class FirstTask:
    """An adapter after the first task, kept in a folder named after ``begun``: all that its weights depend on."""

    def __init__(self, directory: str | Path, begun: dict[str, Any]) -> None:
        name = hashlib.sha256(json.dumps(begun, sort_keys=True).encode()).hexdigest()[:16]
        self._state = StreamState(Path(directory) / name, begun)

    def load(self, arm: Arm) -> dict[str, Any] | None:
        """Give ``arm`` the adapter; returns what its training cost, None where it has not been trained yet."""
        saved = self._state.load()
        if saved is None:
            return None
        self._state.load_adapter(arm.model, arm.adapter)
        return saved["result"]

    def save(self, arm: Arm, record: dict[str, Any]) -> None:
        """Keep the adapter for others, with what its training cost; one that another process kept meanwhile stays."""
        if self._state.load() is None:  # else: it may be being read
            self._state.save(0, "first", record, _Adapter(arm))


class _Adapter:
    """The adapter alone: nothing else of a method has begun."""

    regularizer = None

    def __init__(self, arm: Arm) -> None:
        self.model, self.adapter = arm.model, arm.adapter

    def tensors(self) -> dict[str, Tensor]:
        return {}
