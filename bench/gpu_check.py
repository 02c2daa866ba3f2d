"""Everything there is to find out on a GPU, in one command and under eight minutes, into one json.

    python -m bench.gpu_check               # needs torch and triton, and no network
    python -m bench.gpu_check --dry-run     # the same code on the CPU: kernels interpreted, nothing timed

Correctness of every kernel against float64, repeatability, capture in a CUDA graph, no host synchronisation, the memory
sanitizer if it is installed; then the timings, with their baselines in the same run, and floors from the bandwidth and
matmul rates this device showed. The file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

__all__ = ["WORKLOADS", "check_kernels", "main", "time_workloads"]

# Timings stop starting here; what runs then, and writing, take under a minute more.
SECONDS = 400.0
RESULTS = Path(__file__).parent / "results"
# (model, targets, r); each at every k, and at p = 16 of 120 with the energy term: 16 components and the energies are
# all that is read, so how many were dropped changes nothing.
WORKLOADS = (("LLaMA-3.1-8B", "qv", 8), ("T5-large", "qv", 8), ("LLaMA-3.1-8B", "all", 16))
PAST_RANKS = (8, 16, 64, 120)
PROVIDERS = (
    "dense eager",
    "dense on host",
    "dense compiled",
    "dense rebuilt",
    "ours gram, torch",
    "ours gram, triton",
    "ours stream, triton",
    "ours auto, triton",
    "ours spectral, triton",
)
# (out, in, r, k, energy): multiples of nothing, grouped-query rectangles, aligned shapes, ranks beyond one tile.
CHECK_SHAPES = (
    (1000, 777, 7, 5, False),
    (1024, 4096, 8, 8, False),
    (4096, 1024, 8, 16, True),
    (1, 513, 3, 20, True),
    (640, 640, 16, 16, False),
    (512, 768, 8, 120, False),
    (300, 200, 70, 3, True),
)
TINY_SHAPES = ((40, 56, 3, 5, False), (33, 70, 8, 8, True))
ERROR_BOUND = {"auto": 1e-3, "ieee": 1e-5, "tf32": 1e-2}


def check_kernels(device: str, shapes=CHECK_SHAPES) -> list[dict]:
    """Largest errors of each algorithm, and whether repeats agree: all shapes in the default precision, two in others.

    A shape's ranks are compiled in, so every further pair of precision and dtype costs seconds.
    """
    found = []
    for algorithm in ("gram", "stream", "dense", "spectral"):
        found.append(_check(device, shapes, algorithm, "auto", torch.float32))
        found.append(_check(device, shapes[:2], algorithm, "auto", torch.bfloat16))
        found.append(_check(device, shapes[:2], algorithm, "tf32", torch.float32))
        found.append(_check(device, shapes[:2], algorithm, "ieee", torch.float32))
        found.append(_check(device, shapes[:1], algorithm, "ieee", torch.float64))
    return found


def _check(device: str, shapes, algorithm: str, precision: str, dtype: torch.dtype) -> dict:
    import ella_kernels as ek

    from .measure import exact, relative_error
    from .providers import dense_form, make_group
    from .shapes import Size

    group = make_group([Size(*shape) for shape in shapes], device)
    As = [a.detach().to(dtype) for a in group.lora_As]
    Bs = [b.detach().to(dtype) for b in group.lora_Bs]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factored = [ek.LowRank(*(None if t is None else t.to(wide) for t in past)) for past in group.pasts]
    pasts = [dense_form(past) for past in factored] if algorithm == "dense" else factored
    spectral = algorithm == "spectral"
    options = {"backend": "triton", "precision": precision} | ({} if spectral else {"algorithm": algorithm})
    # Beyond 64 the spectral kernel has no room for its (r, r) products.
    kept = [i for i, a in enumerate(As) if not (spectral and a.shape[0] > 64)]
    As, Bs, pasts, factored = ([group_[i] for i in kept] for group_ in (As, Bs, pasts, factored))
    scalings = [group.scalings[i] for i in kept]
    add_ = ek.add_spectral_grad_ if spectral else ek.add_hadamard_grad_

    def once():
        grads_A = [torch.zeros_like(a, dtype=wide) for a in As]
        grads_B = [torch.zeros_like(b, dtype=wide) for b in Bs]
        return add_(As, Bs, pasts, scalings, grads_A, grads_B, weight=1.0, **options), grads_A, grads_B

    entry = {"algorithm": algorithm, "precision": precision, "dtype": str(dtype).removeprefix("torch.")}
    try:
        values, grads_A, grads_B = once()
        again, *_ = once()
        worst = [0.0, 0.0]
        for i, a in enumerate(As):
            # A stored past is the root of the squared one: compare with what the kernel was given.
            reference = factored[i]
            value, grad_a, grad_b = exact(
                a, Bs[i], reference, scalings[i], penalty="spectral" if spectral else "hadamard"
            )
            worst[0] = max(worst[0], relative_error(values[i], value))
            worst[1] = max(worst[1], relative_error(grads_A[i], grad_a), relative_error(grads_B[i], grad_b))
        bound = 1e-12 if dtype == torch.float64 else ERROR_BOUND[precision]
        entry |= {"value_error": worst[0], "grad_error": worst[1], "bound": bound}
        entry |= {"repeats_agree": torch.equal(values, again)}
        entry["passed"] = max(worst) <= bound and entry["repeats_agree"]
    except Exception as error:
        entry |= {"passed": False, "failure": f"{type(error).__name__}: {str(error).splitlines()[0][:300]}"}
    return entry


def check_step(device: str) -> list[dict]:
    """The in-place form as a training step uses it: no host synchronisation, and replayed from a CUDA graph."""
    import ella_kernels as ek

    from .measure import relative_error
    from .providers import make_group
    from .shapes import Size

    group = make_group([Size(1024, 768, 8, 8), Size(768, 1024, 8, 8)], device)
    As, Bs = [a.detach() for a in group.lora_As], [b.detach() for b in group.lora_Bs]
    grads = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
    weight = torch.tensor(2.0, device=device)

    def step():
        return ek.add_hadamard_grad_(As, Bs, group.pasts, group.scalings, *grads, weight=weight, backend="triton")

    step()
    wanted = [grad.clone() for grad in grads[0]]
    entries = []
    if device == "cuda":
        for name, body in (("no host synchronisation", _without_sync), ("replayed from a CUDA graph", _graphed)):
            for grad in (*grads[0], *grads[1]):
                grad.zero_()
            try:
                times = body(step)
                torch.cuda.synchronize()
                error = max(relative_error(g, times * w.double()) for g, w in zip(grads[0], wanted, strict=True))
                entries.append({"check": name, "passed": error < 1e-5, "error": error})
            except Exception as error:
                entries.append({"check": name, "passed": False, "failure": f"{type(error).__name__}: {error}"[:300]})
    return entries


def _without_sync(step) -> int:
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 1


def _graphed(step) -> int:
    from .measure import Graphed

    graph = Graphed(step)  # three warm-up steps; capturing runs nothing
    graph()
    graph()
    return 5


def sanitize() -> dict:
    """Small shapes under compute-sanitizer, if it is installed."""
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).exists():
        return {"ran": False, "reason": "compute-sanitizer is not installed"}
    check = [sys.executable, "-m", "bench.gpu_check", "--kernels"]
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *check]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return {"ran": False, "reason": "over 60 s"}
    return {"ran": True, "passed": done.returncode == 0, "output": (done.stdout + done.stderr)[-2000:]}


def cases() -> Iterator:
    """The workloads, most important first: the run stops when its time is over."""
    from .shapes import Case, Size, model_case

    for ranks in ((8,), ("energy",), (120,), (16, 64)):
        for model, targets, r in WORKLOADS:
            for k in ranks:
                if k != "energy":
                    yield model_case(model, targets, r, k)
                    continue
                plain = model_case(model, targets, r, 16)
                sizes = tuple(Size(*size[:4], energy=True) for size in plain.sizes)
                yield Case(f"{plain.name} +energy", sizes)


def time_workloads(deadline: float, rates: dict) -> list[dict]:
    """Rows of every case that fits before ``deadline`` (``time.monotonic``), as in results.json, with their floors."""
    from .rows import Limits, measure_case

    limits = Limits(3.0, 0.5, rates["copy_bytes_per_s"], rates["matmul_flops_per_s"])
    rows = []
    for case in cases():
        for graphed, names in ((False, PROVIDERS), (True, [name for name in PROVIDERS if "triton" in name])):
            if time.monotonic() > deadline:
                rows.append({"case": case.name, "graphed": graphed, "reason": "the run's time was over"})
                continue
            measured = measure_case("gpu_check", case, "in-place", names, limits, "cuda", graphed=graphed)
            for row, _ in measured.values():
                rows.append(row.as_dict() | {"graphed": graphed} | _floor(row, rates))
            torch.cuda.empty_cache()
    return rows


def _floor(row, rates: dict) -> dict:
    """Seconds that the counted bytes, and the counted operations, take at the device's measured rates."""
    if row.flops is None:
        return {}
    # The cheapest compensated product of "auto": three in bf16, at twice the rate of tf32.
    rate = rates["tf32_flops_per_s"] * 2 / 3 if "triton" in row.provider else rates["matmul_flops_per_s"]
    return {"bytes_floor": row.bytes / rates["copy_bytes_per_s"], "operations_floor": row.flops / rate}


