"""Fill a Triton cache with the kernels that ``bench.gpu_check`` launches, for a GPU that is not here.

    python -m bench.gpu_cache FOLDER                       # compiles for sm_90
    TRITON_CACHE_DIR=FOLDER python -m bench.gpu_check      # on the GPU machine, from the same sources

Triton's key of a kernel is made of its sources and arguments, the target, the release of ptxas, environment variables
that change the compiler, and a digest of the installed Triton itself, libtriton.so included. None of it needs a driver,
but the digest differs between releases and between the wheels of two Python versions: fill the cache with the Python,
Triton and processor of the GPU machine. ``gpu_check`` says whether a carried cache fits and how many kernels it gave.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["compare", "fill", "identity", "main", "place"]

_MANIFEST = "gpu_cache.json"
# Stream, function, two of metadata and two hooks.
_BEFORE_ARGUMENTS = 6


def identity() -> dict:
    """What keys of this installation depend on beside a kernel: equal here and on the GPU machine, or nothing fits."""
    import triton
    from triton.backends.nvidia.compiler import get_ptxas_version
    from triton.runtime import cache

    variables: dict = {}
    with contextlib.suppress(ImportError):
        from triton._C.libtriton import get_cache_invalidating_env_vars

        variables = dict(get_cache_invalidating_env_vars())
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "triton": triton.__version__,
        "triton_key": hashlib.sha256(cache.triton_key().encode()).hexdigest(),
        "ptxas": hashlib.sha256(get_ptxas_version(90).encode()).hexdigest(),
        "variables": variables,
    }


def compare() -> str:
    """Whether the cache that was filled ahead fits this installation, in words; if it does it is put to use."""
    folder = os.environ.get("TRITON_CACHE_DIR")
    if not folder or not (manifest := Path(folder) / _MANIFEST).exists():
        return "none"
    filled = json.loads(manifest.read_text(encoding="utf-8"))["identity"]
    here = identity()
    different = [name for name in here if here[name] != filled.get(name)]
    if different:
        return f"does not fit: {', '.join(different)} differ"
    place(Path(folder))
    return "fits"


def compile_only(capability: int) -> list[tuple]:
    """Let launches compile for a target and launch nothing; for the rest of this process.

    Returns:
        A list that every launch appends ``(name, grid, arguments)`` to.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    launched: list[tuple] = []

    class Utils:
        """What loading a kernel asks of a driver."""

        def get_device_properties(self, device: int) -> dict[str, int]:
            return {"max_shared_mem": 2**30}

        def load_binary(self, name: str, *_: object) -> tuple:
            # Handles of the module and the function, registers, spills, threads a program may have.
            return None, None, 0, 0, 1024

    class Driver:
        """What Triton asks of a driver."""

        utils = Utils()

        def launcher_cls(self, source: object, metadata: Any) -> Callable:
            return lambda x, y, z, *rest: launched.append((metadata.name, (x, y, z), rest[_BEFORE_ARGUMENTS:]))

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())
    from ella_kernels import triton_backend  # noqa: F401  (every module that asks for the device is there now)

    for name, module in list(sys.modules.items()):
        if name.startswith("ella_kernels"):
            if hasattr(module, "select_backend"):
                module.select_backend = lambda backend, *_: "triton"
            if hasattr(module, "device_key"):
                module.device_key = lambda device: f"sm_{capability}"
            if hasattr(module, "check_device"):
                module.check_device = lambda tensor: None
    return launched


