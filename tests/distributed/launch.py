"""Cases run in several gloo processes, many in one start-up.

A case is a function ``(folder) -> anything torch can save``, named "module:function" or "module:function:argument...";
every process calls it, in the same order. Alone (``world=1``) it runs without a process group.
"""

from __future__ import annotations

import importlib
import os
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.conftest import poisoning
from tests.processes import killed, started, tail


def run(world, cases, folder, timeout=600):
    """``{case: [result of rank 0, of rank 1, ...]}``; raises with the traceback of the rank that failed first."""
    folder.mkdir(parents=True)
    logs = [folder / f"log{rank}" for rank in range(world)]
    processes = [started(log, main, str(folder), cases, rank, world) for rank, log in enumerate(logs)]
    deadline = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.exitcode]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        codes = [killed(process) for process in processes]
    if any(codes):
        rank = failed[0] if failed else 0
        wrote = tail(logs[rank])
        raise RuntimeError(f"ranks ended with {codes} after {timeout} s at most; rank {rank} wrote:\n{wrote}")
    found = [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]
    return {case: [results[case] for results in found] for case in cases}


def main(folder, cases, rank, world):
    torch.set_num_threads(1)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="0")
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
        )
    if any(":zero" in case for case in cases):
        import deepspeed

        # A collective through shared memory, compiled when a process starts: minutes, and a killed one leaves a lock.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    results = {}
    with poisoning():
        for case in cases:
            module, function, *arguments = case.split(":")
            place = Path(folder) / case.replace(":", "-").replace("/", "-")
            place.mkdir(exist_ok=True)
            began = time.monotonic()
            results[case] = getattr(importlib.import_module(f"tests.distributed.{module}"), function)(place, *arguments)
            print(f"{case}: {time.monotonic() - began:.1f} s", flush=True)
            if world > 1:
                dist.barrier()
    torch.save(results, f"{folder}/result{rank}")
    if world > 1:
        dist.destroy_process_group()
