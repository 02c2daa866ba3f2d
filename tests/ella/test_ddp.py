"""Two processes under DDP (gloo, file store) end where one process with the whole batch ends."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

WORKER = """
import sys, torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ella import EllaConfig, EllaRegularizer
from tests.ella.models import ids, randomise, tiny

store, rank, world, strength, out = sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), sys.argv[5]
torch.set_num_threads(1)
model = tiny(targets=["tokens", "up", "down", "point"])
reg = EllaRegularizer(model, EllaConfig(ella_lambda=strength, normalize="rms"))
randomise(model, 1)
reg.end_task("before")
randomise(model, 2)
wrapped = model
if world > 1:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    wrapped = DistributedDataParallel(model)
parameters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(parameters, lr=1e-2)
for step in range(6):
    if step == 3:  # a task ends inside the wrapper, with the optimizer's parameters
        torch.manual_seed(0)
        reg.end_task("first")
        randomise(model, 3)
    optimizer.zero_grad()
    reg.add_gradient_()
    batch = ids(8, seed=step)[rank * (8 // world):(rank + 1) * (8 // world)]
    wrapped(batch).square().mean().backward()
    torch.nn.utils.clip_grad_norm_(parameters, 0.5)
    optimizer.step()
torch.save(torch.cat([p.detach().flatten() for p in parameters]), out + str(rank))
if world > 1:
    dist.destroy_process_group()
"""


def trained(tmp_path, world, strength):
    out = tmp_path / f"weights-{world}-{strength}-"
    store = tmp_path / f"store-{world}-{strength}"
    processes = [
        subprocess.Popen([sys.executable, "-c", WORKER, store, str(rank), str(world), str(strength), out])
        for rank in range(world)
    ]
    assert [process.wait(120) for process in processes] == [0] * world
    return [torch.load(f"{out}{rank}", weights_only=True) for rank in range(world)]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this PyTorch has no torch.distributed")
def test_ddp_equals_one_process(tmp_path):
    first, second = trained(tmp_path, 2, 0.5)
    (alone,) = trained(tmp_path, 1, 0.5)
    (without,) = trained(tmp_path, 1, 0.0)
    assert torch.equal(first, second)
    assert (first - alone).norm() / alone.norm() < 1e-6
    assert (first - without).norm() / alone.norm() > 1e-3, "switching the penalty off must be noticed"
