"""Cases: bare torch loops under DDP and FSDP2."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.models import (
    BATCH,
    CLIP,
    LR,
    STEPS,
    adapted,
    batch,
    blocks,
    full,
    mine,
    rank,
    regularized,
    trainable,
    weights,
    with_past,
    world,
)  # fmt: skip
from tests.ella.models import ids, randomise, tiny


def fsdp2(model):
    if world() > 1:
        for block in blocks(model):
            fully_shard(block)
        fully_shard(model)
    return model


def ddp(model):
    return DistributedDataParallel(model) if world() > 1 else model


def optimizer_of(model):
    for module in model.modules():
        # A forward without a backward leaves the root's parameters whole, and those are not for an optimizer.
        if isinstance(module, FSDPModule):
            module.reshard()
    return torch.optim.SGD(trainable(model), lr=LR)


ENGINES = {"alone": lambda model: model, "ddp": ddp, "fsdp2": fsdp2}


def step(kind, number, model, wrapped, reg, optimizer, accumulation):
    """One optimizer step; returns the penalty and the norm of the gradient before clipping."""
    optimizer.zero_grad()
    penalty = reg.add_gradient_()
    for micro in range(accumulation):
        is_last = micro + 1 == accumulation
        if hasattr(wrapped, "set_requires_gradient_sync"):
            wrapped.set_requires_gradient_sync(is_last)
        elif hasattr(wrapped, "require_backward_grad_sync"):
            wrapped.require_backward_grad_sync = is_last
        (wrapped(**mine(batch(kind, number, micro))).loss / accumulation).backward()
    norm = nn.utils.clip_grad_norm_(trainable(model), CLIP)
    optimizer.step()
    return penalty.item(), full(norm).item()


def one_task(folder, kind, engine, accumulation, strength="0.01", r="4"):
    """A few steps in the second task."""
    model, reg = with_past(kind, float(strength), int(r))
    wrapped = ENGINES[engine](model)
    optimizer = optimizer_of(model)
    steps = [step(kind, i, model, wrapped, reg, optimizer, int(accumulation)) for i in range(STEPS)]
    return {"weights": weights(reg), "steps": steps, "values": reg.values()}


def every_layer(folder, strength):
    """Adam on the layers that language models lack; a task ends inside the wrapper, with the optimizer's parameters."""
    model = tiny(targets=["tokens", "up", "down", "point"])
    reg = regularized(model, float(strength))
    randomise(model, 1)
    reg.end_task("before")
    randomise(model, 2)
    wrapped = ddp(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2)
    for number in range(6):
        if number == 3:
            torch.manual_seed(0)
            reg.end_task("first")
            randomise(model, 3)
        optimizer.zero_grad()
        reg.add_gradient_()
        own = ids(BATCH, seed=number).chunk(world())[rank()]
        wrapped(own).square().mean().backward()
        nn.utils.clip_grad_norm_(trainable(model), CLIP)
        optimizer.step()
    return weights(reg)


def two_tasks(folder, kind, engine, accumulation, strength="0.01", r="4"):
    """Both tasks of a model in one process, the second one on what the first one left."""
    torch.manual_seed(7)
    model = adapted(kind, int(r))
    reg = regularized(model, float(strength))
    wrapped = ENGINES[engine](model)
    steps = []
    for task in ("first", "second"):
        optimizer = optimizer_of(model)
        steps += [step(kind, i, model, wrapped, reg, optimizer, int(accumulation)) for i in range(STEPS)]
        with torch.no_grad():
            before = full(wrapped(**batch(kind, 50)).logits).clone()
        trained = weights(reg)
        torch.manual_seed(11)
        report = reg.end_task(task)
        with torch.no_grad():
            after = full(wrapped(**batch(kind, 50)).logits).clone()
    reg.save_pretrained(folder / "state")
    state = reg.state()
    past = {name: held.parts[0].left @ held.parts[0].right for name, held in state.layers.items()}
    return {
        "weights": trained,
        "fresh": weights(reg),
        "steps": steps,
        "past": past,
        "kept": (before - after).abs().max().item(),
        "ranks": report.ranks,
        "tasks": reg.tasks,
        "logits": after,
        "state": str(folder / "state"),
    }
