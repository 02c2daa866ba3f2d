"""Cases run in several gloo processes, many in one start-up.

A case is a function ``(folder) -> anything torch can save``, named "module:function" or "module:function:argument...";
every process calls it, in the same order. Alone (``world=1``) it runs without a process group.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def run(world, cases, folder, timeout=600):
    """``{case: [result of rank 0, of rank 1, ...]}``; raises with the traceback of the rank that failed first."""
    folder.mkdir(parents=True)
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    if world > 1:
        sizes = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
        environment |= sizes | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    processes = []
    for rank in range(world):
        with open(folder / f"log{rank}", "w") as log:
            command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.launch", str(folder), *cases]
            own = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {})
            processes.append(subprocess.Popen(command, cwd=ROOT, env=own, stdout=log, stderr=subprocess.STDOUT))
    deadline = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in processes):
            failed = [rank for rank, process in enumerate(processes) if process.poll()]
            if failed or time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    codes = [process.returncode for process in processes]
    if any(codes):
        rank = failed[0] if failed else 0
        text = (folder / f"log{rank}").read_text()
        raise RuntimeError(f"ranks ended with {codes} after {timeout} s at most; rank {rank} wrote:\n{text[-6000:]}")
    found = [torch.load(folder / f"result{rank}", weights_only=False) for rank in range(world)]
    return {case: [results[case] for results in found] for case in cases}


def main(folder, cases):
    from tests.conftest import poisoning

    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    torch.set_num_threads(1)
    if world > 1:
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


if __name__ == "__main__":
    try:
        main(sys.argv[1], sys.argv[2:])
    except BaseException:
        traceback.print_exc()
        sys.stdout.flush()
        # Without the others: they may be waiting for this one.
        os._exit(1)
