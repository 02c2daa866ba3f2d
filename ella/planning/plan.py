"""What training a model with ELLA takes, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PretrainedConfig

from ella.config import EllaConfig
from ella_kernels.workspace import Size

from .gpus import Gpu, committed_results, find_gpu, measured
from .memory import ENGINES, Memory, memory, penalty_sizes, ranks_of
from .shapes import ModelShapes, model_shapes
from .work import (
    Collective,
    Operations,
    Times,
    algorithms,
    collectives,
    operations,
    penalty_bound,
    penalty_bytes,
    times,
)

__all__ = ["Plan", "make_plan", "plan_shapes"]


@dataclass(frozen=True)
class Plan:
    """Bytes, operations, collectives and time of one optimizer step on one GPU.

    Attributes:
        model, base: name and dtype. engine, gpus: who holds what. gpu: whose rates.
        tokens: of one GPU in a step. tasks: finished ones; None: as many as fill the past.
        parameters: of the base model. trained: LoRA parameters. parts: penalised updates, experts each.
        ranks: ``(r, stored, used)`` found, used being the penalty's share of the stored components.
        algorithms: parts by algorithm of the penalty.
        memory, operations, bytes_moved (by the penalty), collectives, times: see their classes.
    """

    model: str
    base: str
    engine: str
    gpus: int
    gpu: Gpu
    tokens: int
    tasks: int | None
    is_recomputed: bool
    ella: EllaConfig
    parameters: int
    trained: int
    parts: int
    ranks: tuple[tuple[int, int, int], ...]
    algorithms: dict[str, int]
    memory: Memory
    operations: Operations
    bytes_moved: int
    collectives: list[Collective]
    times: Times

    def to_dict(self) -> dict[str, Any]:
        """Plain json, with the sums that :class:`Memory` has as properties."""
        data = asdict(self)
        data["memory"] |= {name: getattr(self.memory, name) for name in ("state", "total", "dense_total")}
        return data


def make_plan(
    model: str | Path | Mapping[str, Any] | PretrainedConfig,
    lora: LoraConfig,
    ella: EllaConfig | None = None,
    *,
    base: str = "bfloat16",
    **options: Any,
) -> Plan:
    """The plan of a model that need not be there.

    Args:
        model: a preset ("llama-3.1-8b", "llama-3.1-70b", "llama-3.1-405b", "t5-large", "qwen3-30b-a3b"), a folder with
            config.json, a json file or its content, a transformers configuration, or a name on the hub, from where the
            configuration alone is read.
        lora: the adapter. PEFT itself finds its layers, on the meta device.
        ella: settings of the past and the penalty.
        base: "float32", "bfloat16", "float16" or "nf4" (4 bits).
        options: of :func:`plan_shapes`.

    Raises:
        ValueError: naming what was found and what was expected. OSError: no such configuration.
    """
    ella = ella or EllaConfig()
    if base == "nf4" and ella.keep_past == "merge":
        raise ValueError("keep_past='merge' needs base weights that are not quantised, found base='nf4'")
    return plan_shapes(model_shapes(model, lora, ella, base), ella, base, **options)


def plan_shapes(
    shapes: ModelShapes,
    ella: EllaConfig,
    base: str,
    *,
    engine: str | None = None,
    gpus: int = 1,
    gpu: str | Gpu = "H100",
    tokens: int = 4096,
    tasks: int | None = None,
    is_recomputed: bool = True,
) -> Plan:
    """:func:`make_plan` of shapes that are known already.

    Args:
        engine: "one", "ddp", "fsdp2", "zero2" or "zero3"; None: "one" on one GPU, else "fsdp2".
        gpus: in the group that shards or replicates.
        gpu: a name of :data:`~ella.planning.gpus.GPUS`, whose committed results are taken if there are any, or rates.
        tokens: of one GPU in an optimizer step, all micro-batches together.
        tasks: finished tasks; None: as many as fill the past.
        is_recomputed: activation checkpointing.
    """
    engine = engine or ("one" if gpus == 1 else "fsdp2")
    if engine not in ENGINES:
        raise ValueError(f"engine must be one of {', '.join(ENGINES)}, found {engine!r}")
    for name, value, least in (("gpus", gpus, 1), ("tokens", tokens, 1), ("tasks", 1 if tasks is None else tasks, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    if engine == "one" and gpus > 1:
        raise ValueError(f"engine 'one' is one process, found gpus = {gpus}; choose ddp, fsdp2, zero2 or zero3")
    gpu = _with_results(find_gpu(gpu)) if isinstance(gpu, str) else gpu
    ranks = [ranks_of(layer, ella, tasks) for layer in shapes.layers]
    sizes = penalty_sizes(shapes.layers, ranks, engine, gpus)
    done = operations(shapes, ella, ranks, sizes, tokens, gpu.target, is_recomputed)
    sent = collectives(shapes, ella, ranks, engine, gpus)
    pairs = zip(shapes.layers, ranks, strict=True)
    return Plan(
        model=shapes.name, base=base, engine=engine, gpus=gpus, gpu=gpu, tokens=tokens, tasks=tasks,
        is_recomputed=is_recomputed, ella=ella,
        parameters=sum(weight.numel for weight in shapes.base if weight.itemsize and not weight.is_trained),
        trained=sum(weight.numel for layer in shapes.layers for weight in layer.adapter),
        parts=len(sizes),
        ranks=tuple(sorted({(layer.r, own.stored, own.used) for layer, own in pairs})),
        algorithms=algorithms(sizes, gpu.target, ella.penalty),
        memory=memory(shapes, ella, engine, gpus, tasks, gpu.target),
        operations=done,
        bytes_moved=penalty_bytes(sizes),
        collectives=sent,
        times=times(gpu, done, sizes, sent, gpus, ella.penalty),
    )  # fmt: skip


def _with_results(gpu: Gpu) -> Gpu:
    """The GPU as a committed run measured it, if there is one."""
    path = committed_results(gpu.name)
    return gpu if path is None else with_results(gpu, json.loads(path.read_text(encoding="utf-8")))


def with_results(gpu: Gpu, results: dict[str, Any]) -> Gpu:
    """The GPU as a run of ``bench.gpu_check`` measured it; ``results`` is the content of its file."""
    # The case of the calibration: q and v of LLaMA-3.1-8B.
    sizes = [Size(4096, 4096, 8, 8), Size(1024, 4096, 8, 8)] * 32
    return measured(gpu, results, penalty_bound(gpu, sizes, "hadamard"))
