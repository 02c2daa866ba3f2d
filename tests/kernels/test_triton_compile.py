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


DRIVER = """
import json
import torch
from bench.gpu_cache import compile_only

launched = compile_only(90)
from ella_kernels import checks, ops
from tests.kernels.cases import cast, factors
"""

LAUNCHES = (
    DRIVER
    + """
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
        operands = ops._lists(checks.checked_layers(As, Bs, pasts, [1.0, 2.0], algorithm))
        launched.clear()
        ops.add_penalty_grad_(*operands, *grads, weight, 3.0, "triton", precision)
        found[f"{algorithm} {dtype} {past_dtype} {precision}"] = [name for name, *_ in launched]
    if algorithm != "spectral":
        # Sums in float64 are for operands that are all wide.
        a, b, past = factors(64, 96, 8, 8, energy=True)
        past = past._replace(row_energy=past.row_energy.bfloat16(), col_energy=past.col_energy.bfloat16())
        operands = ops._lists(checks.checked_layers([a], [b], [past], [1.0], algorithm))
        launched.clear()
        ops.add_penalty_grad_(*operands, [torch.zeros_like(a)], [torch.zeros_like(b)], None, 3.0, "triton", "ieee")
        found[f"{algorithm}, energies of 16 bits"] = [name for name, *_ in launched]
print(json.dumps(found))
"""
)


# Counts, addresses and weights of everyday calls of one class: every key that is asked for is a compilation.
VARIANTS = (
    DRIVER
    + """
from triton import knobs

keys = {}

def seen(*, key, fn, **_):
    keys.setdefault(fn.jit_function.__name__, set()).add(key)
    return True  # Do not compile.

knobs.runtime.jit_cache_hook = seen

def call(algorithm, n_layers, weight, offset, grad_dtype=torch.float32):
    layers = [factors(64, 96, 8, 8, seed=i) for i in range(n_layers)]
    As, Bs, pasts = [layer[0] for layer in layers], [layer[1] for layer in layers], [layer[2] for layer in layers]
    grads = [[torch.zeros(t.numel() + offset, dtype=grad_dtype)[offset:].view_as(t) for t in ts] for ts in (As, Bs)]
    operands = ops._lists(checks.checked_layers(As, Bs, pasts, [1.0] * n_layers, algorithm))
    ops.add_penalty_grad_(*operands, *grads, None, weight, "triton", "auto")

found = {}
for algorithm in ("gram", "stream", "dense", "spectral"):
    counts = {}
    for name, calls in {
        "numbers": [(n, weight, offset) for n in (1, 2, 16) for weight in (1.0, 3.0) for offset in (0, 1)],
        "gradients in bf16": [(2, 1.0, 0), (2, 1.0, 0, torch.bfloat16)],
    }.items():
        keys.clear()
        for call_ in calls:
            call(algorithm, *call_)
        counts[name] = {kernel: len(found) for kernel, found in keys.items()}
    found[algorithm] = counts
print(json.dumps(found))
"""
)


def run(script, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def variants():
    return run(VARIANTS)


# The same launch by Triton's own dispatch and directly, and directly again.
ROADS = (
    DRIVER
    + """
from ella_kernels.triton_backend import gram, launch

calls = []
plain = gram.launch

def both(kernel, grid, options, **arguments):
    kernel[grid](**arguments, **options)
    plain(kernel, grid, options, **arguments)
    plain(kernel, grid, options, **arguments)

gram.launch = both
found = []
for weight in (3.0, torch.tensor(2.0)):
    a, b, past = factors(64, 96, 8, 8, energy=True)
    operands = ops._lists(checks.checked_layers([a], [b], [past], [1.0], "gram"))
    ops.add_penalty_grad_(*operands, [torch.zeros_like(a)], [torch.zeros_like(b)], *(
        (None, weight) if isinstance(weight, float) else (weight, 1.0)), "triton", "auto")
for i in range(0, len(launched), 3):
    by_triton, *direct = launched[i : i + 3]
    for other in direct:
        same = by_triton[:2] == other[:2] and len(by_triton[2]) == len(other[2])
        found.append(same and all(x is y or x == y for x, y in zip(by_triton[2], other[2])))
print(json.dumps([len(launched), found, len(launch._compiled)]))
"""
)


def test_a_direct_launch_is_the_one_that_triton_makes():
    n_launched, same, n_compiled = run(ROADS)
    assert n_launched == 18 and same == [True] * 12
    # The last kernel is compiled once for a number and once for a tensor.
    assert n_compiled == 4


def test_numbers_of_a_call_are_not_compiled_in(variants):
    assert len(variants) == 4
    for algorithm, counts in variants.items():
        # stream is compiled for the rows and for the columns.
        sides = {"stream_kernel_factors": 2}
        assert len(counts["numbers"]) == (2 if algorithm in ("stream", "dense") else 3)
        assert counts["numbers"] == {kernel: sides.get(kernel, 1) for kernel in counts["numbers"]}


def test_only_kernels_that_write_gradients_are_compiled_for_their_dtype(variants):
    for counts in variants.values():
        for kernel, n in counts["gradients in bf16"].items():
            sides = 2 if kernel == "stream_kernel_factors" else 1
            assert n == (2 * sides if kernel.endswith("_factors") else 1)


def test_every_launch_site_passes_the_real_compiler():
    """The launchers through the JIT for an sm_90, argument binding to machine code: only the launch is left out."""
    found = run(LAUNCHES)
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
import json, re, sys
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
print(json.dumps([inside, outside]))
"""


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_no_long_sum_is_formed_on_tensor_cores(target):
    """The compiler folds a sum into the product it is of, if it may; a loop's accumulator is no operand of one here."""
    inside, outside = run(SUMS, target)
    # gram: six accumulators of each memory order but one; stream: of gradients, and of a past walked in blocks.
    assert inside == 0 and outside >= 20


def test_compiling_under_the_interpreter_is_refused():
    with pytest.raises(RuntimeError, match="cannot be compiled under TRITON_INTERPRET=1"):
        compile_unit(None)


def test_markdown_has_a_row_each():
    row = Resources("k", "r 8", "sm_90", "tf32", 4, 128, 0, 2048, "wgmma", "222:8, 81")
    assert markdown([row]).splitlines()[2] == "| `k` | r 8 | sm_90 | tf32 | 4 | 128 | 0 | 2.0 KB | wgmma | 222:8, 81 |"
