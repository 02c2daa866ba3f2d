"""The past: finished tasks' aggregated update, kept in a frozen PEFT adapter ``ella_past`` of scaling 1.

``lora_B`` holds ``L`` and ``lora_A`` holds ``R`` of ``W_past = L·R``. The adapter is inactive for PEFT: a forward hook
on the base layer adds its output, so that ``disable_adapter()`` gives the model before the current task and Trainer,
TRL and task heads see one adapter. Attention modules and expert parameters have no forward to hook; there, two adapters
are active and the past is declared frozen.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from ella_kernels import LowRank
from ella_kernels.lowrank import split_evenly, svd_factors

from .checkpoint import StoredLayer
from .lora import AdaptedLayer

__all__ = ["PAST", "FoldReport", "fold_factors", "fold_layer", "install_past", "past_config", "read_past", "write_past"]

PAST = "ella_past"


@dataclass(frozen=True)
class FoldReport:
    """What folding one task did.

    Attributes:
        task: its name.
        ranks: components stored per layer afterwards.
        relative_error: ``‖dropped‖_F / ‖W_past‖_F`` per layer; 0 while the past is exact.
    """

    task: str
    ranks: dict[str, int]
    relative_error: dict[str, float]

    @classmethod
    def of(cls, task: str, stored: Mapping[str, StoredLayer]) -> FoldReport:
        """The report on layers whose last fold was ``task``."""
        return cls(
            task,
            {name: layer.rank for name, layer in stored.items()},
            {name: layer.relative_error[-1] for name, layer in stored.items()},
        )

    @property
    def max_relative_error(self) -> float:
        return max(self.relative_error.values(), default=0.0)


def fold_factors(
    past: LowRank | None, lora_A: Tensor, lora_B: Tensor, scaling: float, max_rank: int
) -> tuple[LowRank, float]:
    """``W_past + scaling · B A`` as even SVD factors of at most ``max_rank`` components.

    Args:
        past: the past so far, or None.
        lora_A: ``(r, in)``. lora_B: ``(out, r)``.
        max_rank: cap; beyond it the smallest components are dropped and their energies added to those stored
            (the sum over folds leaves out the cross terms between what was dropped at different times).

    Returns:
        The new past in float32, columns ordered by singular value, and the relative Frobenius error of this fold.
    """
    left, right = scaling * lora_B.detach().double(), lora_A.detach().double()
    if past is not None:
        left = torch.cat([past.left.double(), left], 1)
        right = torch.cat([past.right.double(), right], 0)
    u, s, vh = svd_factors(left, right)
    total = s.square().sum().item()
    error = math.sqrt(s[max_rank:].square().sum().item() / total) if total > 0 else 0.0
    folded = split_evenly(u, s, vh, max_rank, torch.float32)
    if past is not None and past.row_energy is not None:
        rows, cols = past.row_energy, past.col_energy
        if folded.row_energy is not None:
            rows, cols = rows + folded.row_energy, cols + folded.col_energy
        folded = folded._replace(row_energy=rows, col_energy=cols)
    return folded, error


def fold_layer(
    before: StoredLayer | None,
    parts: Sequence[tuple[Tensor, Tensor]],
    scaling: float,
    bias: Tensor | None,
    max_rank: int,
) -> StoredLayer:
    """:func:`fold_factors` of every part ``(A, B)`` of a layer, and the sum of the scaled ``lora_B`` biases."""
    pasts = [None] * len(parts) if before is None else before.parts
    folded = [fold_factors(past, a, b, scaling, max_rank) for past, (a, b) in zip(pasts, parts, strict=True)]
    total = None if before is None else before.bias
    if bias is not None:
        scaled = scaling * bias.detach().float()
        total = scaled if total is None else total + scaled
    errors = [] if before is None else before.relative_error
    return StoredLayer([part for part, _ in folded], total, [*errors, max(error for _, error in folded)])


class PastHook:
    """Forward hook of a base layer: adds the past's output. A class, so that copying a model copies its hooks."""

    def __init__(self, layer: AdaptedLayer):
        self.module, self.kind = layer.module, layer.kind

    def __call__(self, base: nn.Module, args: tuple, output: Tensor) -> Tensor:
        module = self.module
        stored = module.lora_embedding_B if self.kind == "embedding" else module.lora_B
        # Someone else already adds it: PEFT merged it, or made it active.
        active = PAST in module.active_adapters and not module.disable_adapters
        if PAST not in stored or PAST in module.merged_adapters or active:
            return output
        return (output + self._past_output(args[0])).to(output.dtype)

    def _past_output(self, x: Tensor) -> Tensor:
        module = self.module
        if self.kind != "embedding":
            a, b = module.lora_A[PAST], module.lora_B[PAST]
            return b(a(x.to(a.weight.dtype)))
        found = module._embed(x, module.lora_embedding_A[PAST].T) @ module.lora_embedding_B[PAST].T
        scale = module._get_embed_scale()
        return found if scale is None else found * scale.to(found.dtype)


