"""Registers, spills, shared memory and matrix instruction of every kernel; compiled without the GPU it is for.

    python -m ella_kernels.resources                     # a Markdown table
    python -m ella_kernels.resources --target sm_90 --json
    python -m ella_kernels.resources --variants          # rows of tiles.VARIANTS beside the table's, for sm_90

Numbers come from the compiler: the cubin's resource usage and machine code for NVIDIA, the assembly's metadata for AMD.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .dispatch import interpreted
from .sass import cuobjdump, inner_loops

__all__ = ["SHARED_LIMITS", "TARGETS", "Resources", "Unit", "compile_unit", "markdown", "units"]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
# Bytes of shared memory one program may ask for, by the vendors' documentation.
SHARED_LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
PRECISIONS = ("auto", "tf32", "ieee")
# (r, k, energy): one tile, several of the past, several of both.
GRAM_PROBLEMS = ((8, 8, False), (8, 16, True), (16, 16, False))
# (r, k, stored): a past held whole where there is room, one walked in blocks, and a matrix.
STREAM_PROBLEMS = ((8, 120, False), (64, 512, False), (8, 0, True))


class Unit(NamedTuple):
    """One compilation: a kernel, its constants, and how it is launched."""

    problem: str
    target: str
    precision: str
    kernel: Any
    constants: dict
    warps: int
    stages: int
    maxnreg: int | None = None

    @property
    def name(self) -> str:
        return self.kernel.__name__


class Resources(NamedTuple):
    """What the compiler says.

    Attributes:
        spills: bytes of stack per thread on NVIDIA, spilled vector registers on AMD.
        steps: instructions of each innermost loop, matrix products among them after a colon; sm_80 and sm_90 only,
            since sm_100 waits in code that jumps into its loops.
    """

    kernel: str
    problem: str
    target: str
    precision: str
    warps: int
    registers: int
    spills: int
    shared: int
    instruction: str
    steps: str = ""


def _products(target: str) -> list[str]:
    """What the kernels multiply in on a target: the distinct precisions of dots, and float64 where sums take it."""
    from .triton_backend.launch import FAST_FLOAT64, target_precision

    products = [target_precision(precision, target) for precision in PRECISIONS]
    return list(dict.fromkeys(products)) + ["float64"] * (target in FAST_FLOAT64)


def units(target: str) -> Iterator[Unit]:
    """Every kernel with every row of the tile tables for ``target``, on the problems the tables were made for."""
    import torch
    import triton.language as tl

    from .triton_backend import gram, spectral, stream, tiles
    from .triton_backend.tables import SideClass

    side = SideClass(*[torch.float32] * 4)
    weight = {"WEIGHT_IS_TENSOR": True}
    exact = {"ACC": tl.float64, "PRECISION": "ieee"}
    S: Any
    tile: Any
    for products in _products(target):
        common = {"ACC": tl.float32, "PRECISION": products} if products != "float64" else exact
        for r, k, energy in GRAM_PROBLEMS:
            problem = f"r {r}, k {k}" + (", energy" if energy else "")
            tile = tiles.gram_tile(target, products)
            S = gram.gram_shape(r, k, energy, tile)
            T = {name: side.types(True, touched) for name, touched in gram.touched(energy).items()}
            grad_options = (tile.grad_warps, tile.grad_stages, tile.grad_maxnreg)
            for kernel, constants, options in (
                (gram.gram_fwd_kernel_blocks, common | {"T": T["blocks"]}, (tile.warps, tile.stages, tile.maxnreg)),
                (gram.gram_fwd_kernel_reduce, {"ACC": common["ACC"]}, (gram.REDUCE_WARPS, 1)),
                (gram.gram_bwd_kernel_factors, common | weight | {"T": T["factors"]}, grad_options),
            ):
                yield Unit(problem, target, products, kernel, {"S": S} | constants, *options)
        for r, k, stored in STREAM_PROBLEMS:
            tile = tiles.stream_tile(target, products)
            S = stream.stream_shape(r, k, stored, False, True, tile)
            types = side.types(True, stream.touched(S)["factors"])
            problem = f"r {r}, " + ("stored" if stored else f"k {k}")
            for which, is_rows in (("rows", True), ("cols", False)):
                constants = {"S": S, "T": types, "T_2": types._replace(GRAD=None), "IS_ROWS": is_rows, "LAST": is_rows}
                yield Unit(
                    f"{problem}, {which}", target, products, stream.stream_kernel_factors,
                    common | weight | constants, tile.warps, tile.stages, tile.maxnreg,
                )  # fmt: skip
        if products == "float64":
            continue
        tile = tiles.spectral_tile(target, products)
        S = spectral.spectral_shape(8, 8, tile)
        T = {name: side.types(True, touched) for name, touched in spectral.TOUCHED.items()}
        for kernel, constants in (
            (spectral.spectral_fwd_kernel_blocks, (common if products == "tf32" else exact) | {"T": T["blocks"]}),
            (spectral.spectral_bwd_kernel_factors, common | weight | {"T": T["factors"]}),
            (spectral.spectral_fwd_kernel_reduce, {"ACC": common["ACC"]}),
        ):
            yield Unit("r 8, k 8", target, products, kernel, {"S": S} | constants, tile.warps, tile.stages)
    values = stream.stream_kernel_values
    yield Unit("", target, "float64", values, {"BLOCK": stream.VALUES_BLOCK}, 1, 1)


def _signature(unit: Unit) -> tuple[dict, dict]:
    pointers = {"p_sides": "*i64", "p_items": "*i64", "p_layers": "*i64"}
    pointers |= {"p_partials": "*fp64", "p_totals": "*fp64", "p_weight": "*fp64"}
    scalars = {"weight": "fp64", "grad_base": "i64", "n_layers": "i32"}
    wide = {"p_blocks"} if "fp64" in str(unit.constants.get("ACC")) else set()
    if unit.name == "spectral_fwd_kernel_reduce":
        wide = {"p_blocks"}
    signature, constants = {}, {}
    for i, name in enumerate(unit.kernel.arg_names):
        if name in unit.constants:
            signature[name], constants[(i,)] = "constexpr", unit.constants[name]
        else:
            signature[name] = pointers.get(name) or scalars.get(name) or ("*fp64" if name in wide else "*fp32")
    return signature, constants


def compile_unit(unit: Unit) -> Resources:
    """Compile for the unit's target and read what it takes.

    Raises:
        RuntimeError: under ``TRITON_INTERPRET=1``, where there is nothing to compile.
    """
    if interpreted():
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1; unset it")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants = _signature(unit)
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(unit.kernel.arg_names)
        if signature[name].startswith("*")
    }
    nvidia = unit.target.startswith("sm_")
    target = GPUTarget("cuda", int(unit.target[3:]), 32) if nvidia else GPUTarget("hip", unit.target, 64)
    limit = {} if unit.maxnreg is None else {"maxnreg": unit.maxnreg}
    compiled = triton.compile(
        ASTSource(unit.kernel, signature, constexprs=constants, attrs=aligned),
        target=target,
        options={"num_warps": unit.warps, "num_stages": unit.stages} | limit,
    )
    registers, spills, instruction = _nvidia(compiled) if nvidia else _amd(compiled)
    steps = ""
    if unit.target in ("sm_80", "sm_90"):
        steps = ", ".join(
            f"{a}:{b}" if b else str(a) for a, b in inner_loops(cuobjdump(compiled.asm["cubin"], "-sass"))
        )
    return Resources(
        unit.name, unit.problem, unit.target, unit.precision, unit.warps, registers, spills,
        compiled.metadata.shared, instruction, steps,
    )  # fmt: skip


def _first(text: str, patterns: tuple[str, ...]) -> str:
    return next((name for name in patterns if name in text), "none")


def _nvidia(compiled: Any) -> tuple[int, int, str]:
    needs = cuobjdump(compiled.asm["cubin"], "--dump-resource-usage")
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", needs)}
    ptx = compiled.asm["ptx"]
    return usage["REG"], usage["STACK"] + usage["LOCAL"], _first(ptx, ("tcgen05.mma", "wgmma", "mma.sync", "fma.rn"))


def _amd(compiled: Any) -> tuple[int, int, str]:
    assembly = compiled.asm["amdgcn"]
    usage = {name: int(value) for name, value in re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly)}
    return usage["vgpr_count"], usage["vgpr_spill_count"], _first(assembly, ("v_mfma", "v_fma"))


def markdown(rows: list[Resources]) -> str:
    """The table as Markdown."""
    lines = [
        "| kernel | problem | target | products | warps | registers | spills | shared memory | instruction | steps |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        shared = f"{row.shared / 1024:.1f} KB"
        lines.append(
            f"| `{row.kernel}` | {row.problem} | {row.target} | {row.precision} | {row.warps} | {row.registers} | "
            f"{row.spills} | {shared} | {row.instruction} | {row.steps} |"
        )
    return "\n".join(lines) + "\n"


def variants(target: str) -> Iterator[tuple[str, Unit]]:
    """Every variant of the default precision, and each kernel that it compiles otherwise than the table's row."""
    from .triton_backend.tiles import VARIANTS, variant

    table = list(units(target))
    for name in VARIANTS:
        with variant(name):
            changed = [unit for unit in units(target) if unit.precision == "tf32x3" and unit not in table]
        yield from ((name, unit) for unit in changed)


