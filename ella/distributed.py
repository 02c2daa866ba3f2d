"""Every collective of the package: adapters whose factors are spread over ranks, gathered and reduced.

FSDP2 (``fully_shard``) gives rank ``p`` of ``n`` the rows ``[p·c, (p + 1)·c)`` of a parameter, ``c = ⌈rows / n⌉``: of
``lora_B`` and the past's ``left`` rows of ``ΔW`` and ``W_past``, of ``lora_A`` and ``right`` components. The penalty is
a sum over rows, so a rank needs all of ``lora_A`` and ``right`` and its own rows of the rest (docs/distributed.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from .lora import AdaptedLayer

__all__ = [
    "SPREAD", "Rows", "agree", "agreed_missing", "any_partitioned", "gathered",
    "is_partitioned", "is_sharded", "is_spread", "is_writer",
    "owners", "refuse_tensor_parallel", "shape_of", "spread_by", "storage_of", "summed", "wait_for_all", "whole",
]  # fmt: skip


# Engines under which a rank holds parts of a factor.
SPREAD = ("FSDP2", "ZeRO-3")


def is_running() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized()


def is_sharded(parameter: object) -> bool:
    """Whether FSDP2 (or tensor parallel) spreads a parameter over ranks."""
    if not is_running():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(parameter, DTensor)


def is_partitioned(parameter: object) -> bool:
    """Whether DeepSpeed's ZeRO-3 spreads a parameter over ranks."""
    return hasattr(parameter, "ds_status")


def any_partitioned(parameters: Iterable[object]) -> bool:
    """Whether :func:`is_partitioned` is true of one of ``parameters``, by a loop in C: it is asked in every step."""
    return any(map(hasattr, parameters, repeat("ds_status")))


def is_spread(parameter: object) -> bool:
    """Whether this rank holds only a part of a parameter."""
    return is_sharded(parameter) or is_partitioned(parameter)


def shape_of(parameter: Tensor) -> torch.Size:
    """The whole parameter's shape, wherever its parts are."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def storage_of(parameter: Tensor) -> int | None:
    """What tells whether two parameters are one: the address of what they hold, or who they are where that is parts.

    None for a parameter without elements.
    """
    if is_spread(parameter):
        return -id(parameter)
    if parameter.is_meta and parameter.numel():
        return parameter.untyped_storage()._cdata
    return parameter.data_ptr() if parameter.numel() else None


@torch.no_grad()
def whole(parameter: Tensor) -> Tensor:
    """All of a parameter, detached, on every rank: a collective where it is spread over ranks."""
    if is_sharded(parameter):
        found: Tensor = parameter.detach().full_tensor()  # type: ignore[attr-defined]
        return found
    if is_partitioned(parameter):
        with gathered([parameter]):
            return parameter.detach().clone()
    return parameter.detach()


@contextmanager
def gathered(parameters: Iterable[Tensor], write: bool = False) -> Iterator[None]:
    """Within, what ZeRO-3 has partitioned of ``parameters`` is whole; with ``write`` the first rank's changes stay."""
    apart = [p for p in parameters if is_partitioned(p) and p.ds_status.name != "AVAILABLE"]  # type: ignore[attr-defined]
    if not apart:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(apart, modifier_rank=0 if write else None):
        yield


def spread_by(model: nn.Module, layers: Sequence[AdaptedLayer]) -> str | None:
    """The engine that keeps parts of the layers' factors (one of :data:`SPREAD`) or of their gradients ("ZeRO").

    None where both are whole on this rank, as under DDP.

    An FSDP2 model has its sharded parameters back afterwards. Raises ValueError for FSDP1 and tensor parallel.
    """
    if not is_running():
        return None
    parameters = [p for layer in layers for p in layer.parameters()]
    if any_partitioned(parameters):
        return "ZeRO-3"
    if any(hasattr(p, "_hp_mapping") for p in parameters):
        return "ZeRO"
    flat = [p for p in parameters if getattr(p, "_fsdp_flattened", False) or not isinstance(p, nn.Parameter)]
    if flat:
        raise ValueError(
            f"{layers[0].name} is trained by FSDP1 (FullyShardedDataParallel), whose flat parameters hold no rows of a "
            "factor; use FSDP2: torch's fully_shard, or fsdp_version 2 in accelerate"
        )
    if all(map(is_sharded, parameters)):
        return "FSDP2"
    path = f"base_model.model.{layers[0].path}"
    if any(map(is_sharded, parameters)) or owners(model, path, layers[0].adapter):
        as_sharded(model)
        return "FSDP2"
    return None


