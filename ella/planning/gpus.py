"""Rates of named GPUs: from the vendors' data sheets, or from a committed run of ``bench.gpu_check``."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

__all__ = ["GPUS", "Gpu", "committed_results", "find_gpu", "measured"]


@dataclass(frozen=True)
class Gpu:
    """One GPU. Operations a second count a multiply-add as two; dense, without sparsity.

    Attributes:
        target: key of the kernels' tables. memory: bytes.
        bf16, fp32_products: operations a second of bf16 products, and of the products that the penalty's float32 ones
            are made of: tf32, or float32 itself.
        products: how many of those one float32 product takes.
        bandwidth: bytes a second of its memory. link, network: one way, to the GPUs of its node and to other nodes.
        node: GPUs in a node.
        source: where the numbers are from.
        penalty_factor: measured time of the penalty over the bound computed from the other numbers; None: not measured.
    """

    name: str
    target: str
    memory: int
    bf16: float
    fp32_products: float
    products: int
    bandwidth: float
    link: float
    network: float = 50e9
    node: int = 8
    source: str = ""
    penalty_factor: float | None = None

    @property
    def is_measured(self) -> bool:
        return self.penalty_factor is not None


_SHEET = "data sheet"
# NVIDIA A100 80GB SXM, H100 SXM and H200 SXM data sheets, NVIDIA HGX B200 data sheet (dense figures: half of those with
# sparsity), AMD Instinct MI300X data sheet. Networks are assumed: one 400 Gbit/s adapter per GPU.
GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", "sm_80", 80 * 10**9, 312e12, 156e12, 3, 2.039e12, 300e9, source=f"{_SHEET}, A100 80GB SXM"),
        Gpu("H100", "sm_90", 80 * 10**9, 989.5e12, 494.7e12, 3, 3.35e12, 450e9, source=f"{_SHEET}, H100 SXM"),
        Gpu("H200", "sm_90", 141 * 10**9, 989.5e12, 494.7e12, 3, 4.8e12, 450e9, source=f"{_SHEET}, H200 SXM"),
        Gpu("B200", "sm_100", 180 * 10**9, 2250e12, 1125e12, 3, 7.7e12, 900e9, source=f"{_SHEET}, HGX B200"),
        Gpu("MI300X", "gfx942", 192 * 10**9, 1307.4e12, 163.4e12, 1, 5.3e12, 448e9, source=f"{_SHEET}, MI300X"),
    )
}
# The case of a committed run that says how far the kernels are from the bound: (case, way, sizes of the class).
CALIBRATION = ("LLaMA-3.1-8B, q and v (64 layers) r8 k8", "ours auto, triton")


def committed_results(name: str) -> Path | None:
    """The newest ``bench/results/gpu_*.json`` of this source checkout measured on such a GPU; None if there is none."""
    folder = Path(__file__).resolve().parents[2] / "bench" / "results"
    found = [path for path in folder.glob("gpu_*.json") if name.lower() in str(_read(path)["machine"]["name"]).lower()]
    return max(found, key=lambda path: _read(path)["machine"]["date"], default=None)


def measured(gpu: Gpu, results: dict[str, Any], bound: float) -> Gpu:
    """``gpu`` with what a run of ``bench.gpu_check`` found on it.

    Args:
        results: content of its file.
        bound: the time, in seconds, that ``gpu``'s rates give for :data:`CALIBRATION`.
    """
    case, way = CALIBRATION
    rows = [row for row in results["rows"] if row["case"] == case and row["provider"] == way and row.get("median")]
    if not rows:
        raise ValueError(f"these results have no time of {way} for {case}, from which the penalty's is predicted")
    machine = results["machine"]
    return replace(
        gpu,
        bandwidth=machine.get("copy_bytes_per_s", gpu.bandwidth),
        penalty_factor=rows[0]["median"] / bound,
        source=f"measured on {machine['name']}, {machine['date']}, commit {machine.get('commit')}; the base model's "
        f"products and the links: {gpu.source}",
    )


def find_gpu(name: str) -> Gpu:
    """A GPU of :data:`GPUS` by name, in any case. Raises ValueError, listing the names, for another."""
    found = {known.lower(): gpu for known, gpu in GPUS.items()}.get(name.lower())
    if found is None:
        raise ValueError(f"gpu must be one of {', '.join(GPUS)}, found {name!r}")
    return found


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
