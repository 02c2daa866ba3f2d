"""The shapes of a model and its LoRA layers from a configuration alone: built on the meta device, adapted by PEFT."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from ella.config import EllaConfig
from ella.lora import AdaptedLayer, adapted_layers

from .presets import PRESETS

__all__ = ["Layer", "ModelShapes", "Weight", "auto_class", "load_config", "model_shapes"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ADAPTER = "default"


@dataclass(frozen=True)
class Weight:
    """One parameter of the model.

    Attributes:
        shape: its shape. itemsize: bytes of an element.
        unit: the transformer block that it is in, or "" (what FSDP2 gathers together).
        active: share of it that one token is multiplied by: 0 for what is looked up, less than 1 for experts.
        is_packed: whether a 4-bit base stores it in 4 bits.
        is_trained: beside the LoRA factors (``modules_to_save``).
    """

    shape: tuple[int, ...]
    itemsize: int
    unit: str = ""
    active: float = 0.0
    is_packed: bool = False
    is_trained: bool = False

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def bytes(self, itemsize: int, gpus: int = 1) -> int:
        """Of one of ``gpus`` equal parts, with elements of at most ``itemsize`` bytes."""
        part = -(-self.numel // gpus)
        return packed_bytes(part) if self.is_packed else part * min(itemsize, self.itemsize)


def packed_bytes(n: int) -> int:
    """NF4 with doubly quantised scales: half a byte, a byte per 64 and a float32 per 256 of those; two tables."""
    scales = -(-n // 64)
    return -(-n // 2) + scales + 4 * -(-scales // 256) + 4 * (16 + 256 + 1)


@dataclass(frozen=True)
class Layer:
    """One penalised LoRA layer of ``parts`` updates ``(out, in_)`` of rank ``r`` each.

    Attributes:
        a, b: shapes of its two parameters as PEFT stores them. itemsize: bytes of an element of those.
        active: how many of its parts act on one token. is_plain: whether its parameters are linear maps' weights.
    """

    name: str
    out: int
    in_: int
    parts: int
    r: int
    a: tuple[int, ...]
    b: tuple[int, ...]
    itemsize: int
    unit: str
    active: float
    is_plain: bool = True

    def factors(self, k: int) -> tuple[Weight, Weight]:
        """Both parameters with ``k`` components a part in place of ``r``, float32 as the past is kept."""
        a, b = (self.parts * k, *self.a[1:]), (self.b[0], self.parts * k, *self.b[2:])
        return Weight(a, 4, self.unit), Weight(b, 4, self.unit)

    @property
    def adapter(self) -> tuple[Weight, Weight]:
        """Both trained parameters."""
        return Weight(self.a, self.itemsize, self.unit), Weight(self.b, self.itemsize, self.unit)


@dataclass(frozen=True)
class ModelShapes:
    """What planning knows of a model.

    Attributes:
        base: every parameter that is no LoRA factor. layers: the penalised ones, tied ones once.
    """

    name: str
    base: tuple[Weight, ...]
    layers: tuple[Layer, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element of the base, and of what it is multiplied with."""
        return max(weight.itemsize for weight in self.base)


def load_config(source: str | Path | Mapping[str, Any] | PretrainedConfig) -> tuple[str, PretrainedConfig]:
    """A name and a transformers configuration.

    Args:
        source: a preset's name (any case), a folder with config.json, a json file, its content, a configuration, or,
            if it is none of those, a name on the hub.

    Raises:
        ValueError: a file that is no configuration of a model transformers knows.
        OSError: nothing under that name.
    """
    if isinstance(source, PretrainedConfig):
        return source.model_type, source
    if not isinstance(source, Mapping):
        known = PRESETS.get(str(source).lower())
        path = Path(source)
        if known is None and path.is_file():
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                raise ValueError(f"{path} is no json: {error}") from error
        if known is None:
            try:
                return str(source), AutoConfig.from_pretrained(source)
            except OSError as error:
                raise OSError(
                    f"no model configuration {str(source)!r}: neither a preset ({', '.join(PRESETS)}), nor a folder or "
                    f"json file here, nor on the hub ({str(error).splitlines()[0]})"
                ) from error
        name, source = str(source), known
    else:
        name = str(source.get("model_type"))
    if not isinstance(source, Mapping) or "model_type" not in source:
        raise ValueError(f"{name} must be a transformers configuration with a 'model_type', found none in it")
    fields = {key: value for key, value in source.items() if key != "model_type"}
    return name, AutoConfig.for_model(source["model_type"], **fields)


