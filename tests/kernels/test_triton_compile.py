"""Every kernel with every row of the tile tables, compiled for GPUs that are not here: what the compiler says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ella_kernels.resources import SHARED_LIMITS, TARGETS, Resources, compile_unit, markdown
from ella_kernels.triton_backend import kernels, tiles

# Kernels whose work is a large dot; the others sum.
MATRIX_KERNELS = {"gram_fwd_kernel_blocks", "gram_bwd_kernel_factors", "stream_kernel_factors"}


@pytest.fixture(scope="module")
def compiled():
    # Processes of their own: this one has decorated the kernels for the interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "ella_kernels.resources", "--json", "--target"]
    running = [
        subprocess.Popen([*command, t], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for t in TARGETS
    ]
    rows = []
    for process in running:
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        rows += [Resources(**row) for row in json.loads(output)]
    return rows


LAUNCHES = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Driver:
    # What the JIT asks of a driver before it launches.
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

driver.set_active(Driver())
run, launched = JITFunction.run, []

def compile_only(self, *args, grid, warmup, **kwargs):
    launched.append(self.__name__)
    return run(self, *args, grid=grid, warmup=True, **kwargs)

JITFunction.run = compile_only
from ella_kernels import functional, ops, triton_backend
from ella_kernels.triton_backend import gram, launch, spectral, stream
from tests.kernels.cases import cast, factors

triton_backend.check_device = lambda tensor: None
for module in (gram, launch, spectral, stream):
    module.device_key = lambda device: "sm_90"
found = {}
for algorithm in ("gram", "stream", "dense", "spectral"):
    for dtype, past_dtype, weight, precision in (
        (torch.float32, torch.float32, torch.tensor(2.0), "auto"),
        (torch.float32, torch.float32, None, "ieee"),
        (torch.bfloat16, torch.bfloat16, None, "auto"),
        (torch.float64, torch.float64, None, "auto"),
        (torch.bfloat16, torch.float64, None, "auto"),
    ):
        layers = [factors(64, 96, 8, 8, seed=i) for i in range(2)]
        As, Bs = [layer[0].to(dtype) for layer in layers], [layer[1].to(dtype) for layer in layers]
        pasts = [cast(layer[2], past_dtype) for layer in layers]
        grads = [torch.zeros_like(a) for a in As], [torch.zeros_like(b) for b in Bs]
        operands = functional._operands(As, Bs, pasts, [1.0, 2.0], algorithm)
        launched.clear()
        ops.add_penalty_grad_(*operands, *grads, weight, 3.0, "triton", precision)
        found[f"{algorithm} {dtype} {past_dtype} {precision}"] = list(launched)
    if algorithm != "spectral":
        # Sums in float64 are for operands that are all wide.
        a, b, past = factors(64, 96, 8, 8, energy=True)
        past = past._replace(row_energy=past.row_energy.bfloat16(), col_energy=past.col_energy.bfloat16())
        operands = functional._operands([a], [b], [past], [1.0], algorithm)
        launched.clear()
        ops.add_penalty_grad_(*operands, [torch.zeros_like(a)], [torch.zeros_like(b)], None, 3.0, "triton", "ieee")
        found[f"{algorithm}, energies of 16 bits"] = list(launched)
print(json.dumps(found))
"""


def test_every_launch_site_passes_the_real_compiler():
    """The launchers through the JIT for an sm_90, argument binding to machine code: only the launch is left out."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 23
    assert {name: len(launched) for name, launched in found.items()} == dict.fromkeys(found, 3)


def test_all_kernels_are_compiled_for_all_targets(compiled):
    for target in TARGETS:
        rows = [row for row in compiled if row.target == target]
        assert {row.kernel for row in rows} == kernels().keys()
        products = {row.precision for row in rows if row.kernel in MATRIX_KERNELS}
        exact_sums = set() if target == "sm_100" else {"float64"}
        assert products == exact_sums | ({"ieee"} if target == "gfx942" else {"tf32x3", "tf32", "ieee"})


def test_nothing_spills_on_sm_90(compiled):
    rows = [row for row in compiled if row.target == "sm_90"]
    assert rows and [row for row in rows if row.spills] == []


def test_matrix_kernels_spill_nowhere(compiled):
    rows = [row for row in compiled if row.kernel in MATRIX_KERNELS]
    assert rows and [row for row in rows if row.spills] == []


def test_shared_memory_fits_every_chip(compiled):
    assert [row for row in compiled if row.shared > SHARED_LIMITS[row.target]] == []
    # sm_80 stands for the default row, which consumer chips with 99 KB use too.
    assert max(row.shared for row in compiled if row.target == "sm_80") <= 99 * 1024


@pytest.mark.parametrize(
    "target, instruction", [("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")]
)
def test_matrix_units_are_used(compiled, target, instruction):
    rows = [row for row in compiled if row.target == target and row.kernel in MATRIX_KERNELS]
    on_units = [row for row in rows if row.precision != "ieee" or target == "gfx942"]
    # Float64 has the older instruction on sm_90 too.
    wanted = {"float64": "mma.sync"} if target.startswith("sm_") else {}
    assert on_units and [r for r in on_units if r.instruction != wanted.get(r.precision, instruction)] == []
    # Exact fp32 has no matrix instruction on NVIDIA: it must not silently become tf32.
    exact = [row for row in rows if row.precision == "ieee" and target != "gfx942"]
    assert [row for row in exact if row.instruction != "fma.rn"] == []


def test_every_precision_has_a_tile_on_every_device():
    for target in (*TARGETS, "sm_75", "sm_120", "gfx1100", "cpu"):
        assert tiles.gram_tile(target, "float64") and tiles.stream_tile(target, "float64")
        for precision in ("tf32x3", "tf32", "ieee"):
            assert tiles.gram_tile(target, precision) and tiles.stream_tile(target, precision)
            assert tiles.spectral_tile(target, precision)


SUMS = """
import re, sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from ella_kernels.resources import _signature, units

inside = outside = 0
for unit in units(sys.argv[1]):
    if unit.precision == "tf32x3" and unit.name in ("gram_fwd_kernel_blocks", "stream_kernel_factors"):
        signature, constants = _signature(unit)
        target = GPUTarget("cuda", int(unit.target[3:]), 32)
        ttgir = compile(ASTSource(unit.kernel, signature, constexprs=constants), target=target).asm["ttgir"]
        for line in ttgir.splitlines():
            inside += bool(re.search(r"(warp_group_dot|tt\\.dot) %\\S+, %\\S+, %arg", line))
            outside += bool(re.search(r"arith\\.addf %arg\\d+, %b_x[xy]\\S* : tensor<\\d+x\\d+xf32", line))
print(inside, outside)
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_long_sum_is_formed_on_tensor_cores(target):
    """The compiler folds a sum into the product it is of, if it may; a loop's accumulator is no operand of one here."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SUMS, target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    inside, outside = map(int, done.stdout.split())
    # gram: six accumulators of each memory order but one; stream: of gradients, and of a past walked in blocks.
    assert inside == 0 and outside >= 20


def test_compiling_under_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="cannot be compiled under TRITON_INTERPRET=1"):
        compile_unit(None)


def test_markdown_has_a_row_each():
    row = Resources("k", "r 8", "sm_90", "tf32", 4, 128, 0, 2048, "wgmma", "222:8, 81")
    assert markdown([row]).splitlines()[2] == "| `k` | r 8 | sm_90 | tf32 | 4 | 128 | 0 | 2.0 KB | wgmma | 222:8, 81 |"
