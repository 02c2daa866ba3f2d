"""Every LoRA layer of a PEFT model as factors: ``ΔW = scaling · B @ A`` with ``A (r, in)`` and ``B (out, r)``.

What PEFT stores differs by layer kind; the views here give all of them one shape. Layers whose update is not
``scaling · B @ A`` are refused with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from torch import Tensor, nn

__all__ = ["AdaptedLayer", "adapted_layers", "unsupported_config"]

# Variants whose update is not scaling · B @ A on every token, by the PEFT class that implements them.
_VARIANTS = {
    "Dora": "DoRA rescales every row by a trained magnitude over the norm of base weight and update together",
    "_DoraConv": "DoRA rescales every filter by a trained magnitude over the norm of base weight and update together",
    "Kasa": "KaSA truncates the base weight and puts trained singular values between the factors",
    "BdLora": "BD-LoRA stores block-diagonal factors whose stored product is not the update",
    "Arrow": "Arrow routes every token to other experts, so there is no one update",
    "ALora": "aLoRA acts only after its invocation tokens, which a past added everywhere would not",
    "Monteclora": "MonteCLoRA perturbs A by samples, so the factors alone are not the update",
    "MiCA": "MiCA freezes B at directions of the base weight, so a fresh adapter per task is not defined",
}
# Initialisations that subtract something from the base weight: a fresh adapter would do so again for every task.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdaptedLayer:
    """One PEFT LoRA layer.

    Attributes:
        name: path of the module in the base model, with the parameter's name behind it for expert parameters.
        module: the PEFT layer.
        kind: "linear", "embedding", "conv", "attention" or "experts". The last two take no hook.
        adapter: name of the trained adapter.
        tied_to: name of an earlier layer whose factors share this one's storage, or None. Penalised once, there.
    """

    name: str
    module: LoraLayer
    kind: str
    adapter: str
    tied_to: str | None = None

    def parameters(self, adapter: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A, B)`` as PEFT stores them, in whatever shape."""
        adapter = adapter or self.adapter
        if self.kind == "embedding":
            return self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter]
        return self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight

    def bias(self, adapter: str | None = None) -> nn.Parameter | None:
        """``lora_B``'s bias ``(out,)`` where ``lora_bias`` is set; it is part of the effect, not of ``ΔW``."""
        if self.kind == "embedding":
            return None
        return self.module.lora_B[adapter or self.adapter].bias

    def scaling(self, adapter: str | None = None) -> float:
        """The layer's own ``α/r`` (rsLoRA and rank or alpha patterns included)."""
        return float(self.module.scaling[adapter or self.adapter])

    @property
    def n_parts(self) -> int:
        """Products ``B @ A`` in this layer: the number of experts, else 1."""
        return self.module.num_experts if self.kind == "experts" else 1

    def factors(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """``(A (r, in), B (out, r))`` of tensors shaped like :meth:`parameters`, one pair per part.

        Views of contiguous tensors, so gradients can be added through them.
        """
        if self.kind == "conv":
            return [(a.flatten(1), b.flatten(1))]
        if self.kind == "experts":
            n = self.n_parts
            experts_a = a.view(n, -1, a.shape[1])
            experts_b = b.view(b.shape[0], -1, n)
            return [(experts_a[e], experts_b[:, :, e]) for e in range(n)]
        return [(a, b)]

    def pack(self, parts: list[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
        """The inverse of :meth:`factors` for new factors of ``rank`` components: tensors as PEFT stores them."""
        if self.kind == "experts":
            a = torch.cat([part[0] for part in parts])
            b = torch.stack([part[1] for part in parts], dim=2)
            return a.contiguous(), b.reshape(b.shape[0], -1).contiguous()
        a, b = parts[0]
        if self.kind == "conv":
            old_a, old_b = self.parameters()
            a, b = a.reshape(rank, *old_a.shape[1:]), b.reshape(b.shape[0], rank, *old_b.shape[2:])
        return a.contiguous(), b.contiguous()

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one part's ``ΔW``."""
        a, b = self.factors(*(p.detach() for p in self.parameters()))[0]
        return b.shape[0], a.shape[1]

    def reset(self, init: bool | str) -> None:
        """A fresh adapter with no effect, in place: the parameters keep their identity, gradients are dropped."""
        module, name = self.module, self.adapter
        if init == "orthogonal":
            before = self.parameters()
            module.orthogonal_init(name)
            with torch.no_grad():
                for old, new in zip(before, self.parameters(), strict=True):
                    old.copy_(new)
            module.lora_A[name].weight, module.lora_B[name].weight = before
        else:
            # EVA's directions came from data and False means random weights with an effect: both restart as usual.
            module.reset_lora_parameters(name, "gaussian" if init == "gaussian" else True)
        for parameter in (*self.parameters(), self.bias()):
            if parameter is not None:
                parameter.grad = None


def adapted_layers(model: PeftModel, adapter: str, *, skip_unsupported: bool = False) -> list[AdaptedLayer]:
    """The LoRA layers of ``adapter``, in module order.

    Args:
        model: a ``PeftModel`` with LoRA.
        adapter: name of the adapter.
        skip_unsupported: warn about layers that are refused and leave them out.

    Raises:
        TypeError: ``model`` is no PEFT LoRA model.
        ValueError: no such adapter, no supported layer, or a refused layer (named, with the reason).
    """
    if not isinstance(model, PeftModel) or not isinstance(model.base_model, LoraModel):
        raise TypeError(f"expected a PeftModel with LoRA adapters, found {type(model).__name__}")
    if adapter not in model.peft_config:
        raise ValueError(f"the model has no adapter {adapter!r}; it has {sorted(model.peft_config)}")
    general = unsupported_config(model.peft_config[adapter])
    found, refused = [], {}
    seen: dict[tuple[int, int], str] = {}
    for name, module, kind in _lora_modules(model, adapter):
        reason = general or _unsupported(module, kind, adapter)
        if reason:
            refused[name] = reason
            continue
        layer = AdaptedLayer(name, module, kind, adapter)
        storage = frozenset(p.data_ptr() for p in layer.parameters() if p.numel() and p.device.type != "meta")
        tied_to = seen.get(storage) if storage else None
        seen.setdefault(storage, name)
        found.append(AdaptedLayer(name, module, kind, adapter, tied_to))
    if refused and not (skip_unsupported and found):
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:4])
        more = f" (and {len(refused) - 4} more)" if len(refused) > 4 else ""
        hint = "" if skip_unsupported else "; skip_unsupported=True leaves them out"
        raise ValueError(f"ELLA cannot penalise {len(refused)} of the LoRA layers: {listed}{more}{hint}")
    if refused:
        warnings.warn(
            f"ELLA leaves out {len(refused)} LoRA layers; they are trained on without penalty or past: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items()),
            stacklevel=3,
        )
    if not found:
        raise ValueError(f"adapter {adapter!r} has no LoRA layers")
    return found


def _lora_modules(model: PeftModel, adapter: str) -> Iterator[tuple[str, LoraLayer, str]]:
    attention_outputs: set[int] = set()
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        has_adapter = adapter in module.lora_A or adapter in module.lora_embedding_A
        if not has_adapter:
            continue
        name = path.removesuffix(".base_layer").replace(".base_layer.", ".")
        if isinstance(module, ParamWrapper):
            yield f"{name}.{module.parameter_name}", module, "experts"
        elif isinstance(module, MultiheadAttention):
            attention_outputs.add(id(module.base_layer.out_proj))
            yield name, module, "attention"
        elif isinstance(module, Embedding):
            yield name, module, "embedding"
        elif isinstance(module, _ConvNd):
            yield name, module, "conv"
        else:
            # Inside nn.MultiheadAttention the output projection is read as a weight: neither forward nor hook run.
            yield name, module, "attention" if id(module) in attention_outputs else "linear"


def unsupported_config(config: LoraConfig) -> str | None:
    """Why no layer of an adapter with this configuration can be penalised, or None."""
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        return f"init_lora_weights={init!r} changes the base weight, so the factors alone are not the update"
    if config.use_qalora:
        return "QA-LoRA pools the input over groups before A"
    return None


def _unsupported(module: Any, kind: str, adapter: str) -> str | None:
    variant = type(module.lora_variant.get(adapter)).__name__
    for prefix, reason in _VARIANTS.items():
        if variant.startswith(prefix):
            return reason
    if kind == "conv" and module.get_base_layer().groups != 1:
        return f"a grouped convolution (groups={module.get_base_layer().groups}) has no one factorised update"
    if type(module).__name__ == "LoraParallelLinear":
        return "Megatron tensor-parallel layers hold shards of the factors"
    return None
