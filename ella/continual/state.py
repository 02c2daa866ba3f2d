"""A stream's state on disk: after every finished task, whole or not at all.

``progress.json`` names the folder of the last finished task. The folder is written under a temporary name and
renamed, then ``progress.json`` is replaced; a kill at any moment leaves the previous task's state or this one's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ella.atomic import write_text_atomically

__all__ = ["StreamState"]

PROGRESS = "progress.json"
VERSION = 1
# The names written here: the folder may hold other files, which are left alone.
_OWN = re.compile(r"after-\d+-.*|\.(after-\d+-.*|progress\.json)\.\d+\.tmp(\.json)?")


class StreamState:
    """The state folder of one run, described by ``run`` (settings, model, task fingerprints; plain json).

    Raises ValueError from :meth:`load` when the folder holds another run: the message lists what differs.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any]) -> None:
        self.folder = Path(folder)
        self.run = json.loads(json.dumps(run))
        self._current: str | None = None

    @property
    def past_dir(self) -> Path | None:
        """The saved regularizer of the last finished task; None before the first, or where the arm has none."""
        past = self.folder / self._current / "past" if self._current else None
        return past if past is not None and past.is_dir() else None

    def load(self) -> dict[str, Any] | None:
        """The last saved progress (keys "run", "state", "result"), or None for a new run."""
        path = self.folder / PROGRESS
        if not path.exists():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            found = saved["version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not the progress of a run; delete {self.folder} to start over") from error
        if found != VERSION:
            raise ValueError(f"{path} has format version {found}; this code reads {VERSION}")
        differing = _differences(saved["run"], self.run)
        if differing:
            raise ValueError(
                f"{self.folder} holds another run; differing: {'; '.join(differing[:8])}. "
                "Continue it with its own settings, or give a new output folder"
            )
        self._current = saved["state"]
        if not (self.folder / self._current / "adapter.safetensors").is_file():
            raise ValueError(
                f"{path} points at {self._current}, which is incomplete; delete {self.folder} to start over"
            )
        return saved

    def load_adapter(self, model: Any, adapter_name: str) -> None:
        """Copy the saved adapter weights into the model's parameters, bit for bit."""
        path = self.folder / self._current / "adapter.safetensors"
        try:
            tensors = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
        own = _adapter_parameters(model, adapter_name)
        if own.keys() != tensors.keys():
            raise ValueError(f"saved adapter has other parameters: {sorted(own.keys() ^ tensors.keys())[:8]}")
        for name, parameter in own.items():
            parameter.data.copy_(tensors[name])

    def save(
        self, index: int, name: str, result: dict[str, Any], model: Any, adapter_name: str, regularizer: Any | None
    ) -> None:
        """Save the state after task ``index``; the previous task's folder is deleted once this one is in place."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        final = f"after-{index + 1}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)}"
        temporary = self.folder / f".{final}.{os.getpid()}.tmp"
        temporary.mkdir()
        tensors = {k: p.detach().cpu().contiguous() for k, p in _adapter_parameters(model, adapter_name).items()}
        save_file(tensors, temporary / "adapter.safetensors")
        if regularizer is not None:
            regularizer.save_pretrained(str(temporary / "past"))
        os.replace(temporary, self.folder / final)
        progress = {"version": VERSION, "run": self.run, "state": final, "result": result}
        write_text_atomically(self.folder / PROGRESS, json.dumps(progress, indent=1))
        self._current = final
        self._sweep()

    def clear(self) -> None:
        """Forget the saved run; files that are not this class's stay."""
        self._current = None
        (self.folder / PROGRESS).unlink(missing_ok=True)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what a killed run left and what is no longer pointed at."""
        own = [path for path in self.folder.glob("*") if _OWN.fullmatch(path.name)]
        for path in own:
            if path.name == self._current:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _adapter_parameters(model: Any, adapter_name: str) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if f".{adapter_name}." in name and "lora_" in name}


def _differences(saved: Any, now: Any, where: str = "") -> list[str]:
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(saved.keys() | now.keys())
            for line in _differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if saved == now else [f"{where} was {saved!r}, now {now!r}"]
