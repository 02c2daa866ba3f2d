"""Registration: opcheck, full-graph compilation, and what importing does."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import ella_kernels as ek
from ella_kernels import checks, ops
from tests.kernels.cases import exact, factors, relative_error

PENALTIES = ["hadamard", "spectral"]


def mixed():
    cases = [factors(24, 20, 3, 5, seed=1), factors(17, 33, 4, 6, seed=2, energy=True), factors(24, 20, 3, 5, seed=3)]
    cases.append((cases[0][0].bfloat16(), cases[0][1].bfloat16(), cases[0][2].left @ cases[0][2].right))
    cases.append((cases[0][0].clone(), cases[0][1].clone(), None))
    return [c[0] for c in cases], [c[1] for c in cases], [c[2] for c in cases], [2.0, 1.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("with_grad", [False, True])
@pytest.mark.parametrize("algorithm", ["auto", "stream", "spectral"])
def test_opcheck_of_the_penalty(algorithm, with_grad):
    As, Bs, pasts, scalings = mixed()
    for t in (*As, *Bs):
        t.requires_grad_(with_grad)
    operands = ops._lists(checks.checked_layers(As, Bs, pasts, scalings, algorithm))
    torch.library.opcheck(ops.penalty, (*operands, with_grad, "torch", "auto"))


def test_opcheck_of_the_in_place_form():
    As, Bs, pasts, scalings = mixed()
    operands = ops._lists(checks.checked_layers(As, Bs, pasts, scalings, "auto"))
    grads = [torch.zeros_like(t) for t in As], [torch.zeros_like(t) for t in Bs]
    torch.library.opcheck(ops.add_penalty_grad_, (*operands, *grads, torch.tensor(2.0), 1.0, "torch", "auto"))


@pytest.mark.parametrize("name", PENALTIES)
def test_full_graph_compilation(name):
    a, b, past = factors(24, 20, 3, 5)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(a, b):
        return 3 * getattr(ek, f"{name}_penalty")(a * 2, b, past, 0.5)

    value, grad_a, grad_b = exact(2 * a, b, past, 0.5, name)
    a.requires_grad_(), b.requires_grad_()
    found = loss(a, b)
    found.backward()
    assert relative_error(found.detach(), 3 * value) < 1e-5
    assert relative_error(a.grad, 6 * grad_a) < 1e-5
    assert relative_error(b.grad, 3 * grad_b) < 1e-5


def test_full_graph_compilation_by_inductor_of_the_in_place_form():
    a, b, past = factors(24, 20, 3, 5)

    @torch.compile(fullgraph=True)
    def seed(grad_a, grad_b):
        return ek.add_hadamard_grad_([a], [b], [past], [2.0], [grad_a], [grad_b], weight=10.0).sum()

    grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
    value = seed(grad_a, grad_b)
    want, want_a, want_b = exact(a, b, past, 2.0)
    assert relative_error(value, want) < 1e-5
    assert relative_error(grad_a, 10 * want_a) < 1e-5 and relative_error(grad_b, 10 * want_b) < 1e-5


def test_no_graph_is_kept_without_grad():
    a, b, past = factors(24, 20, 3, 5)
    assert not ek.hadamard_penalty(a, b, past).requires_grad
    with torch.no_grad():
        assert not ek.hadamard_penalty(a.requires_grad_(), b, past).requires_grad


def test_autograd_keeps_factor_sized_tensors_only():
    a, b, past = factors(256, 256, 8, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ek.hadamard_penalty(a.requires_grad_(), b.requires_grad_(), past)
    assert saved and max(saved) <= 8 * 256


@pytest.mark.parametrize("package", ["ella_kernels", "ella"])
def test_importing_has_no_side_effects(package):
    script = f"""
import os, sys, torch
before = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state().clone()
import {package}
after = dict(os.environ), torch.get_default_dtype(), torch.get_num_threads(), torch.random.get_rng_state()
assert before[:3] == after[:3] and torch.equal(before[3], after[3])
assert not torch.cuda.is_initialized()
loaded = [m for m in ("peft", "transformers") if m in sys.modules]
assert {package!r} != "ella_kernels" or not loaded, loaded
print("clean")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "clean", done.stderr


def test_public_names():
    assert set(ek.__all__) == {
        "LowRank",
        "Plan",
        "add_hadamard_grad_",
        "add_spectral_grad_",
        "hadamard_penalty",
        "hadamard_penalty_grouped",
        "reference",
        "select_algorithm",
        "spectral_penalty",
        "spectral_penalty_grouped",
        "truncate",
    }
    assert all(hasattr(ek, name) for name in ek.__all__)
