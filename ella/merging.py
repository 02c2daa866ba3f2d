"""``keep_past="merge"``: finished tasks in the base weights, ``W = round(W_base + W_past)``, always from the total."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .checkpoint import StoredLayer
from .distributed import storage_of
from .lora import AdaptedLayer

__all__ = ["MergedBase", "check_fits", "check_mergeable", "checksums", "shared_weights"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_HINT = "; use keep_past='adapter'"


def check_mergeable(model: nn.Module, layers: Sequence[AdaptedLayer]) -> None:
    """Raise ValueError, naming the layer and the reason, unless every base weight can take an update and it alone.

    Share of a task's own update lost by merging into quantised weights, measured: NF4 62–109 %, int8 5–49 %.
    """
    shared = shared_weights(model, layers)
    for layer in layers:
        base = layer.module.get_base_layer()
        weight = getattr(base, "weight", None)
        if layer.unmergeable:
            raise ValueError(
                f"keep_past='merge' does not support {layer.kind} layers, found {layer.name}: "
                f"{layer.unmergeable}{_HINT}"
            )
        if type(weight) is not nn.Parameter or weight.dtype not in _DTYPES:
            found = f"{type(weight).__name__} of {getattr(weight, 'dtype', 'no dtype')}"
            raise ValueError(
                f"keep_past='merge' needs float32, bfloat16 or float16 base weights: quantised ones lose most of an "
                f"update; {layer.name} is a {found}{_HINT}"
            )
        if weight.device.type == "meta":
            raise ValueError(
                f"keep_past='merge' needs base weights in memory; that of {layer.name} is offloaded{_HINT}"
            )
        if layer.name in shared:
            raise ValueError(
                f"keep_past='merge' cannot merge into a shared weight: that of {layer.name} is also another module's "
                f"(tied embeddings, replicated layers){_HINT}"
            )
        if layer.bias() is not None and getattr(base, "bias", None) is None:
            raise ValueError(f"keep_past='merge' cannot keep lora_bias: {layer.name} has no bias to merge into{_HINT}")


def shared_weights(model: nn.Module, layers: Sequence[AdaptedLayer]) -> set[str]:
    """Names of the layers whose base weight is another module's as well: tied embeddings, replicated layers."""
    owners = Counter(storage_of(p) for _, p in model.named_parameters(remove_duplicate=False))
    weights = {layer.name: getattr(layer.module.get_base_layer(), "weight", None) for layer in layers}
    keys = {name: storage_of(weight) for name, weight in weights.items() if weight is not None}
    return {name for name, key in keys.items() if key is not None and owners[key] > 1}


@torch.no_grad()
def check_fits(layers: Sequence[AdaptedLayer], stored: Mapping[str, StoredLayer]) -> None:
    """Raise ValueError, naming the layer, where base and past together could be beyond its dtype."""
    for layer in layers:
        weight, (part,) = layer.module.get_base_layer().weight, stored[layer.name].parts
        largest = weight.abs().max().double() + (part.left.double() @ part.right.double()).abs().max()
        if largest > torch.finfo(weight.dtype).max:
            raise ValueError(f"{layer.name}: base and past together do not fit {weight.dtype}{_HINT}")


class MergedBase:
    """The base weights of ``layers`` without any past, kept on the CPU, and what was merged into them.

    Args:
        layers: the folded layers, their base weights as they were before the first fold.
    """

    def __init__(self, layers: Sequence[AdaptedLayer]) -> None:
        self._weights = {layer.name: _copy(layer.module.get_base_layer().weight) for layer in layers}
        self._biases = {layer.name: _copy(bias) for layer in layers if (bias := _bias(layer)) is not None}
        self.checksums = checksums(layers)

    @torch.no_grad()
    def merge(self, layers: Sequence[AdaptedLayer], knowledge: str) -> dict[str, float]:
        """Set every base weight to base plus the update of the adapter ``knowledge``.

        Returns the relative Frobenius error of the rounded weights by layer name: the relative error of the layer's
        outputs for white inputs.
        """
        errors = {}
        for layer in layers:
            base = layer.module.get_base_layer()
            exact = self._weights[layer.name].to(base.weight.device, torch.float64)
            exact = exact + _delta(layer, knowledge).double()
            rounded = exact.to(base.weight.dtype)
            norm = exact.norm().item()
            errors[layer.name] = (rounded.double() - exact).norm().item() / norm if norm else 0.0
            base.weight.copy_(rounded)
            bias = layer.bias(knowledge)
            if bias is not None:
                base.bias.copy_(self._biases[layer.name].to(bias.device) + bias)
        return errors

    @classmethod
    @torch.no_grad()
    def without_past(cls, layers: Sequence[AdaptedLayer], knowledge: str, before: Mapping[str, int]) -> MergedBase:
        """Of weights that hold the update of ``knowledge`` already: it is taken out of the copies, up to rounding.

        ``before`` are the checksums of the base that was merged into.
        """
        base = cls(layers)
        for layer in layers:
            delta, bias = _delta(layer, knowledge).cpu(), layer.bias(knowledge)
            # Wide enough that only the rounding of the merge itself is left.
            base._weights[layer.name] = (base._weights[layer.name].double() - delta.double()).float()
            if bias is not None:
                base._biases[layer.name] = base._biases[layer.name].float() - bias.cpu()
        base.checksums = dict(before)
        return base


def _delta(layer: AdaptedLayer, adapter: str) -> Tensor:
    # A task may end under autocast, which would round the product.
    with torch.autocast(layer.parameters(adapter)[0].device.type, enabled=False):
        return layer.module.get_delta_weight(adapter)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _bias(layer: AdaptedLayer) -> Tensor | None:
    return getattr(layer.module.get_base_layer(), "bias", None)


def checksums(layers: Sequence[AdaptedLayer]) -> dict[str, int]:
    """CRC-32 of every base weight's bytes, by layer name."""
    found = {}
    for layer in layers:
        weight = layer.module.get_base_layer().weight.detach().cpu().contiguous()
        found[layer.name] = zlib.crc32(weight.view(-1).view(torch.uint8).numpy())
    return found