def model_shapes(
    source: str | Path | Mapping[str, Any] | PretrainedConfig,
    lora: LoraConfig,
    ella: EllaConfig,
    base: str = "bfloat16",
) -> ModelShapes:
    """Shapes of the model that ``source`` describes, with the adapter that PEFT makes of ``lora``.

    Args:
        source: see :func:`load_config`. Nothing of the model itself is read or downloaded.
        lora, ella: settings of the adapter and of the penalty.
        base: "float32", "bfloat16", "float16", or "nf4", 4 bits with doubly quantised scales.

    Raises:
        ValueError: targets that are not in the model, layers that cannot be penalised, an unknown ``base``.
    """
    if base not in (*_DTYPES, "nf4"):
        raise ValueError(f"base must be one of {', '.join((*_DTYPES, 'nf4'))}, found {base!r}")
    name, config = load_config(source)
    with torch.device("meta"):
        model = auto_class(config).from_config(config, dtype=_DTYPES.get(base, torch.bfloat16))
    head = model.get_output_embeddings()
    head_weight = None if head is None else head.weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(model, lora, adapter_name=ADAPTER, low_cpu_mem_usage=True)
        layers = adapted_layers(
            adapted, ADAPTER, skip_unsupported=ella.skip_unsupported, warn=False, shapes_only=True
        )  # fmt: skip
    units = _Units(model)
    found = tuple(_layer(layer, units, config) for layer in layers if layer.tied_to is None)
    return ModelShapes(name, tuple(_base(adapted, units, config, base == "nf4", head_weight)), found)


def auto_class(config: PretrainedConfig) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    first = AutoModelForSeq2SeqLM if getattr(config, "is_encoder_decoder", False) else AutoModelForCausalLM
    return next(auto for auto in (first, AutoModel) if type(config) in auto._model_mapping or auto is AutoModel)


class _Units:
    """The transformer blocks of a model, by the paths of its modules."""

    def __init__(self, model: nn.Module) -> None:
        names = set(getattr(model, "_no_split_modules", None) or ())
        self._paths = {path for path, module in model.named_modules() if type(module).__name__ in names}

    def of(self, path: str) -> str:
        parts = path.split(".")
        ahead = (".".join(parts[:i]) for i in range(1, len(parts)))
        return next((place for place in ahead if place in self._paths), "")


def _layer(layer: AdaptedLayer, units: _Units, config: PretrainedConfig) -> Layer:
    (a, b), n = layer.parameters(), layer.n_parts
    out, in_ = layer.shape
    active = n * _share_of_experts(n, config) if n > 1 else float(layer.kind != "embedding")
    return Layer(
        layer.name, out, in_, n, a.shape[0] // n, tuple(a.shape), tuple(b.shape), a.element_size(),
        units.of(layer.name), active, layer.plain,
    )  # fmt: skip


def _share_of_experts(n: int, config: PretrainedConfig) -> float:
    chosen = getattr(config, "num_experts_per_tok", None)
    return 1.0 if chosen is None else min(1.0, chosen / n)


def _base(
    adapted: PeftModel, units: _Units, config: PretrainedConfig, is_4_bit: bool, head: nn.Parameter | None
) -> Iterator[Weight]:
    seen: set[int] = set()
    for path, module in adapted.base_model.model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if name.startswith("lora_"):
                continue
            # A tied output head multiplies with what the embedding looks up.
            again, active = id(parameter) in seen, 0.0
            if not isinstance(module, nn.Embedding) and parameter.ndim >= 2:
                active = _share_of_experts(parameter.shape[0], config) if parameter.ndim == 3 else 1.0
            if again and not active:
                continue
            seen.add(id(parameter))
            is_packed = is_4_bit and isinstance(module, nn.Linear) and name == "weight" and parameter is not head
            shape = tuple(parameter.shape)
            yield Weight(
                shape, 0 if again else parameter.element_size(), units.of(f"{path}.{name}"), active, is_packed,
                parameter.requires_grad,
            )  # fmt: skip
