"""Parameters that come to a model after ``fully_shard``: made part of the group that FSDP2 gathers them with.

``fully_shard`` takes the parameters that a module has when it is called, and has no public way to add one; the
knowledge adapter is made at the end of a task. What is used of FSDP2's own classes is pinned by
tests/distributed/test_fsdp.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Rows, agree, is_sharded, owners, whole
from .lora import AdaptedLayer

__all__ = ["manage", "managed", "rewritten"]

# Where a parameter hangs: a module and the name in it.
Slot = tuple[nn.Module, str]


def managed(layer: AdaptedLayer, adapter: str) -> list[Slot]:
    """Where the parameters of an adapter of a layer hang."""
    return layer.slots(adapter) if layer.has(adapter) else []


def manage(model: nn.Module, layer: AdaptedLayer, adapter: str, before: Sequence[Slot]) -> None:
    """Shard the fresh parameters of ``adapter`` with the layer they belong to, in place of those at ``before``.

    Every rank brings the same values.
    """
    from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo

    group = _group(model, layer)
    gone = {(id(module), name) for module, name in (*before, *layer.slots(adapter))}
    group.fsdp_params = [
        p for p in group.fsdp_params if (id(p._module_info.module), p._module_info.param_name) not in gone
    ]
    for module, name in layer.slots(adapter):
        plain = module._parameters[name]
        assert plain is not None
        moved = nn.Parameter(plain.data.to(group.device), requires_grad=plain.requires_grad)
        module._parameters[name] = moved
        made = FSDPParam(
            moved, ParamModuleInfo(module, name), group.mesh_info, group.post_forward_mesh_info,
            group.device, None, group.mp_policy, group.offload_policy,
        )  # fmt: skip
        made.init_dtype_attrs(group.mp_policy)
        group.fsdp_params.append(made)
        # A state dict is taken from sharded parameters.
        module.register_state_dict_pre_hook(lambda *args: group._to_sharded())
        module._register_load_state_dict_pre_hook(lambda *args: group._to_sharded())


def _group(model: nn.Module, layer: AdaptedLayer) -> Any:
    """The parameter group of the innermost FSDP2 module around a layer (or the layer itself)."""
    for module in reversed(owners(model, f"base_model.model.{layer.path}")):
        state: Any = module._get_fsdp_state()
        groups = state._fsdp_param_groups
        if groups:
            return groups[0]
    raise ValueError(f"{layer.name} has sharded factors, but no module around it was given to fully_shard")


@contextmanager
def rewritten(layer: AdaptedLayer, adapter: str) -> Iterator[None]:
    """Within, the parameters of an adapter are whole on every rank; afterwards they hold what the first rank wrote."""
    slots = [(module, name) for module, name in layer.slots(adapter) if is_sharded(module._parameters[name])]
    sharded: list[Any] = [module._parameters[name] for module, name in slots]
    plain = [nn.Parameter(whole(p).clone(), requires_grad=p.requires_grad) for p in sharded]
    _put(slots, plain)
    try:
        yield
    finally:
        _put(slots, sharded)
    rows = Rows([(name, p) for (_, name), p in zip(slots, sharded, strict=True)]) if slots else None
    with torch.no_grad():
        agree(plain)
        for parameter, value in zip(sharded, plain, strict=True):
            assert rows is not None
            parameter.to_local().copy_(value[rows.of(value.shape[0])])
            parameter.grad = None


def _put(slots: Sequence[Slot], parameters: Sequence[Tensor]) -> None:
    for (module, name), parameter in zip(slots, parameters, strict=True):
        module._parameters[name] = parameter  # type: ignore[assignment]
