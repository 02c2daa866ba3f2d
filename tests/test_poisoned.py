"""The fixture that all tests lean on: memory that the packages allocate and do not write is NaN."""

import pytest
import torch

from ella_kernels.torch_backend.batching import Workspace

ALLOCATIONS = {
    "empty": "torch.empty(3, dtype=like.dtype)",
    "empty_like": "torch.empty_like(like)",
    "empty_strided": "torch.empty_strided((3,), (1,), dtype=like.dtype)",
    "new_empty": "like.new_empty(3)",
}


def allocated(name, module, dtype):
    return eval(ALLOCATIONS[name], {"__name__": module, "torch": torch, "like": torch.zeros(3, dtype=dtype)})


@pytest.mark.parametrize(
    "module", ["ella", "ella.past", "ella_kernels.torch_backend.batching", "ella_kernels.triton_backend.gram"]
)
@pytest.mark.parametrize("name", ALLOCATIONS)
def test_floats_of_the_packages_are_nan(name, module):
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        found = allocated(name, module, dtype)
        assert found.shape == (3,) and found.dtype == dtype and found.isnan().all()


@pytest.mark.parametrize("name", ALLOCATIONS)
def test_others_and_integers_are_left_alone(name, monkeypatch):
    filled = []
    monkeypatch.setattr(torch.Tensor, "fill_", lambda tensor, value: filled.append(tensor))
    for module in ("torch.nn.init", "peft.tuners.lora.layer", "ellarium", "tests.kernels.cases"):
        allocated(name, module, torch.float32)
    assert allocated(name, "ella_kernels.torch_backend.batching", torch.int64).dtype == torch.int64
    assert not filled
    allocated(name, "ella_kernels.torch_backend.batching", torch.float32)
    assert len(filled) == 1


def test_work_buffers_of_the_packages_are_poisoned():
    assert Workspace().take("any", torch.zeros(1), 2, 3).isnan().all()


def test_compiled_callers_are_traced_without_the_poison():
    code = compile("def make(like):\n    return torch.empty_like(like).zero_() + like.new_empty(0).sum()", "x", "exec")
    scope = {"__name__": "ella_kernels.x", "torch": torch}
    exec(code, scope)
    found = torch.compile(scope["make"], backend="eager", fullgraph=True)(torch.ones(3))
    assert torch.equal(found, torch.zeros(3))
