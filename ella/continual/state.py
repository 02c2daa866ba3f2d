"""A stream's state on disk: after every finished task, whole or not at all.

``progress.json`` names the folder of the last finished task. The folder is written under a temporary name and
renamed, then ``progress.json`` is replaced; a kill at any moment leaves the previous task's state or this one's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from itertools import chain, count
from pathlib import Path
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from ella.atomic import make_folder, remove, replacing, temporaries, write_atomically, write_text_atomically
from ella.locks import one_writer
from ella.tensorfile import digest, read_tensors

from .running import one_run

__all__ = ["StreamState"]

PROGRESS = "progress.json"
ADAPTER = "adapter.safetensors"
OWN = "method.safetensors"
VERSION = 1
# The names written here: the folder may hold other files, which are left alone.
_STATE = r"after-\d+-[A-Za-z0-9_.-]*"
_TEMPORARIES = temporaries(rf"({_STATE}|{re.escape(PROGRESS)})")


class Saved(Protocol):
    """What is saved of a method (:class:`~ella.continual.arms.Arm`)."""

    regularizer: Any | None

    @property
    def model(self) -> Any: ...

    @property
    def adapter(self) -> str: ...

    def tensors(self) -> dict[str, Tensor]: ...


class StreamState:
    """The state folder of one run, described by ``run`` (settings, model, task fingerprints; plain json).

    ``defaults`` is what a setting stood at before there was a choice: a run that was saved without it goes on.

    Raises ValueError from :meth:`load` when the folder holds another run: the message lists what differs.
    """

    def __init__(self, folder: str | Path, run: dict[str, Any], defaults: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.run = json.loads(json.dumps(run))
        self._defaults = json.loads(json.dumps(defaults or {}))
        self._current: str | None = None

    def running(self) -> AbstractContextManager[None]:
        """Keeps the folder to this run, see :func:`~ella.continual.running.one_run`."""
        return one_run(self.folder)

    @property
    def past_dir(self) -> Path | None:
        """The saved regularizer of the last finished task; None before the first, or where the arm has none."""
        past = self.folder / self._current / "past" if self._current else None
        return past if past is not None and past.is_dir() else None

    def load(self) -> dict[str, Any] | None:
        """The last saved progress (keys "run", "state", "result"), or None for a new run.

        Raises ValueError also for a state that is damaged or incomplete, OSError for one that cannot be read.
        """
        saved = self._progress()
        if saved is None:
            return None
        differing = differences(completed(saved["run"], self._defaults), self.run)
        if differing:
            raise ValueError(
                f"{self.folder} holds another run; differing: {'; '.join(differing[:8])}. "
                "Continue it with its own settings, or give a new output folder"
            )
        state = self.folder / saved["state"]
        missing = [] if (state / ADAPTER).is_file() else [ADAPTER]
        if saved.get("past") and not ((state / "past").is_dir() and any((state / "past").iterdir())):
            missing.append("past")
        if saved.get("own") and not (state / OWN).is_file():
            missing.append(OWN)
        if missing:
            raise ValueError(
                f"{self.folder / PROGRESS} points at {saved['state']}, which is incomplete, without "
                f"{' and '.join(missing)}; restore that, or delete {self.folder} to start over"
            )
        self._current = saved["state"]
        return saved

    def load_adapter(self, model: Any, adapter_name: str) -> None:
        """Copy the saved adapter weights into the model's parameters, bit for bit; none if any of them does not fit."""
        if self._current is None:
            raise ValueError(f"{self.folder} has no finished task to load an adapter of")
        path = self.folder / self._current / ADAPTER
        tensors = self._read(path)
        own = adapter_parameters(model, adapter_name)
        if own.keys() != tensors.keys():
            raise ValueError(f"{path}: saved adapter has other parameters: {sorted(own.keys() ^ tensors.keys())[:8]}")
        for name, parameter in own.items():
            saved = tensors[name]
            if (saved.dtype, saved.shape) != (parameter.dtype, parameter.shape):
                raise ValueError(
                    f"{path}, {name}: expected {parameter.dtype} {tuple(parameter.shape)}, "
                    f"found {saved.dtype} {tuple(saved.shape)}"
                )
        for name, parameter in own.items():
            parameter.data.copy_(tensors[name])

    def tensors(self) -> dict[str, Tensor]:
        """What the method saved beside adapter and past."""
        if self._current is None or not (self.folder / self._current / OWN).exists():
            return {}
        return self._read(self.folder / self._current / OWN)

    def _read(self, path: Path) -> dict[str, Tensor]:
        tensors, metadata = read_tensors(path)
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise ValueError(f"{path}, {broken[0]}: expected finite values; delete {self.folder} to start over")
        # Earlier versions wrote none.
        if metadata.get("sha256") not in (None, digest(tensors)):
            raise ValueError(f"{path}: its sha256 is not the one it was saved with; delete {self.folder} to start over")
        return tensors

    def save(self, index: int, name: str, result: dict[str, Any], arm: Saved) -> None:
        """Save the state after task ``index``; the previous task's folder is deleted once this one is in place."""
        make_folder(self.folder)
        adapter, own = adapter_parameters(arm.model, arm.adapter), arm.tensors()
        with one_writer(self.folder):
            self._sweep()
            final = self._free(f"after-{index + 1}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', name)[:100]}")
            with replacing(self.folder / final) as temporary:
                temporary.mkdir()
                _write(temporary / ADAPTER, adapter)
                if own:
                    _write(temporary / OWN, own)
                if arm.regularizer is not None:
                    arm.regularizer.save_pretrained(str(temporary / "past"))
            progress = {
                "version": VERSION,
                "run": self.run,
                "state": final,
                "past": arm.regularizer is not None,
                "own": bool(own),
            }
            write_text_atomically(self.folder / PROGRESS, json.dumps(progress | {"result": result}, indent=1))
            self._current = final
            self._sweep()

    def clear(self) -> None:
        """Forget the saved run; files that are not this class's stay. Raises as :meth:`running` does."""
        self._current = None
        if self.folder.is_dir():
            with self.running(), one_writer(self.folder):
                (self.folder / PROGRESS).unlink(missing_ok=True)
                self._sweep()

    def _progress(self) -> dict[str, Any] | None:
        path = self.folder / PROGRESS
        try:
            saved = json.loads(path.read_bytes())
            found = saved["version"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is not the progress of a run; delete {self.folder} to start over") from error
        if found != VERSION:
            raise ValueError(f"{path} has format version {found}; this code reads {VERSION}")
        state = saved.get("state")
        whole = isinstance(saved.get("run"), dict) and isinstance(saved.get("result"), dict)
        if not whole or not isinstance(state, str) or not re.fullmatch(_STATE, state):
            raise ValueError(f"{path} is not the progress of a run; delete {self.folder} to start over")
        return saved

    def _free(self, name: str) -> str:
        """``name``, or with a number where the state to be replaced, or anyone's file, has it."""
        names = chain([name], (f"{name}.{n}" for n in count(2)))
        return next(n for n in names if not os.path.lexists(self.folder / n))

    def _sweep(self) -> None:
        """Remove what a killed run left and what is no longer pointed at."""
        try:
            saved = self._progress()
        except (OSError, ValueError):
            return  # whoever can still read it needs what it points at
        kept = saved["state"] if saved else None
        remove(path for path in self.folder.iterdir() if _is_own(path) and path.name != kept)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(held, temporary, metadata={"sha256": digest(held)}))


def _is_own(path: Path) -> bool:
    if re.fullmatch(_TEMPORARIES, path.name):
        return True
    return re.fullmatch(_STATE, path.name) is not None and path.is_dir() and not path.is_symlink()


def adapter_parameters(model: Any, adapter_name: str) -> dict[str, Any]:
    """What is saved of an adapter, by name."""
    # The factors of an embedding are parameters themselves: "lora_embedding_A.default", with nothing after it.
    return {n: p for n, p in model.named_parameters() if f".{adapter_name}." in f"{n}." and "lora_" in n}


def completed(saved: Any, defaults: Any) -> Any:
    """Settings ``saved`` with what they lack, at any depth, from ``defaults``."""
    if not isinstance(saved, dict) or not isinstance(defaults, dict):
        return saved
    return defaults | {key: completed(value, defaults.get(key)) for key, value in saved.items()}


def differences(saved: Any, now: Any, where: str = "") -> list[str]:
    """A line for every setting that is not the same in both."""
    if isinstance(saved, dict) and isinstance(now, dict):
        return [
            line
            for key in sorted(saved.keys() | now.keys())
            for line in differences(saved.get(key), now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if saved == now else [f"{where} was {saved!r}, now {now!r}"]