def _tf32_rate() -> float:
    from .measure import _matmul_rate

    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return _matmul_rate("cuda")
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _clocks() -> dict:
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit,temperature.gpu"
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[torch.cuda.current_device()].split(", ")
    return dict(zip(fields.split(","), values, strict=False))


def _write(results: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when every check passed, 1 when one did not, 2 when there is no GPU to check."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, interpreted, no timing")
    parser.add_argument("--kernels", action="store_true", help="only check the kernels, on small shapes")
    parser.add_argument("--output", type=Path, help="default bench/results/gpu_<device>.json; nothing for a dry run")
    chosen = parser.parse_args(arguments)
    started = time.monotonic()
    if chosen.dry_run:
        # Before anything imports the kernels: they are decorated once.
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        print("no GPU here: nothing is measured and nothing is written; --dry-run checks this script on the CPU")
        return 2
    device = "cpu" if chosen.dry_run else "cuda"
    kernels = check_kernels(device, TINY_SHAPES if chosen.dry_run or chosen.kernels else CHECK_SHAPES)
    steps = [] if chosen.kernels else check_step(device)
    failed = [entry for entry in (*kernels, *steps) if not entry["passed"]]
    for entry in (*kernels, *steps):
        print(json.dumps(entry), flush=True)
    results = {"dry_run": chosen.dry_run, "kernels": kernels, "steps": steps}
    if device == "cuda" and not chosen.kernels:
        from .measure import machine

        facts = machine("cuda")
        facts["tf32_flops_per_s"] = _tf32_rate()
        facts["before"] = _clocks()
        results["sanitizer"] = sanitize()
        results["rows"] = time_workloads(started + SECONDS, facts)
        results["machine"] = facts | {"after": _clocks(), "cuda": torch.version.cuda, "hip": torch.version.hip}
        failed += [results["sanitizer"]] if results["sanitizer"].get("passed") is False else []
        name = re.sub(r"[^A-Za-z0-9]+", "-", facts["name"]).strip("-").lower()
        chosen.output = chosen.output or RESULTS / f"gpu_{name}.json"
    results["seconds"] = time.monotonic() - started
    if chosen.output:
        _write(results, chosen.output)
        print(f"written to {chosen.output}")
    print(f"{len(failed)} checks failed" if failed else "every check passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
