"""Bad input is named: argument, what was found, what was expected."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek

A, B = torch.ones(2, 5), torch.ones(4, 2)
L, R = torch.ones(4, 3), torch.ones(3, 5)
PAST = ek.LowRank(L, R)

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


def test_in_place_checks_targets():
    with pytest.raises(ValueError, match=r"grads_A\[0\] must have shape \(2, 5\)"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], [torch.zeros(5, 2)], [torch.zeros(4, 2)], weight=1.0)
    with pytest.raises(ValueError, match="weight must be finite, found nan"):
        ek.add_hadamard_grad_([A], [B], [PAST], [1.0], [A.clone()], [B.clone()], weight=float("nan"))


def test_truncate_checks_its_rank():
    with pytest.raises(ValueError, match="rank must be at least 0, found -1"):
        ek.truncate(L, R, -1)
    with pytest.raises(TypeError, match="rank must be an int, found float"):
        ek.truncate(L, R, 2.0)
    with pytest.raises(ValueError, match=r"right must have shape \(3, in\)"):
        ek.truncate(L, torch.ones(2, 5), 1)


def test_triton_backend_without_a_gpu_raises(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(
        ValueError, match="backend='triton' needs tensors on a CUDA or ROCm GPU, found device type 'cpu'"
    ):
        ek.hadamard_penalty(A, B, PAST, backend="triton")
