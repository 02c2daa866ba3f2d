"""``keep_past="merge"``: finished tasks go into fp32 base weights, and a state knows the weights it belongs to."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
from torch import nn

from .lora import AdaptedLayer

__all__ = ["check_mergeable", "checksums", "merge_adapter"]


def check_mergeable(layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError, naming the layer and the reason, unless every base weight can take an update without loss.

    Share of a task's own update lost by merging, measured: NF4 62–109 %, int8 5–49 %, bf16 17–61 %, fp32 about 0.
    """
    for layer in layers:
        base = layer.module.get_base_layer()
        weight = getattr(base, "weight", None)
        hint = "; use keep_past='adapter'"
        if layer.kind in ("attention", "experts"):
            raise ValueError(f"keep_past='merge' does not support {layer.kind} layers, found {layer.name}{hint}")
        if not isinstance(weight, nn.Parameter) or weight.dtype != torch.float32 or type(weight) is not nn.Parameter:
            found = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
            raise ValueError(
                f"keep_past='merge' needs float32 base weights: rounding loses most of an update in other formats; "
                f"{layer.name} is a {found}{hint}"
            )
        if layer.bias() is not None and getattr(base, "bias", None) is None:
            raise ValueError(f"keep_past='merge' cannot keep lora_bias: {layer.name} has no bias to merge into{hint}")


@torch.no_grad()
def merge_adapter(layer: AdaptedLayer, adapter: str) -> None:
    """Add the adapter's update (and bias) to the base layer, for good."""
    base = layer.module.get_base_layer()
    base.weight.add_(layer.module.get_delta_weight(adapter).to(base.weight.dtype))
    bias = layer.bias(adapter)
    if bias is not None:
        base.bias.add_(bias, alpha=layer.scaling(adapter))


def checksums(layers: Sequence[AdaptedLayer]) -> dict[str, int]:
    """CRC-32 of every base weight's bytes, by layer name."""
    found = {}
    for layer in layers:
        weight = layer.module.get_base_layer().weight.detach().cpu().contiguous()
        found[layer.name] = zlib.crc32(weight.view(-1).numpy().view("uint8"))
    return found
