"""Cases: what FSDP2 and DDP may be used with, one optimizer step each against the same step in one process."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.parallel import DistributedDataParallel

from ella import EllaConfig, EllaRegularizer
from ella.distributed import whole
from ella_kernels import reference
from tests.distributed.models import (
    adapted,
    batch,
    blocks,
    full,
    mine,
    rank,
    regularized,
    trainable,
    with_past,
    world,
)  # fmt: skip
from tests.ella.models import ids, randomise, tiny


def shard(model, **options):
    if world() > 1:
        for block in blocks(model):
            fully_shard(block, **options)
        fully_shard(model, **options)
    return model


def gradients(reg):
    """Of the adapter in training, whole, by name."""
    found = {}
    for layer in reg.layers:
        for factor, p in zip("AB", layer.parameters(), strict=True):
            found[f"{layer.name}.{factor}"] = torch.zeros(p.shape) if p.grad is None else full(p.grad).clone()
    return found


def seeded(reg):
    penalty = reg.add_gradient_()
    return {"penalty": penalty.item(), "weights": gradients(reg), "values": reg.values()}


def penalty_of(folder, *settings):
    """The seeded gradient alone, for every setting of the penalty, at a rank below, at and above the past's cut."""
    options = dict(pair.split("=") for pair in settings)
    r = int(options.pop("r", 4))
    for name in ("past_rank", "penalty_rank"):
        if name in options:
            options[name] = int(options[name])
    model = adapted("llama", r)
    strength = options.pop("ella_lambda", 1.0)
    reg = regularized(model, strength, **{"normalize": None} | options)
    for seed in (1, 2, 3):
        randomise(model, seed)
        reg.end_task(f"task {seed}")
    randomise(model, 4)
    return seeded(EllaRegularizer(shard(model), reg.config))


def gathered_past(folder):
    """Where the past is too large to be kept whole, its right factors travel in every step."""
    from ella import sharded

    kept, sharded.KEPT = sharded.KEPT, 0
    try:
        model, reg = with_past("llama", past_rank=3)
        shard(model)
        return seeded(reg)
    finally:
        sharded.KEPT = kept


def every_kind(folder):
    """Embeddings, Conv1D, convolutions and expert parameters, sharded as PEFT's layers are."""
    found = {}
    for name, options in (
        ("layers", {"targets": ["tokens", "up", "down", "image", "point", "line", "volume"]}),
        ("experts", {"targets": ["up"], "target_parameters": ["experts.up"]}),
    ):
        model = tiny(**options)
        reg = EllaRegularizer(model, EllaConfig(ella_lambda=0.5, past_rank=5))
        randomise(model, 1)
        reg.end_task("before")
        randomise(model, 2)
        reg.end_task("and before")
        randomise(model, 3)
        if world() > 1:
            fully_shard(model)
        seed = seeded(reg)
        model(ids(4)).square().mean().backward()
        found |= {f"{name}.{key}": value for key, value in (seed["weights"] | gradients(reg)).items()}
        reg.end_task("third")
        found[f"{name}.output"] = model(ids(4)).detach()
    return {"weights": found}


def step(model, wrapped, reg, kind="llama", micros=1):
    seed = seeded(reg)
    for micro in range(micros):
        (wrapped(**mine(batch(kind, 0, micro))).loss / micros).backward()
    return seed | {"weights": gradients(reg), "norm": full(nn.utils.clip_grad_norm_(trainable(model), 1.0)).item()}


def hsdp(folder):
    model, reg = with_past("llama")
    mesh = init_device_mesh("cpu", (2, world() // 2), mesh_dim_names=("replicate", "shard")) if world() > 1 else None
    return step(model, shard(model, mesh=mesh), reg)


def offloaded(folder):
    model, reg = with_past("llama")
    return step(model, shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False)), reg)


def checkpointed(folder, reentrant="False"):
    model, reg = with_past("llama")
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant == "True"})
    return step(model, shard(model), reg)


def half(folder):
    """bf16 compute, fp32 parameters: the seed is exact, the task's gradient is bf16's."""
    model, reg = with_past("llama")
    seed = seeded(reg)["weights"]
    for p in trainable(model):
        p.grad = None
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    result = step(model, shard(model, mp_policy=policy), reg)
    return result | {"seed": seed}


def evaluated(folder):
    """A forward without backward between the steps leaves the root's parameters whole."""
    model, reg = with_past("llama")
    wrapped = shard(model)
    with torch.no_grad():
        wrapped(**batch("llama", 5))
    return step(model, wrapped, reg)


def unused(folder, engine):
    """A LoRA layer that the forward leaves out still gets its penalty's gradient."""
    model, reg = with_past("llama")
    left_out = model.base_model.model.model.layers[1].self_attn.v_proj
    left_out.forward = lambda x, *args, **kwargs: left_out.base_layer(x)
    wrapped = model
    if world() > 1:
        wrapped = DistributedDataParallel(model, find_unused_parameters=True) if engine == "ddp" else shard(model)
    return step(model, wrapped, reg)