def refuse_tensor_parallel(layers: Sequence[AdaptedLayer], rows: Rows | None) -> None:
    """Raise ValueError unless base weights lie as ``rows`` do, or are no shards at all."""
    for layer in layers:
        weight: Any = getattr(layer.module.get_base_layer(), "weight", None)
        if is_sharded(weight) and (
            rows is None or weight.device_mesh != rows.mesh or weight.placements != rows.placements
        ):
            raise ValueError(
                f"the base weight of {layer.name} is placed as {weight.placements} on {weight.device_mesh}, its LoRA "
                f"factors {'are not sharded' if rows is None else f'as {rows.placements}'}: tensor parallel is not "
                "supported, as its ranks hold no whole rows of the update; use FSDP2 or HSDP"
            )


def owners(model: nn.Module, path: str, adapter: str | None = None) -> list[Any]:
    """The FSDP2 modules on the way from ``model`` to the LoRA layer at ``path``, outermost first.

    With ``adapter`` also the modules of its factors.
    """
    from torch.distributed.fsdp import FSDPModule

    module: Any = model
    passed = [module]
    for name in path.split("."):
        module = module.get_submodule(name)
        passed.append(module)
    if adapter is not None:
        passed += [held[adapter] for held in (module.lora_A, module.lora_B) if adapter in held]
    return [module for module in passed if isinstance(module, FSDPModule)]


def as_sharded(model: nn.Module) -> None:
    """Give the modules of an FSDP2 model their sharded parameters back.

    A forward leaves the root's whole until the next backward: what is written to those is lost.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def is_writer() -> bool:
    """Whether this process writes the files that all processes agree on."""
    return not is_running() or dist.get_rank() == 0


def agreed_missing(path: Path) -> bool:
    """Whether the first process does not find ``path``: the same answer on every one."""
    answer = [not path.exists()]
    if is_running():
        dist.broadcast_object_list(answer, 0)
    return answer[0]


def wait_for_all() -> None:
    """Return when every process is here."""
    if is_running():
        dist.barrier()


@torch.no_grad()
def agree(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in one broadcast per dtype."""
    tensors = list(tensors)
    if not is_running() or dist.get_world_size() == 1:
        return
    for dtype in sorted({t.dtype for t in tensors}, key=str):
        alike = [t for t in tensors if t.dtype == dtype and t.numel()]
        if not alike:
            continue
        flat = torch.cat([t.reshape(-1) for t in alike])
        dist.broadcast(flat, 0)
        for tensor, part in zip(alike, flat.split([t.numel() for t in alike]), strict=True):
            tensor.copy_(part.view_as(tensor))


