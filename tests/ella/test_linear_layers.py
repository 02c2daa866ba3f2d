"""Models of linear layers take a step without Python per layer, with the gradient that the walk over layers gives."""

from __future__ import annotations

import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import ella
from ella import EllaConfig, EllaRegularizer
from ella.acting import TASK
from ella.linear_layers import LinearLayers, gradients
from tests.ella.models import randomise, tiny
from tests.kernels.cases import opcodes, relative_error


def linear_model(n=3, config=None):
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(10 + i, 11 + i) for i in range(n)))
    model = get_peft_model(layers, LoraConfig(r=4, lora_alpha=8, target_modules=[str(i) for i in range(n)]))
    randomise(model, 1)
    reg = EllaRegularizer(model, config or EllaConfig(ella_lambda=3.0))
    reg.end_task("first")
    randomise(model, 2)
    return model, reg


def adapter_parameters(model):
    return [p for name, p in model.named_parameters() if f".{TASK}." in name]


def step(model, reg):
    value = reg.add_gradient_(2.0)
    return value, [None if p.grad is None else p.grad.clone() for p in adapter_parameters(model)]


def clear(model):
    for p in adapter_parameters(model):
        p.grad = None


def walked(model, reg):
    """The step as the walk over layers does it, on a regularizer that has kept nothing."""
    clear(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinearLayers, "parameters", lambda *args: None)
        fresh = EllaRegularizer(model, reg.config)
        return step(model, fresh)


def replace_parameter(model, reg):
    linear = reg.layers[1].module.lora_A[TASK]
    linear.weight = nn.Parameter(2 * linear.weight.detach())


def replace_module(model, reg):
    linear = nn.Linear(11, 4, bias=False)
    reg.layers[1].module.lora_A[TASK] = linear


def swap_data(model, reg):
    _, b = reg.layers[1].parameters()
    b.data = -3 * b.data


def replace_past(model, reg):
    linear = reg.layers[1].module.lora_B["default"]
    linear.weight = nn.Parameter(2 * linear.weight.detach(), requires_grad=False)


def write_past(model, reg):
    with torch.no_grad():
        reg.layers[1].parameters("default")[0].mul_(3)


def swap_past_data(model, reg):
    a, _ = reg.layers[1].parameters("default")
    a.data = 3 * a.data


def narrow_past(model, reg):
    """Fewer components at the same addresses."""
    a, b = reg.layers[1].parameters("default")
    a.data, b.data = a.data[:2], b.data[:, :2]


def set_scale(model, reg):
    reg.layers[1].module.set_scale(TASK, 3.0)


def fold(model, reg):
    reg.end_task("second")
    randomise(model, 5)


def to_bfloat16(model, reg):
    model.to(torch.bfloat16)


def to_float64(model, reg):
    model.double()


def freeze(model, reg):
    reg.layers[1].parameters()[0].requires_grad_(False)


CHANGES = [
    replace_parameter, replace_module, swap_data, replace_past, write_past, swap_past_data, narrow_past,
    set_scale, fold, to_bfloat16, to_float64, freeze,
]  # fmt: skip


@pytest.mark.parametrize("penalty_rank", [None, 2])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_between_steps_is_seen(change, penalty_rank):
    model, reg = linear_model(config=EllaConfig(ella_lambda=3.0, penalty_rank=penalty_rank))
    for _ in range(2):
        clear(model)
        step(model, reg)
    change(model, reg)
    clear(model)
    value, found = step(model, reg)
    want_value, want = walked(model, reg)
    assert torch.equal(value, want_value) and value != 0
    for got, wanted in zip(found, want, strict=True):
        assert (got is None) == (wanted is None) and (got is None or torch.equal(got, wanted))


def test_the_memory_of_a_past_is_not_free_while_its_terms_are_kept():
    """Terms are recognised by addresses but may hold truncated copies: another past must not come to lie there."""
    model, reg = linear_model(config=EllaConfig(ella_lambda=3.0, penalty_rank=2))
    a, _ = reg.layers[0].parameters("default")
    memory = a.detach().numpy().copy()
    freed, a.data = weakref.ref(memory), torch.from_numpy(memory)
    del memory
    step(model, reg)
    a.data = 3 * a.data
    assert freed() is not None
    step(model, reg)
    assert freed() is None


@pytest.mark.parametrize("penalty", ["hadamard", "spectral"])
def test_the_gradient_is_that_of_autograd_on_top_of_the_old(penalty):
    model, reg = linear_model(config=EllaConfig(ella_lambda=3.0, penalty=penalty))
    parameters = adapter_parameters(model)
    for p in parameters[1:]:
        p.grad = torch.full_like(p, 0.25)
    # One is missing and one lies transposed in memory: both are the walk's cases as well.
    parameters[2].grad = torch.full_like(parameters[2].T, 0.25).T
    want = torch.autograd.grad(reg.penalty(), parameters)
    reg.add_gradient_(2.0)
    for p, wanted in zip(parameters, want, strict=True):
        assert relative_error(p.grad - (0.0 if p is parameters[0] else 0.25), 2 * wanted) < 1e-4


def test_a_step_runs_no_python_per_layer():
    counts = {}
    for n in (2, 8):
        _, reg = linear_model(n)
        reg.add_gradient_()
        counts[n] = opcodes(reg.add_gradient_, ella)
    assert counts[8] == counts[2] > 0


def test_other_layers_are_walked():
    for targets in (["up", "tokens"], ["up", "image"], ["attention", "point"]):
        model = tiny(targets=targets)
        assert EllaRegularizer(model)._linear.trainable("default") is None
    model = tiny(targets=["up", "down", "attention"])
    reg = EllaRegularizer(model)
    assert list(map(id, reg._linear.trainable("default"))) == [
        id(layer.parameters()[i]) for i in (0, 1) for layer in reg.layers
    ]


def test_subclasses_and_several_devices_are_walked():
    class Sharded(nn.Parameter):
        pass

    _, reg = linear_model()
    linear = reg.layers[1].module.lora_A[TASK]
    plain = linear.weight
    linear.weight = Sharded(plain.detach())
    assert type(linear.weight) is Sharded and reg._linear.trainable(TASK) is None
    linear.weight = nn.Parameter(plain.detach().to("meta"))
    assert reg._linear.trainable(TASK) is None
    linear.weight = plain
    assert reg._linear.trainable(TASK) is not None


def test_missing_gradients_share_one_allocation_but_are_tensors_of_their_own():
    shapes = [(3, 5), (7, 2), (2, 3), (0, 3)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes] + [nn.Parameter(torch.randn(4).half())]
    parameters[1].data = parameters[1].data.T
    kept = parameters[2].grad = torch.ones(2, 3)
    found = gradients(parameters)
    assert found[2] is kept and all(grad is p.grad for grad, p in zip(found, parameters, strict=True))
    for grad, p in zip(found, parameters, strict=True):
        assert grad.shape == p.shape and grad.dtype == p.dtype and grad.is_contiguous() and not grad._is_view()
        assert grad is kept or not grad.any()
    assert found[0].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
    found[0].add_(1)
    assert not found[1].any() and found[1]._version == 0
    (parameters[0] * 2).sum().backward()
    assert torch.equal(parameters[0].grad, torch.full((3, 5), 3.0))
