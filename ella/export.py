"""Finished and current tasks as one plain LoRA of scaling 1, which any engine loads without this package."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraConfig
from safetensors.torch import save_file
from torch import Tensor

from ella_kernels import LowRank

from .atomic import make_folder, replacing, write_atomically, write_text_atomically
from .checkpoint import PastState, StoredLayer, save_past
from .distributed import SPREAD, is_writer, spread_by, wait_for_all, whole
from .knowledge import left_out_ranks, peft_ranks, plain_config
from .lora import AdaptedLayer, join_parts
from .past import Past, described, fold_layer

__all__ = [
    "VLLM_RANKS", "ExportReport", "export_live", "factor_tensors", "fold_for_export", "new_folder",
    "write_adapter",
]  # fmt: skip

# max_lora_rank of vLLM.
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        rank: of every layer of the adapter; layers that need less are filled up with zeros.
        relative_error: ``‖dropped‖_F / ‖W‖_F`` per layer; 0 where nothing was cut.
    """

    rank: int
    relative_error: dict[str, float]

    @property
    def max_relative_error(self) -> float:
        return max(self.relative_error.values(), default=0.0)

    @property
    def vllm_rank(self) -> int | None:
        """The smallest ``max_lora_rank`` with which vLLM serves it; None where the rank is beyond all of them."""
        return next((rank for rank in VLLM_RANKS if rank >= self.rank), None)

    def __str__(self) -> str:
        served = f"vLLM serves it with max_lora_rank={self.vllm_rank}"
        if self.vllm_rank is None:
            served = f"vLLM serves ranks up to {VLLM_RANKS[-1]}: cut it with rank="
        return f"rank {self.rank}, relative error {self.max_relative_error:.1e}; {served}"


def factor_tensors(
    parts: list[tuple[Tensor, Tensor]], keys: tuple[str, str], tails: tuple, bias: Tensor | None
) -> dict[str, Tensor]:
    """One layer's tensors under the names of a saved adapter."""
    a, b = join_parts(parts, *tails)
    found = {keys[0]: a.float(), keys[1]: b.float()}
    if bias is not None:
        found[keys[1].removesuffix("weight") + "bias"] = bias.float()
    return found


def export_live(
    model: PeftModel, adapter: str, layers: Sequence[AdaptedLayer], past: Past, directory: str | Path, rank: int | None
) -> ExportReport:
    """:meth:`ella.EllaRegularizer.export_adapter` of a model whose trained adapter is ``adapter``."""
    out, trained = new_folder(directory), model.peft_config[adapter]
    is_spread = spread_by(model, layers) in SPREAD
    current = {
        layer.name: (
            layer.factors(*layer.whole()),
            layer.scaling(),
            None if (bias := layer.bias()) is None else whole(bias),
        )
        for layer in layers
    }
    stored, report = fold_for_export({layer.name: past.stored(layer) for layer in layers}, current, rank)
    tensors = get_peft_model_state_dict(model, adapter_name=adapter)
    for layer in layers:
        kept = stored[layer.name]
        tensors |= factor_tensors(kept.factors(report.rank), layer.keys(), layer.tails, kept.bias)
    ranks = peft_ranks(layers, dict.fromkeys(stored, report.rank))
    config = plain_config(trained, ranks, left_out_ranks(model, layers, adapter))
    if not is_spread:
        write_adapter(out, config, tensors)
        return report
    if is_writer():
        write_adapter(out, config, tensors)
    wait_for_all()
    return report


def fold_for_export(
    past: Mapping[str, StoredLayer | None], current: Mapping[str, tuple], rank: int | None
) -> tuple[dict[str, StoredLayer], ExportReport]:
    """Past plus ``current`` (parts, scaling, bias) per layer, cut to ``rank`` and without components of no effect."""
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int)):
        raise TypeError(f"rank must be an int or None, found {rank!r}")
    if rank is not None and rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}")
    stored = {}
    for name, (parts, scaling, bias) in current.items():
        before = past[name]
        updates = parts or [(part.right[:0], part.left[:, :0]) for part in (before.parts if before else ())]
        stored[name] = fold_layer(before, updates, scaling, bias, rank or sys.maxsize)
    needed = max(_numerical_rank(layer) for layer in stored.values())
    stored = {
        name: StoredLayer([_cut(part, needed) for part in layer.parts], layer.bias, layer.relative_error)
        for name, layer in stored.items()
    }
    return stored, ExportReport(needed, {name: layer.relative_error[-1] for name, layer in stored.items()})


def _numerical_rank(stored: StoredLayer) -> int:
    # Columns of an even split are ordered, their squared norms the singular values.
    sizes = torch.stack([part.left.double().square().sum(0) for part in stored.parts]).amax(0)
    return max(1, int((sizes > 1e-10 * sizes.amax()).sum())) if sizes.numel() else 1


def _cut(part: LowRank, rank: int) -> LowRank:
    return part._replace(left=part.left[:, :rank], right=part.right[:rank])


def new_folder(path: str | Path) -> Path:
    """``path``, refused with FileExistsError unless it is absent or an empty folder."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not an empty folder; give a new one")
    return path


def write_adapter(
    folder: Path, config: LoraConfig, tensors: Mapping[str, Tensor], state: PastState | None = None
) -> None:
    """A PEFT adapter folder, and ELLA's state beside it, whole or not at all. Raises OSError, naming ``folder``."""
    held = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    config = copy.copy(config)
    config.inference_mode = True
    text = json.dumps(described(config), indent=2, sort_keys=True)
    make_folder(folder.parent)
    with replacing(folder) as made:
        made.mkdir()
        weights = made / "adapter_model.safetensors"
        write_atomically(weights, lambda path: save_file(held, path, metadata={"format": "pt"}))
        write_text_atomically(made / "adapter_config.json", text)
        if state is not None:
            save_past(made, state)
