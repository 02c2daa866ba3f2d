"""How much a task's loss depends on the rows and columns of a layer's weight, measured while the task is trained.

The gradient of a weight is a sum over tokens of ``δ xᵀ``, ``x (in,)`` the layer's input, ``δ (out,)`` the gradient of
its output. ``F``, the sum of the squares of these matrices, is up to a factor the empirical Fisher information, token
by token. Its row and column sums are kept, and ``F ≈ ρκᵀ/τ``, as Adafactor has it of second moments (Shazeer and Stern
2018, arXiv 1804.04235): ``out + in`` numbers a layer and one pass over ``δ`` and ``x`` in a backward, where EWC's
Fisher takes a pass over the data of its own (Kirkpatrick et al. 2017, arXiv 1612.00796).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from .acting import TASK
from .atomic import write_atomically
from .checkpoint import Importance
from .distributed import is_writer, summed
from .lora import AdaptedLayer
from .tensorfile import read_tensors

__all__ = ["FILE", "clear", "load", "measure", "measured", "refuse_unmeasured", "save", "stop"]

# In a checkpoint within a task.
FILE = "ella_importance.safetensors"
_TOKENS = 4096


class _Measure:
    """Forward hook of a LoRA layer: adds what a backward says of its output, while the adapter in training acts."""

    def __init__(self, adapter: str) -> None:
        self.adapter = adapter
        self.sums: Importance | None = None

    def __call__(self, module: LoraLayer, args: tuple, kwargs: dict, output: Tensor) -> None:
        trained = TASK if TASK in module.scaling else self.adapter
        if module.disable_adapters or trained not in module.active_adapters:
            return
        if torch.is_grad_enabled() and output.requires_grad:
            x = args[0] if args else next(iter(kwargs.values()))
            output.register_hook(partial(self._add, x.detach()))

    @torch.no_grad()
    def _add(self, x: Tensor, gradient: Tensor) -> None:
        rows = cols = torch.zeros((), device=x.device)
        # [tokens, in], [tokens, out], some at a time: their squares are float32.
        parts = (t.reshape(-1, t.shape[-1]).split(_TOKENS) for t in (x, gradient))
        for pair in zip(*parts, strict=True):
            inputs, gradients = (part.float().square() for part in pair)
            rows, cols = rows + gradients.T @ inputs.sum(1), cols + inputs.T @ gradients.sum(1)
        # A step that a gradient scaler skips has gradients that are no numbers.
        fine = rows.sum().isfinite() & cols.sum().isfinite()
        found = Importance(*(torch.where(fine, part, 0.0) for part in (rows, cols)))
        self.sums = found.plus(self.sums)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Measure:
        copied = _Measure(self.adapter)
        copied.sums = copy.deepcopy(self.sums, memo)
        return copied


def measure(layers: Sequence[AdaptedLayer]) -> None:
    """Measure in every backward from now on; what is measured already goes on."""
    for layer in _untied(layers):
        if _hook(layer.module) is None:
            layer.module.register_forward_hook(_Measure(layer.adapter), with_kwargs=True)


def refuse_unmeasured(layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError, naming it, for a layer whose weight is not multiplied with the rows of its input."""
    for layer in layers:
        if layer.kind != "linear":
            raise ValueError(
                f"penalty='importance' is measured on linear layers; {layer.name} is of kind {layer.kind!r}: leave it "
                "out of target_modules, or use penalty='hadamard'"
            )


def measured(layers: Sequence[AdaptedLayer]) -> dict[str, Importance]:
    """The sums of every layer so far, by name, over all processes: a collective where there are several."""
    found, layers = [], _untied(layers)
    for layer in layers:
        hook, (out, in_) = _hook(layer.module), layer.shape
        device = layer.parameters()[0].device
        empty = Importance(torch.zeros(out, device=device), torch.zeros(in_, device=device))
        found.append(empty if hook is None or hook.sums is None else hook.sums.to(device))
    tensors = iter(summed([part for pair in found for part in pair]))
    return {layer.name: Importance(next(tensors), next(tensors)) for layer in layers}


def clear(layers: Sequence[AdaptedLayer], sums: Mapping[str, Importance] | None = None) -> None:
    """Begin anew, or from ``sums``."""
    for layer in _untied(layers):
        hook = _hook(layer.module)
        if hook is not None:
            hook.sums = None if sums is None else sums[layer.name]


def save(folder: str | Path, layers: Sequence[AdaptedLayer]) -> None:
    """Write what is measured of the task in training, for :func:`load`; every process calls it and one writes."""
    sums = measured(layers)
    if is_writer():
        tensors = {f"{name}.{side}": part.cpu() for name, held in sums.items() for side, part in held._asdict().items()}
        write_atomically(Path(folder) / FILE, lambda temporary: save_file(tensors, temporary))


def load(folder: str | Path, layers: Sequence[AdaptedLayer]) -> None:
    """Go on measuring from what :func:`save` wrote.

    Raises FileNotFoundError, OSError or ValueError where it is not there, cannot be read or is of other layers.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: what was measured of the task before this checkpoint would be lost to "
            "penalty='importance'; resume from a checkpoint that was written with it, or start the task afresh"
        )
    tensors, _ = read_tensors(path)
    sums = {}
    for layer in _untied(layers):
        device, (out, in_) = layer.parameters()[0].device, layer.shape
        found = [tensors.get(f"{layer.name}.{side}") for side in Importance._fields]
        shapes = [None if part is None else tuple(part.shape) for part in found]
        if shapes != [(out,), (in_,)]:
            raise ValueError(f"{path}, layer {layer.name!r}: expected shapes {[(out,), (in_,)]}, found {shapes}")
        # The sum over processes is all of it once.
        parts = (part if is_writer() else torch.zeros_like(part) for part in found if part is not None)
        sums[layer.name] = Importance(*parts).to(device)
    clear(layers, sums)


def stop(model: nn.Module) -> None:
    """Measure no more."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, _Measure):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def _untied(layers: Sequence[AdaptedLayer]) -> list[AdaptedLayer]:
    return [layer for layer in layers if layer.tied_to is None]


def _hook(module: nn.Module) -> _Measure | None:
    return next((hook for hook in module._forward_hooks.values() if isinstance(hook, _Measure)), None)