def measured(folder, engine):
    """The importance of a task's coordinates, every rank measuring its own records, and a step of the next task's."""
    model = adapted("llama")
    reg = regularized(model, 0.5, penalty="importance")
    randomise(model, 1)
    wrapped = DistributedDataParallel(model) if engine == "ddp" and world() > 1 else model
    wrapped = shard(model) if engine == "fsdp2" else wrapped
    for task in range(2):
        step(model, wrapped, reg)
        # Of the model itself: DDP's wrapper waits for a backward. FSDP2's is the model.
        own = mine(batch("llama", 10 + task))
        reg.measure_importance(
            model(input_ids=ids[None], labels=labels[None]).loss
            for ids, labels in zip(own["input_ids"], own["labels"], strict=True)
        )
        torch.manual_seed(task)
        reg.end_task(str(task))
        optimizer = torch.optim.SGD(trainable(model), lr=1.0)
        optimizer.zero_grad()
        step(model, wrapped, reg)
        optimizer.step()
        optimizer.zero_grad()
    kept = [part for held in reg.state().layers.values() for part in held.importance]
    return step(model, wrapped, reg) | {"kept": dict(enumerate(kept))}


def collectives(folder, layers):
    """How many of each kind a seeding needs, by CommDebugMode, after the first one."""
    found = {}
    for kept in (2**28, 0):
        from ella import sharded

        before, sharded.KEPT = sharded.KEPT, kept
        model = adapted("llama", layers=int(layers))
        reg = regularized(model)
        randomise(model, 1)
        reg.end_task("before")
        randomise(model, 2)
        shard(model)
        reg.add_gradient_()
        with CommDebugMode() as mode:
            reg.add_gradient_()
        found[kept] = {str(op): count for op, count in mode.get_comm_counts().items() if count}
        sharded.KEPT = before
    return found


def work(folder):
    """Rows of ΔW that this rank computes, of all: the sizes of the left factors handed to the kernels."""
    model, reg = with_past("llama")
    shard(model)
    reg.add_gradient_()
    _, terms, _ = reg._sharded._terms
    return sum(t.past.left.shape[0] for t in terms), sum(layer.shape[0] for layer in reg.layers)


def refusals(folder):
    """What is refused, with the message."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import Shard, distribute_tensor

    found = {}

    def note(name, call):
        try:
            call()
        except ValueError as error:
            found[name] = str(error)

    model, reg = with_past("llama")
    shard(model)
    note("penalty", reg.penalty)
    mesh = init_device_mesh("cpu", (world(),), mesh_dim_names=("tp",))
    model, reg = with_past("llama")
    head = model.base_model.model.lm_head.get_base_layer()
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]), requires_grad=False)
    note("tensor parallel", reg.add_gradient_)
    model, reg = with_past("llama")
    shard(model, shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[1] % world() == 0 else None)
    note("columns", reg.add_gradient_)
    model, reg = with_past("llama")
    fully_shard(blocks(model)[0])
    note("part of the model", reg.add_gradient_)
    model, reg = with_past("llama")
    FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    note("FSDP1", reg.add_gradient_)
    model = adapted("llama")
    reg = regularized(model, keep_past="merge")
    shard(model)
    note("merge", lambda: reg.end_task("task"))
    model = adapted("llama", modules_to_save=["norm"])
    reg = regularized(model)
    shard(model)
    note("modules_to_save", lambda: reg.end_task("task"))
    return found


def loads(folder, source):
    """A state that other numbers of ranks have saved, in a model that is sharded before or after."""
    found = {}
    for when in ("before", "after"):
        model = adapted("llama")
        if when == "before":
            shard(model)
        reg = EllaRegularizer.from_pretrained(model, source)
        if when == "after":
            shard(model)
        with torch.no_grad():
            logits = full(model(**batch("llama", 50)).logits)
        found[when] = {"logits": logits, "tasks": reg.tasks}
    return found


def sharded_memory(folder):
    """Elements of the knowledge adapter on this rank, and whole."""
    model = adapted("llama")
    reg = regularized(model)
    shard(model)
    randomise_sharded(reg)
    reg.end_task("task")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    held = [p for layer in reg.layers for p in layer.all_parameters("default")]
    return sum(p.to_local().numel() for p in held), sum(whole(p).numel() for p in held), rank()


def randomise_sharded(reg):
    with torch.no_grad():
        for layer in reg.layers:
            for p in layer.parameters():
                p.to_local().normal_()


def exact(folder):
    """The seed against the materialised penalty of the reference, in float64."""
    model, reg = with_past("llama", normalize=None)
    state = reg.state()
    wanted = {}
    for layer in reg.layers:
        a, b = (p.detach().double() for p in layer.parameters())
        part = state.layers[layer.name].parts[0]
        past = part.left.double() @ part.right.double()
        grad_a, grad_b = reference.hadamard_grad(a, b, past, layer.scaling())
        weight = reg.config.ella_lambda
        wanted |= {f"{layer.name}.A": weight * grad_a, f"{layer.name}.B": weight * grad_b}
    shard(model)
    reg.add_gradient_()
    return {"weights": gradients(reg), "wanted": wanted}