def variants_markdown(rows: list[tuple[str, Resources]]) -> str:
    """A table per variant; one that compiles nothing anew has a line of its own."""
    from .triton_backend.tiles import VARIANTS

    sections = []
    for name, (algorithm, changes) in VARIANTS.items():
        found = [row for other, row in rows if other == name]
        what = ", ".join(f"{field} = {value}" for field, value in changes.items())
        table = markdown(found) if found else "The kernels are the table's.\n"
        sections.append(f"## {name}\n\n`{algorithm}`: {what}.\n\n{table}")
    return "# Variants to be timed on a GPU\n\n" + "\n".join(sections)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ella_kernels.resources", description=__doc__.split("\n")[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="compile for this target only; repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON instead of Markdown")
    parser.add_argument("--variants", action="store_true", help="what tiles.VARIANTS changes, for sm_90")
    parser.add_argument("--output", type=Path, help="write to this file instead of printing")
    arguments = parser.parse_args()
    if arguments.variants:
        text = variants_markdown([(name, compile_unit(unit)) for name, unit in variants("sm_90")])
    else:
        rows = [compile_unit(unit) for target in arguments.target or TARGETS for unit in units(target)]
        text = json.dumps([row._asdict() for row in rows], indent=1) + "\n" if arguments.json else markdown(rows)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")


if __name__ == "__main__":
    main()
