"""Bad input is named: argument, what was found, what was expected."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import ella_kernels as ek

A, B = torch.ones(2, 5), torch.ones(4, 2)
L, R = torch.ones(4, 3), torch.ones(3, 5)
PAST = ek.LowRank(L, R)
NESTED = torch.nested.nested_tensor([B, B], layout=torch.jagged)

BAD = [
    ((torch.ones(5), B, PAST), {}, ValueError, r"lora_A must have 2 dimensions, found shape \(5,\)"),
    ((A, torch.ones(4, 3), PAST), {}, ValueError, r"lora_B must have shape \(out, 2\).*found \(4, 3\)"),
    ((A, B, ek.LowRank(torch.ones(5, 3), R)), {}, ValueError, r"past.left must have shape \(4, 3\), found \(5, 3\)"),
    ((A, B, ek.LowRank(L, torch.ones(3, 6))), {}, ValueError, r"past.right must have shape \(3, 5\), found \(3, 6\)"),
    ((A, B, torch.ones(5, 4)), {}, ValueError, r"past must have shape \(4, 5\), found \(5, 4\)"),
    ((A, B, ek.LowRank(L, R, torch.ones(4))), {}, ValueError, "both row_energy and col_energy"),
    ((A, B, ek.LowRank(L, R, torch.ones(3), torch.ones(5))), {}, ValueError, r"row_energy must have shape \(4,\)"),
    ((A, B, ek.LowRank(L.clone().requires_grad_(), R)), {}, ValueError, "past.left must not require grad"),
    ((A, B, torch.ones(4, 5, requires_grad=True)), {}, ValueError, "past must not require grad"),
    ((A, B, PAST, float("nan")), {}, ValueError, "scaling must be finite, found nan"),
    ((A, B, PAST, float("inf")), {}, ValueError, "scaling must be finite, found inf"),
    ((A, B, PAST, "2"), {}, TypeError, "scaling must be a number, found str"),
    ((A.int(), B, PAST), {}, TypeError, "lora_A must be float32.*found torch.int32"),
    ((A, B.numpy(), PAST), {}, TypeError, "lora_B must be a tensor, found ndarray"),
    ((A, B, (L, R)), {}, TypeError, "past must be LowRank, a tensor or None, found tuple"),
    ((A, B, PAST), {"algorithm": "fast"}, ValueError, "algorithm must be one of .*found 'fast'"),
    ((A, B, PAST), {"backend": "cuda"}, ValueError, "backend must be one of .*found 'cuda'"),
    ((A, B, PAST), {"precision": "bf16"}, ValueError, "precision must be one of .*found 'bf16'"),
    ((A, B, torch.ones(4, 5)), {"algorithm": "gram"}, ValueError, "algorithm='gram' needs past as LowRank factors"),
    ((A, B.to("meta"), PAST), {}, ValueError, "must be on one device"),
    ((A, B, ek.LowRank(L.to("meta"), R)), {}, ValueError, "past.left must be on cpu"),
    ((A, B, PAST, 1e200), {}, ValueError, "scaling must be at most 1.3e.154 in size, found 1e.200"),
    ((A, B, PAST, 10**400), {}, ValueError, "scaling must fit a float, found a larger number"),
    ((A, B, PAST, Fraction(10**400)), {}, ValueError, "scaling must fit a float"),
    ((A, B, PAST, np.array([1.0])), {}, TypeError, "scaling must be a number, found ndarray"),
    ((A, B, PAST, 1j), {}, TypeError, "scaling must be a number, found complex"),
    ((A, B, PAST, None), {}, TypeError, "scaling must be a number, found NoneType"),
    ((A.to_sparse(), B, PAST), {}, TypeError, "lora_A must be a dense tensor, found torch.sparse_coo"),
    ((A, NESTED, PAST), {}, TypeError, "lora_B must be a dense tensor, found nested"),
    ((A, B, torch.ones(4, 5).to_sparse_csr()), {}, TypeError, "past must be a dense tensor, found torch.sparse_csr"),
    ((A, B, ek.LowRank(L, R.to_mkldnn())), {}, TypeError, "past.right must be a dense tensor, found torch._mkldnn"),
    ((A, B, ek.LowRank(L, R, -torch.ones(4), torch.ones(5))), {}, ValueError, r"row_energy must not be neg.*found -1"),
    ((A, B, ek.LowRank(L, R, torch.ones(4), -torch.ones(5))), {}, ValueError, "past.col_energy must not be negative"),
    ((A, B, ek.LowRank(None, R)), {}, TypeError, "past.left must be a tensor, found NoneType"),
    ((A, B, PAST), {"algorithm": None}, ValueError, "algorithm must be one of .*found None"),
    ((A, B, PAST), {"backend": ["triton"]}, ValueError, r"backend must be one of .*found \['triton'\]"),
    ((A, B, PAST), {"precision": np.array(["auto", "ieee"])}, ValueError, "precision must be one of"),
]


@pytest.mark.parametrize("args, options, error, message", BAD, ids=[m[:40] for *_, m in BAD])
def test_bad_input_is_named(args, options, error, message):
    with pytest.raises(error, match=message):
        ek.hadamard_penalty(*args, **options)


def test_grouped_errors_name_the_layer():
    with pytest.raises(ValueError, match=r"lora_B of layer 1 must have shape"):
        ek.hadamard_penalty_grouped([A, A], [B, torch.ones(4, 3)], [PAST, PAST], [1.0, 1.0])
    with pytest.raises(ValueError, match="scalings must have one entry per layer, found 1 for 2"):
        ek.hadamard_penalty_grouped([A, A], [B, B], [PAST, PAST], [1.0])


GROUP = {"lora_As": [A], "lora_Bs": [B], "pasts": [PAST], "scalings": [1.0]}
BAD_LISTS = [
    ("lora_As", (a for a in [A]), "generator"),
    ("lora_As", {"x": A}, "dict"),
    ("lora_As", {0: A}, "dict"),
    ("lora_Bs", None, "NoneType"),
    ("pasts", {PAST}, "set"),
    ("scalings", 1.0, "float"),
    ("scalings", torch.tensor(1.0), "Tensor"),
]


@pytest.mark.parametrize("name, given, found", BAD_LISTS, ids=[f"{name} {found}" for name, _, found in BAD_LISTS])
def test_what_is_given_per_layer_must_be_a_sequence(name, given, found):
    message = f"{name} must be a sequence with one entry per layer, found {found}"
    with pytest.raises(TypeError, match=message):
        ek.hadamard_penalty_grouped(**GROUP | {name: given})
    with pytest.raises(TypeError, match=message):
        ek.add_spectral_grad_(**GROUP | {name: given}, grads_A=[A.clone()], grads_B=[B.clone()], weight=1.0)


def test_any_sequence_is_one():
    plain = ek.hadamard_penalty_grouped(**GROUP)
    stacked = {"lora_As": A[None], "lora_Bs": torch.nn.ParameterList([B]), "pasts": (PAST,), "scalings": np.ones(1)}
    with torch.no_grad():
        assert torch.equal(ek.hadamard_penalty_grouped(**stacked), plain) and plain > 0


@pytest.mark.parametrize("name", ["backend", "precision", "algorithm"])
def test_options_of_an_empty_call_are_checked(name):
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        ek.hadamard_penalty_grouped([], [], [], [], **{name: "x"})
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        ek.add_hadamard_grad_([], [], [], [], [], [], weight=1.0, **{name: "x"})


BAD_WEIGHTS = [
    (math.inf, ValueError, "weight must be finite, found inf"),
    (10**400, ValueError, "weight must fit a float"),
    (np.array([1.0]), TypeError, "weight must be a number, found ndarray"),
    ("1", TypeError, "weight must be a number, found str"),
    (1j, TypeError, "weight must be a number, found complex"),
    (torch.tensor(1j), TypeError, "weight must be real, found torch.complex64"),
    (torch.ones(()).to_sparse(), ValueError, "weight must hold a number, .*torch.sparse_coo"),
    (torch.ones((), device="meta"), ValueError, "weight must hold a number, found a tensor on meta"),
    (torch.ones(1), ValueError, r"weight must be a number or a 0-dim tensor, found shape \(1,\)"),
]


@pytest.mark.parametrize("weight, error, message", BAD_WEIGHTS, ids=[m[:40] for *_, m in BAD_WEIGHTS])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_bad_weights_are_named_by_first_and_later_calls(backend, weight, error, message):
    grads = torch.zeros_like(A), torch.zeros_like(B)

    def call(weight):
        ek.add_hadamard_grad_(*GROUP.values(), [grads[0]], [grads[1]], weight=weight, backend=backend)

    for _ in range(2):
        with pytest.raises(error, match=message):
            call(weight)
        assert not grads[0].any() and not grads[1].any()
        call(0.0)


def test_in_place_checks_targets():
    with pytest.raises(ValueError, match=r"grads_A\[0\] must have shape \(2, 5\)"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], [torch.zeros(5, 2)], [torch.zeros(4, 2)], weight=1.0)
    with pytest.raises(ValueError, match="weight must be finite, found nan"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], [A.clone()], [B.clone()], weight=float("nan"))
    with pytest.raises(TypeError, match="grads_A must be a sequence with one entry per layer, found NoneType"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], None, [B.clone()], weight=1.0)
    with pytest.raises(TypeError, match=r"grads_B\[0\] must be a dense tensor, found torch.sparse_coo"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], [A.clone()], [B.to_sparse()], weight=1.0)


def test_truncate_checks_its_rank():
    with pytest.raises(ValueError, match="rank must be at least 0, found -1"):
        ek.truncate(L, R, -1)
    with pytest.raises(TypeError, match="rank must be an int, found float"):
        ek.truncate(L, R, 2.0)
    with pytest.raises(ValueError, match=r"right must have shape \(3, in\)"):
        ek.truncate(L, torch.ones(2, 5), 1)


def test_truncate_checks_its_factors():
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="left must be finite"):
            ek.truncate(L * bad, R, 1)
        with pytest.raises(ValueError, match="right must be finite"):
            ek.truncate(L, R * bad, 1)
    with pytest.raises(TypeError, match=r"left must be a dense tensor, found torch.sparse_coo"):
        ek.truncate(L.to_sparse(), R, 1)
    with pytest.raises(TypeError, match=r"right must be a floating-point tensor, found torch.complex64"):
        ek.truncate(L, R.cfloat(), 1)


def test_triton_backend_without_a_gpu_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="backend='triton' needs tensors on a CUDA or ROCm GPU, found device type 'cpu'"
    ):
        ek.hadamard_penalty(A, B, PAST, backend="triton")
