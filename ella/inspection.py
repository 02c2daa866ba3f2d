"""What ``ella inspect`` prints: a saved past, layer by layer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from .checkpoint import PAST_FILE, PastState, StoredLayer, load_past

__all__ = ["describe_state"]


def describe_state(directory: str | Path) -> str:
    """Text about the past saved in ``directory``, or about every one below a run's output folder.

    Raises FileNotFoundError when there is none, OSError and ValueError as :func:`~ella.checkpoint.load_past`.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder at {folder}")
    for attempt in range(3):
        found = [folder] if (folder / PAST_FILE).exists() else sorted(_saved_below(folder))
        try:
            states = [load_past(path) for path in found]
            break
        except FileNotFoundError:
            # A run that goes on replaces its states, and may have done so since they were found.
            if attempt == 2:
                raise
    if not found:
        raise FileNotFoundError(f"no {PAST_FILE} in or below {folder}; expected a saved regularizer or a run's output")
    return "\n\n".join(map(_describe, found, states))


def _saved_below(folder: Path) -> Iterator[Path]:
    seen = set()  # a link may lead back up
    for path, folders, files in os.walk(folder, followlinks=True):
        # Hidden ones are a run's half-written states.
        folders[:] = [name for name in folders if not name.startswith(".")]
        if (real := os.path.realpath(path)) in seen:
            folders.clear()
            continue
        seen.add(real)
        if PAST_FILE in files:
            yield Path(path)


def _describe(path: Path, state: PastState) -> str:
    config = ", ".join(f"{key} {value}" for key, value in state.config.items())
    lines = [f"{path}", f"tasks: {', '.join(state.tasks) or 'none yet'}", f"config: {config}"]
    if not state.layers:
        return "\n".join([*lines, f"{len(state.shapes)} layers, no past yet"])
    width = max(len(name) for name in state.layers)
    lines.append(f"{'layer':{width}}  {'shape':>14}  {'rank':>5}  {'energy kept':>11}  {'bytes':>10}  {'dense':>12}")
    total = dense = 0
    for name, layer in state.layers.items():
        n, out, in_ = state.shapes[name]
        stored = sum(t.numel() * t.element_size() for t in layer.tensors().values())
        total, dense = total + stored, dense + 4 * n * out * in_
        shape = f"{out}×{in_}" if n == 1 else f"{n}×{out}×{in_}"
        kept = f"{100 * _energy_kept(layer):.2f} %"
        lines.append(
            f"{name:{width}}  {shape:>14}  {layer.rank:>5}  {kept:>11}  {stored:>10,}  {4 * n * out * in_:>12,}"
        )
    lines.append(
        f"{len(state.layers)} layers, {total:,} bytes; as dense float32 matrices {dense:,} bytes "
        f"({dense / max(total, 1):.1f} times as many)"
    )
    return "\n".join(lines)


def _energy_kept(layer: StoredLayer) -> float:
    """Share of ``‖W_past‖_F²`` in the stored factors, the rest being in the energies."""
    kept = sum(float((part.left.square().sum(0) * part.right.square().sum(1)).sum()) for part in layer.parts)
    dropped = sum(0.0 if part.row_energy is None else float(part.row_energy.sum()) for part in layer.parts)
    return kept / (kept + dropped) if kept + dropped > 0 else 1.0