def install_past(layers: Iterable[AdaptedLayer], *, in_forward: bool = True) -> None:
    """Make the stored past act in the forward (or not: ``in_forward=False``), once, however often this is called."""
    for layer in layers:
        base = layer.module.get_base_layer()
        for key, hook in list(base._forward_hooks.items()):
            if isinstance(hook, PastHook):
                del base._forward_hooks[key]
        for parameter in _stored_parameters(layer):
            parameter.requires_grad_(False)
        if not in_forward:
            continue
        if layer.kind in ("attention", "experts"):
            activate_past(layer)
        else:
            base.register_forward_hook(PastHook(layer))


def activate_past(layer: AdaptedLayer) -> None:
    """Keep the past active beside the trained adapter in a layer that takes no hook; nothing where it already is."""
    module = layer.module
    if PAST not in module.lora_A or PAST in module.active_adapters or PAST in module.merged_adapters:
        return
    module.frozen_peft_weight_names = {**module.frozen_peft_weight_names, PAST: ("lora_A", "lora_B")}
    flags = [p.requires_grad for p in module.parameters()]
    module.set_adapter([*module.active_adapters, PAST])
    for parameter, flag in zip(module.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)


def past_config(trained: LoraConfig, ranks: Mapping[str, int]) -> LoraConfig:
    """The configuration of the past adapter: the trained one's layers, plain LoRA, scaling 1, ``ranks`` per layer."""
    config = copy.deepcopy(trained)
    common = max(ranks.values(), default=1)
    others = {name: rank for name, rank in ranks.items() if rank != common}
    plain: dict[str, Any] = {
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": False,
        "inference_mode": True,
        "bias": "none",
        "modules_to_save": None,
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_bdlora": None,
        "arrow_config": None,
        "alora_invocation_tokens": None,
        "velora_config": None,
        "monteclora_config": None,
        "kasa_config": None,
        "eva_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "ensure_weight_tying": False,
    }
    for name, value in plain.items():
        if hasattr(config, name):
            setattr(config, name, value)
    return config


def write_past(model: PeftModel, layers: list[AdaptedLayer], stored: Mapping[str, StoredLayer]) -> None:
    """Put ``stored`` into the model's past adapter, made here if missing; nothing else in the model changes."""
    config = past_config(model.peft_config[layers[0].adapter], _peft_ranks(layers, stored))
    flags = [(p, p.requires_grad) for name, p in model.named_parameters() if f".{PAST}." not in name]
    # New linear layers draw an initialisation that is overwritten: the caller's random stream is left alone.
    with torch.random.fork_rng(devices=[]):
        if PAST not in model.peft_config:
            # Not the task classes' own add_adapter, which would copy the task head for the past as well.
            PeftModel.add_adapter(model, PAST, config)
        for layer in layers:
            rank = stored[layer.name].rank
            layer.module.update_layer(PAST, r=rank, lora_alpha=rank, config=config)
    model.peft_config[PAST] = config
    for layer in layers:
        _put(layer, stored[layer.name])
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


def read_past(layer: AdaptedLayer) -> list[LowRank] | None:
    """The layer's factors, one :class:`~ella_kernels.LowRank` of views per part, no energies; None without a past."""
    parameters = _stored_parameters(layer)
    if not parameters:
        return None
    a, b = (p.detach() for p in parameters[:2])
    return [LowRank(left, right) for right, left in layer.factors(a, b)]


def _stored_parameters(layer: AdaptedLayer) -> list[nn.Parameter]:
    stored = layer.module.lora_embedding_A if layer.kind == "embedding" else layer.module.lora_A
    if PAST not in stored:
        return []
    return [p for p in (*layer.parameters(PAST), layer.bias(PAST)) if p is not None]


def _put(layer: AdaptedLayer, stored: StoredLayer) -> None:
    device = layer.parameters()[0].device
    a, b = layer.pack([(part.right, part.left) for part in stored.parts], stored.rank)
    # float32 whatever the base: entries near 1e-8 underflow in half precision. New tensors, so nothing stays tied.
    a, b = (nn.Parameter(t.to(device, torch.float32, copy=True), requires_grad=False) for t in (a, b))
    module = layer.module
    if layer.kind == "embedding":
        module.lora_embedding_A[PAST], module.lora_embedding_B[PAST] = a, b
        return
    module.lora_A[PAST].weight, module.lora_B[PAST].weight = a, b
    if stored.bias is not None:
        module.lora_B[PAST].bias = nn.Parameter(stored.bias.to(device, torch.float32, copy=True), requires_grad=False)


def _peft_ranks(layers: Iterable[AdaptedLayer], stored: Mapping[str, StoredLayer]) -> dict[str, int]:
    """Ranks by the module path that PEFT matches: an expert wrapper's module, an attention module as a whole."""
    ranks = {}
    for layer in layers:
        if layer.kind == "attention" and not isinstance(layer.module, MultiheadAttention):
            continue  # takes the rank of the attention it is inside of
        name = layer.name.removesuffix(f".{layer.module.parameter_name}") if layer.kind == "experts" else layer.name
        ranks[name] = stored[layer.name].rank
    return ranks