def _calls(small: bool):
    """``(what, call)`` of everything that ``gpu_check`` launches, in its order."""
    import torch

    import ella_kernels as ek

    from . import gpu_plan, gpu_stages
    from .gpu_probe import probe
    from .providers import PROVIDERS, SCALING, Group, prepare

    def empty(case) -> Group:
        # Nothing reads them: compiling depends on sizes, strides and alignment.
        def past(s):
            energies = (torch.ones(s.out), torch.ones(s.in_)) if s.energy else ()
            return ek.LowRank(torch.empty(s.out, s.k), torch.empty(s.k, s.in_), *energies)

        As = [torch.empty(s.r, s.in_, requires_grad=True) for s in case.sizes]
        Bs = [torch.empty(s.out, s.r, requires_grad=True) for s in case.sizes]
        return Group(case.sizes, As, Bs, [past(s) for s in case.sizes], [SCALING] * len(case.sizes))

    yield "probe", lambda: list(probe("cuda", launch_on="cpu"))
    cases = [(case, (gpu_plan.OURS,)) for case in gpu_plan.FIRST.values()]
    for case, names in cases if small else [*cases, *gpu_plan.COMPARED.values()]:
        for name in names:
            if name.endswith(", triton"):
                yield f"{case.name}: {name}", lambda c=case, n=name: prepare(PROVIDERS[n], empty(c), "in-place").call()
    if small:
        return
    for shapes in (gpu_stages.CHECK_SHAPES, gpu_stages.TINY_SHAPES):
        for algorithm in gpu_stages.ALGORITHMS:
            for chosen, precision, dtype in gpu_stages.checks(shapes):
                yield (
                    f"check {algorithm} {precision} {dtype}",
                    lambda *a: gpu_stages.check_call("cpu", *a)[1](),
                    chosen,
                    algorithm,
                    precision,
                    dtype,
                )
    yield "check step", gpu_stages.step_call("cpu", gpu_stages.STEP_SIZES)[0]


def prune(folder: Path) -> None:
    """Keep what a launch reads, the machine code and its metadata: a tenth of what compiling leaves behind."""
    for path in folder.glob("*/*"):
        if path.suffix in (".source", ".ttir", ".ttgir", ".llir", ".ptx"):
            path.unlink()


def place(folder: Path) -> None:
    """Let the cache be found where it lies now: Triton writes down where the files of a kernel are, in full."""
    for group in folder.glob("*/__grp__*.json"):
        names = json.loads(group.read_text(encoding="utf-8"))["child_paths"]
        here = {name: str(group.parent.resolve() / name) for name in names if (group.parent / name).exists()}
        group.write_text(json.dumps({"child_paths": here}), encoding="utf-8")


def fill(folder: Path, capability: int = 90, small: bool = False) -> dict:
    """Compile into ``folder``; ``small``: only the first stages' kernels. Returns counts of kernels and failures."""
    place(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder.resolve())
    os.environ.pop("TRITON_INTERPRET", None)
    compile_only(capability)
    from .gpu_stages import count_compilations

    counts: dict = count_compilations()
    failed = []
    for what, call, *arguments in _calls(small):
        began = time.monotonic()
        try:
            call(*arguments)
        except Exception as error:
            failed.append(f"{what}: {type(error).__name__}: {str(error)[:200]}")
        print(f"{time.monotonic() - began:6.1f} s  {what}", flush=True)
    prune(folder)
    found = {"target": f"sm_{capability}", "identity": identity(), **counts, "failed": failed}
    (folder / _MANIFEST).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1 if a kernel did not compile."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_cache", description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="to be TRITON_CACHE_DIR on the GPU machine")
    parser.add_argument("--capability", type=int, default=90, help="compute capability (default %(default)s)")
    parser.add_argument("--small", action="store_true", help="only the first stages' kernels")
    chosen = parser.parse_args(arguments)
    chosen.folder.mkdir(parents=True, exist_ok=True)
    found = fill(chosen.folder, chosen.capability, chosen.small)
    size = sum(path.stat().st_size for path in chosen.folder.rglob("*") if path.is_file())
    print(
        f"{found.get('compiled')} kernels compiled, {found.get('from_cache')} were there, {size / 2**20:.1f} MiB",
        *found["failed"],
        sep="\n",
    )
    return 1 if found["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