@torch.no_grad()
def summed(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The sums of float32 ``tensors`` over all processes, in one all-reduce; copies."""
    if not is_running() or dist.get_world_size() == 1:
        return [tensor.clone() for tensor in tensors]
    device = next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), tensors[0].device)
    flat = torch.cat([tensor.reshape(-1).to(device) for tensor in tensors])
    dist.all_reduce(flat)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.device) for part, tensor in zip(parts, tensors, strict=True)]


class Rows:
    """How FSDP2 spreads the rows of ``parameters`` over the ranks of one group.

    Args:
        parameters: by name; all of one mesh and placement.

    Attributes: ``rank`` and ``size`` of the group that holds all rows once (under HSDP one replica); ``device``, where
    the penalty is computed: the mesh's, also where parameters are offloaded to the CPU.

    Raises ValueError, naming the parameter, for a placement that is not FSDP2's own by rows.
    """

    def __init__(self, parameters: Sequence[tuple[str, Tensor]]) -> None:
        from torch.distributed.tensor import DTensor, Shard

        name, first = parameters[0]
        for other, parameter in parameters:
            if not isinstance(parameter, DTensor):
                raise ValueError(
                    f"{other} is not sharded although {name} is: apply fully_shard to the whole model, or to modules "
                    "that hold all of its LoRA layers"
                )
            if parameter.device_mesh != first.device_mesh or parameter.placements != first.placements:  # type: ignore[attr-defined]
                raise ValueError(
                    f"{other} is placed as {parameter.placements} on {parameter.device_mesh}, but {name} as "
                    f"{first.placements} on {first.device_mesh}: expected one FSDP2 mesh "  # type: ignore[attr-defined]
                    "for all LoRA factors; tensor parallel is not supported, as its ranks hold other parts of a row"
                )
        assert isinstance(first, DTensor)
        self.mesh, self.placements = first.device_mesh, first.placements
        dims = [dim for dim, placement in enumerate(self.placements) if not placement.is_replicate()]
        if len(dims) != 1 or type(self.placements[dims[0]]) is not Shard or not self.placements[dims[0]].is_shard(0):
            raise ValueError(
                f"{name} is placed as {self.placements} on {self.mesh}: expected FSDP2's Shard(0) on one mesh "
                "dimension and replicas on the others (HSDP); tensor parallel and other shard placements are not "
                "supported, as their ranks hold no whole rows of the update"
            )
        self.group = self.mesh.get_group(dims[0])
        self.rank, self.size = self.mesh.get_local_rank(dims[0]), self.mesh.size(dims[0])
        on_cpu = self.mesh.device_type == "cpu"
        self.device = torch.device("cpu") if on_cpu else torch.accelerator.current_accelerator() or first.device
        if not on_cpu:
            self.device = torch.device(self.device.type, torch.accelerator.current_device_index())

    def chunk(self, rows: int) -> int:
        """Rows of every rank but the last ones."""
        return -(-rows // self.size)

    def of(self, rows: int) -> slice:
        """This rank's part of ``rows``; empty where there are fewer rows than ranks."""
        start = min(self.rank * self.chunk(rows), rows)
        return slice(start, min(start + self.chunk(rows), rows))

    def like(self, parameter: Tensor, local: Tensor) -> Tensor:
        """``local`` as this rank's part of a tensor placed as ``parameter`` is."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local, self.mesh, self.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
        )

    @torch.no_grad()
    def gather(self, parts: Sequence[Tensor], rows: Sequence[int], dtype: torch.dtype) -> list[Tensor]:
        """The whole ``(rows, columns)`` matrices of which ``parts`` are this rank's rows, in one all-gather."""
        widths = [self.chunk(n) * part.shape[1] for part, n in zip(parts, rows, strict=True)]
        sent = torch.zeros(sum(widths), dtype=dtype, device=self.device)
        for part, place in zip(parts, sent.split(widths), strict=True):
            place[: part.numel()].view(part.shape).copy_(part)
        received = torch.empty(self.size * sum(widths), dtype=dtype, device=self.device)
        dist.all_gather_into_tensor(received, sent, group=self.group)
        found = [torch.empty(self.size, width, dtype=dtype, device=self.device) for width in widths]
        torch.split_with_sizes_copy(received.view(self.size, -1), widths, dim=1, out=found)
        # [ranks · chunk, columns], without the rows that fill the last chunks up
        return [
            whole.view(-1, part.shape[1])[:n] if part.shape[1] else whole.new_zeros(n, 0)
            for whole, part, n in zip(found, parts, rows, strict=True)
        ]

    def padded(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Zeros ``(ranks · chunk, columns)``, to be summed by :meth:`reduce`."""
        return torch.zeros(self.size * self.chunk(rows), columns, dtype=dtype, device=self.device)

    @torch.no_grad()
    def reduce(self, matrices: Sequence[Tensor], number: Tensor) -> tuple[list[Tensor], Tensor]:
        """Sums over ranks of what :meth:`padded` made, this rank's rows of them, and of a 0-dim ``number``.

        One reduce-scatter: the number travels in everyone's part.
        """
        last = number.to(matrices[0].dtype).expand(self.size, 1)
        sent = torch.cat([*(matrix.view(self.size, -1) for matrix in matrices), last], 1)
        received = torch.empty(sent.shape[1], dtype=sent.dtype, device=self.device)
        dist.reduce_scatter_tensor(received, sent.view(-1), group=self.group)
        *parts, total = received.split([matrix.numel() // self.size for matrix in matrices] + [1])
        return [part.view(-1, matrix.shape[1]) for part, matrix in zip(parts, matrices, strict=True)], total[0]

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over ranks, in one all-reduce."""
        numbers = numbers.clone()
        dist.all_reduce(numbers, group=self.group)
        return numbers
