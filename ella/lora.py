"""Every LoRA layer of a PEFT model as factors: ``ΔW = scaling · B @ A`` with ``A (r, in)`` and ``B (out, r)``.

What PEFT stores differs by layer kind; the classes here give all of them one shape. Layers whose update is not
``scaling · B @ A`` are refused with the reason.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftModel
from peft.tuners.lora import LoraConfig, LoraLayer, LoraModel
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper, _ConvNd
from torch import Tensor, nn

from .distributed import is_spread, shape_of, storage_of, whole

__all__ = [
    "STATE_PREFIX", "AdaptedLayer", "adapted_layers", "join_parts", "split_parts", "unsupported_config",
]  # fmt: skip

# What PEFT's state dicts put before the path of a module.
STATE_PREFIX = "base_model.model."
# Attributes of PEFT's A and B modules that tell the rank, with the weight's dimension that they repeat.
_SIZES = {
    nn.Linear: (("in_features", 1), ("out_features", 0)),
    nn.Conv1d: (("in_channels", 1), ("out_channels", 0)),
    nn.Conv2d: (("in_channels", 1), ("out_channels", 0)),
    nn.Conv3d: (("in_channels", 1), ("out_channels", 0)),
}
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
# Fields of a LoraConfig that make parameters train which no LoRA factor holds, or change how the factors act.
_REFUSED_FIELDS = {
    "trainable_token_indices": "trained token embeddings are no LoRA factors: they would not be in the past",
    "megatron_config": "Megatron tensor-parallel layers hold shards of the factors",
    "velora_config": "VeLoRA replaces the forward through which finished tasks act",
}
# Fields that are read here or by PEFT's layers alone, or that a variant or an initialisation refused above comes with.
_KNOWN_FIELDS = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "use_dora", "use_qalora",
    "qalora_group_size", "alora_invocation_tokens", "monteclora_config", "layer_replication", "runtime_config",
    "lora_bias", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "ensure_weight_tying",
}  # fmt: skip


@dataclass(frozen=True)
class AdaptedLayer:
    """One PEFT LoRA layer, the usual case: ``lora_A`` and ``lora_B`` are linear maps and their weights the factors.

    Attributes:
        name: path of the module in the base model, with the parameter's name behind it for expert parameters.
        path: the same as PEFT's state dicts have it, with every ``base_layer`` in it.
        module: the PEFT layer.
        adapter: name of the trained adapter.
        tied_to: name of an earlier layer whose factors share this one's storage, or None. Penalised once, there.
    """

    name: str
    path: str
    module: LoraLayer
    adapter: str
    tied_to: str | None = None

    kind: ClassVar[str] = "linear"
    # Whether the parameters are the factors themselves, so that a whole model can be read by loops in C.
    plain: ClassVar[bool] = True
    # Why the update cannot be added to a base weight, or None.
    unmergeable: ClassVar[str | None] = None

    def parameters(self, adapter: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        """``(A, B)`` as PEFT stores them, in whatever shape. Raises KeyError where the layer lacks the adapter."""
        adapter = adapter or self.adapter
        return self.module.lora_A[adapter].weight, self.module.lora_B[adapter].weight

    def has(self, adapter: str) -> bool:
        return adapter in self.module.lora_A

    def bias(self, adapter: str | None = None) -> nn.Parameter | None:
        """``lora_B``'s bias ``(out,)`` where ``lora_bias`` is set; it is part of the effect, not of ``ΔW``."""
        return self.module.lora_B[adapter or self.adapter].bias

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """:meth:`parameters` of the trained adapter with what messages call them."""
        return [(f"lora_{factor} of {self.name}", p) for factor, p in zip("AB", self.parameters(), strict=True)]

    def whole(self, adapter: str | None = None) -> tuple[Tensor, Tensor]:
        """:meth:`parameters`, detached and whole on every rank: a collective where they are spread over ranks."""
        a, b = self.parameters(adapter)
        return whole(a), whole(b)

    def all_parameters(self, adapter: str) -> list[nn.Parameter]:
        """Factors and bias of an adapter; empty where the layer lacks it."""
        return (
            [p for p in (*self.parameters(adapter), self.bias(adapter)) if p is not None] if self.has(adapter) else []
        )

    def slots(self, adapter: str) -> list[tuple[nn.Module, str]]:
        """Where the parameters of an adapter hang: modules and names in them."""
        a, b = self.module.lora_A[adapter], self.module.lora_B[adapter]
        return [(a, "weight"), (b, "weight"), *([] if b.bias is None else [(b, "bias")])]

    def scaling(self, adapter: str | None = None) -> float:
        """The layer's own ``α/r`` (rsLoRA and rank or alpha patterns included)."""
        return float(self.module.scaling[adapter or self.adapter])

    @property
    def n_parts(self) -> int:
        """Products ``B @ A`` in this layer: the number of experts, else 1."""
        return 1

    def factors(self, a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
        """:func:`split_parts` of tensors shaped like :meth:`parameters`."""
        return split_parts(a, b, self.n_parts)

    @property
    def tails(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Dimensions of ``A`` behind the rank and of ``B`` behind ``(out, r)``."""
        a, b = self.parameters()
        return tuple(shape_of(a)[1:]), tuple(shape_of(b)[2:])

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)`` of one part's ``ΔW``."""
        a, b = self.parameters()
        return shape_of(b)[0], math.prod(shape_of(a)[1:])

    def keys(self) -> tuple[str, str]:
        """Names of ``A`` and ``B`` in a saved adapter."""
        return f"{STATE_PREFIX}{self.path}.lora_A.weight", f"{STATE_PREFIX}{self.path}.lora_B.weight"

    @torch.no_grad()
    def write(self, adapter: str, parts: Sequence[tuple[Tensor, Tensor]], bias: Tensor | None) -> None:
        """Make or replace an adapter of scaling 1 with frozen float32 copies of ``parts`` and ``bias``."""
        # float32 whatever the base: entries near 1e-8 underflow in half precision.
        device = self.parameters()[0].device
        a, b, *rest = (
            nn.Parameter(t.to(device, torch.float32, copy=True), requires_grad=False)
            for t in (*join_parts(parts, *self.tails), *([] if bias is None else [bias]))
        )
        self._write(adapter, a, b, *rest)
        module, rank = self.module, parts[0][0].shape[0]
        module.r[adapter] = module.lora_alpha[adapter] = rank
        module.scaling[adapter] = 1.0
        module.use_rslora[adapter] = module.use_dora[adapter] = False
        module.lora_bias[adapter] = bias is not None
        module.lora_dropout[adapter] = nn.Identity()

    def _write(self, adapter: str, a: nn.Parameter, b: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        for holders, weight in ((self.module.lora_A, a), (self.module.lora_B, b)):
            # The trained module's twin: strides, paddings and whatever hooks put it on its device.
            trained = holders[self.adapter]
            holder = _twin(trained) if is_spread(trained.weight) else copy.deepcopy(trained)
            holder.weight = weight
            for size, dim in _SIZES.get(type(holder), ()):
                setattr(holder, size, weight.shape[dim])
            holder.train(self.module.training)
            holders[adapter] = holder
        self.module.lora_B[adapter].bias = bias

    def reset(self, init: bool | str) -> None:
        """A fresh adapter with no effect, in place: the parameters keep their identity, gradients are dropped."""
        module, name = self.module, self.adapter
        if init == "orthogonal" and name in module.lora_A:  # PEFT's embeddings have none
            before = self.parameters()
            module.orthogonal_init(name)
            with torch.no_grad():
                for old, new in zip(before, self.parameters(), strict=True):
                    old.copy_(new)
            module.lora_A[name].weight, module.lora_B[name].weight = before
        else:
            # EVA's directions came from data and False means random weights with an effect: both restart as usual.
            module.reset_lora_parameters(name, "gaussian" if init == "gaussian" else True)
        for parameter in self.all_parameters(name):
            parameter.grad = None


class EmbeddingLayer(AdaptedLayer):
    """Factors are parameters of the layer itself."""

    kind: ClassVar[str] = "embedding"
    plain: ClassVar[bool] = False

    def parameters(self, adapter: str | None = None) -> tuple[nn.Parameter, nn.Parameter]:
        adapter = adapter or self.adapter
        return self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter]

    def has(self, adapter: str) -> bool:
        return adapter in self.module.lora_embedding_A

    def bias(self, adapter: str | None = None) -> None:
        return None

    def slots(self, adapter: str) -> list[tuple[nn.Module, str]]:
        return [(self.module.lora_embedding_A, adapter), (self.module.lora_embedding_B, adapter)]

    def keys(self) -> tuple[str, str]:
        return f"{STATE_PREFIX}{self.path}.lora_embedding_A", f"{STATE_PREFIX}{self.path}.lora_embedding_B"

    def _write(self, adapter: str, a: nn.Parameter, b: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        self.module.lora_embedding_A[adapter], self.module.lora_embedding_B[adapter] = a, b


class ConvLayer(AdaptedLayer):
    """A convolution into ``r`` channels and one of width 1 out of them; the filters of ``A`` are flattened."""

    kind: ClassVar[str] = "conv"
    plain: ClassVar[bool] = False


class AttentionLayer(AdaptedLayer):
    """``nn.MultiheadAttention``'s projections: read as weights, merged for every forward by PEFT."""

    kind: ClassVar[str] = "attention"
    unmergeable: ClassVar[str | None] = "attention layers hold no weight of their own to add to"


class ExpertsLayer(AdaptedLayer):
    """An expert parameter of three dimensions: one update per expert."""

    kind: ClassVar[str] = "experts"
    plain: ClassVar[bool] = False
    unmergeable: ClassVar[str | None] = "expert parameters are wrapped, not layers"

    @property
    def n_parts(self) -> int:
        return self.module.num_experts


def _twin(module: nn.Module) -> nn.Module:
    """A module like ``module`` without parameters, hooks or what an engine has put on it."""
    cls: Any = next(cls for cls in type(module).__mro__ if cls in _SIZES)
    twin = cls.__new__(cls)
    nn.Module.__init__(twin)
    # What the class itself sets; engines note theirs on the module too.
    names = {*cls.__constants__, "transposed", "_reversed_padding_repeated_twice"}
    vars(twin).update({name: value for name, value in vars(module).items() if name in names})
    for name in ("weight", "bias"):
        twin.register_parameter(name, None)
    made: nn.Module = twin
    return made


def split_parts(a: Tensor, b: Tensor, n: int) -> list[tuple[Tensor, Tensor]]:
    """``(A (r, in), B (out, r))`` of ``n`` parts in tensors as PEFT stores them.

    Views of contiguous tensors, so gradients can be added through them.
    """
    if n == 1:
        return [(a.flatten(1), b.flatten(1))]
    a, b = a.view(n, -1, a.shape[1]), b.view(b.shape[0], -1, n)
    return [(a[part], b[:, :, part]) for part in range(n)]


def join_parts(
    parts: Sequence[tuple[Tensor, Tensor]], tail_a: Sequence[int], tail_b: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """The inverse of :func:`split_parts` for factors of any rank; ``tail_a`` and ``tail_b`` are filter dimensions."""
    if len(parts) == 1:
        ((a, b),) = parts
        return a.reshape(-1, *tail_a).contiguous(), b.reshape(*b.shape, *tail_b).contiguous()
    a, b = torch.cat([part[0] for part in parts]), torch.stack([part[1] for part in parts], dim=2)
    return a.contiguous(), b.reshape(b.shape[0], -1).contiguous()


def adapted_layers(
    model: PeftModel, adapter: str, *, skip_unsupported: bool = False, warn: bool = True, shapes_only: bool = False
) -> list[AdaptedLayer]:
    """The LoRA layers of ``adapter``, in module order.

    Args:
        model: a ``PeftModel`` with LoRA.
        adapter: name of the adapter.
        skip_unsupported: leave layers out that are refused; ``warn`` says which.
        shapes_only: nothing but shapes will be asked for, so that weights on the meta device will do.

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
    seen: dict[frozenset[int], str] = {}
    for layer in _lora_layers(model, adapter):
        reason = general or _unsupported(layer, adapter, shapes_only)
        if reason:
            refused[layer.name] = reason
            continue
        storage = frozenset(key for p in layer.parameters() if (key := storage_of(p)) is not None)
        found.append(dataclasses.replace(layer, tied_to=seen.get(storage) if storage else None))
        seen.setdefault(storage, layer.name)
    if refused and not (skip_unsupported and found):
        listed = "; ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:4])
        more = f" (and {len(refused) - 4} more)" if len(refused) > 4 else ""
        hint = "" if skip_unsupported else "; skip_unsupported=True leaves them out"
        raise ValueError(f"ELLA cannot penalise {len(refused)} of the LoRA layers: {listed}{more}{hint}")
    if refused and warn:
        warnings.warn(
            f"ELLA leaves out {len(refused)} LoRA layers; they are trained on without penalty or past: "
            + "; ".join(f"{name}: {reason}" for name, reason in refused.items()),
            stacklevel=3,
        )
    if not found:
        raise ValueError(f"adapter {adapter!r} has no LoRA layers")
    return found


def _lora_layers(model: PeftModel, adapter: str) -> Iterator[AdaptedLayer]:
    inside_attention: set[int] = set()
    for path, module in model.base_model.model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if adapter not in module.lora_A and adapter not in module.lora_embedding_A:
            continue
        name = path.removesuffix(".base_layer").replace(".base_layer.", ".")
        if isinstance(module, ParamWrapper):
            yield ExpertsLayer(f"{name}.{module.parameter_name}", path, module, adapter)
        elif isinstance(module, MultiheadAttention):
            inside_attention.add(id(module.base_layer.out_proj))
            yield AttentionLayer(name, path, module, adapter)
        elif isinstance(module, Embedding):
            yield EmbeddingLayer(name, path, module, adapter)
        elif isinstance(module, _ConvNd):
            yield ConvLayer(name, path, module, adapter)
        else:
            # Inside nn.MultiheadAttention the output projection is read as a weight: its forward never runs.
            kind = AttentionLayer if id(module) in inside_attention else AdaptedLayer
            yield kind(name, path, module, adapter)


def unsupported_config(config: LoraConfig) -> str | None:
    """Why no layer of an adapter with this configuration can be penalised, or None."""
    peft_type = str(getattr(config.peft_type, "value", config.peft_type))
    if peft_type != "LORA":
        return f"{peft_type} is not plain LoRA: its update is not scaling · B @ A"
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        return f"init_lora_weights={init!r} changes the base weight, so the factors alone are not the update"
    if config.use_qalora:
        return "QA-LoRA pools the input over groups before A"
    if config.bias != "none":
        return f"bias={config.bias!r} trains biases of the base model, which no LoRA factor holds; lora_bias is kept"
    for name, reason in _REFUSED_FIELDS.items():
        if getattr(config, name, None):
            return f"{name}: {reason}"
    for field in dataclasses.fields(config):
        if field.name not in _KNOWN_FIELDS and field.name not in _REFUSED_FIELDS:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if getattr(config, field.name) != default:
                return f"{field.name}={getattr(config, field.name)!r} is a LoraConfig field this version does not know"
    return None


def _unsupported(layer: AdaptedLayer, adapter: str, shapes_only: bool) -> str | None:
    module = layer.module
    variant = type(module.lora_variant.get(adapter)).__name__
    for prefix, reason in _VARIANTS.items():
        if variant.startswith(prefix):
            return reason
    if isinstance(layer, ConvLayer) and module.get_base_layer().groups != 1:
        return f"a grouped convolution (groups={module.get_base_layer().groups}) has no one factorised update"
    if type(module).__name__ == "LoraParallelLinear":
        return "Megatron tensor-parallel layers hold shards of the factors"
    if not shapes_only and any(p.device.type == "meta" for p in layer.all_parameters(adapter)):
        return "its LoRA weights are offloaded (on the meta device); keep adapters in memory, offload base layers only"
    return None
