"""Layers that know no variants, or requantise when they merge: finished tasks act and merge all the same."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as lora_layer
from peft.tuners.lora.awq import AwqLoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from ella import EllaConfig, EllaRegularizer
from ella.acting import TASK
from tests.ella.models import deltas, randomise
from tests.ella.test_lora import quantised_model
from tests.kernels.cases import relative_error


class Rounding(lora_layer.Linear):
    """Merges as torchao's layers do: by ``get_delta_weight`` alone, every merge rounding anew."""

    def merge(self, safe_merge=False, adapter_names=None):
        self.rounded = getattr(self, "rounded", 0)
        for name in check_adapters_to_merge(self, adapter_names):
            weight = self.get_base_layer().weight
            weight.data = weight.data + self.get_delta_weight(name)
            self.rounded += 1
            self.merged_adapters.append(name)

    def unmerge(self):
        while self.merged_adapters:
            weight = self.get_base_layer().weight
            weight.data = weight.data - self.get_delta_weight(self.merged_adapters.pop())


def model_of(cls):
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10)), LoraConfig(target_modules=["0", "2"])
    )
    inner, config = model.base_model.model, model.peft_config["default"]
    for i in (0, 2):
        inner[i] = cls(inner[i].base_layer, "default", config=config, r=4, lora_alpha=8)
    randomise(model, 0)
    return model.eval()


X = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))


def output(model):
    with torch.no_grad():
        return model(X)


@pytest.mark.parametrize("cls", [AwqLoraLinear, Rounding, lora_layer.Linear])
def test_finished_tasks_act(cls):
    model = model_of(cls)
    reg = EllaRegularizer(model)
    for task in range(3):
        randomise(model, task)
        live = output(model)
        reg.end_task(f"task {task}")
        assert relative_error(output(model), live) < 1e-6
        with model.disable_adapter():
            assert relative_error(output(model), live) < 1e-6
        model.set_adapter("default")
        assert relative_error(output(model), live) < 1e-6
        model.set_adapter(TASK)
    randomise(model, 9)
    wanted = output(model)
    assert relative_error(wanted, live) > 1e-2
    model.base_model.set_adapter(["default", TASK])
    assert relative_error(output(model), wanted) < 1e-6, "each acts for itself"
    model.set_adapter(TASK)
    # And with gradients, as in training.
    model(X).square().mean().backward()
    trained = [p for n, p in model.named_parameters() if TASK in n]
    assert trained and all(p.grad is not None and p.grad.any() for p in trained)
    assert not any(p.grad is not None for n, p in model.named_parameters() if "default" in n)


def test_a_layer_that_requantises_does_so_once():
    model = model_of(Rounding)
    reg = EllaRegularizer(model)
    randomise(model, 1)
    reg.end_task("one")
    randomise(model, 2)
    live = output(model)
    for adapters, times in ((None, 1), (["default", TASK], 2), ([TASK, "default"], 2)):
        before = [layer.module.__dict__.get("rounded", 0) for layer in reg.layers]
        model.merge_adapter(adapters)
        assert relative_error(output(model), live) < 1e-6
        assert [layer.module.rounded - n for layer, n in zip(reg.layers, before, strict=True)] == [times, times]
        model.unmerge_adapter()
        assert relative_error(output(model), live) < 1e-6
    model.delete_adapter(TASK)
    with pytest.raises(ValueError, match="was deleted"):
        reg.penalty()
    assert all(type(layer.module) is Rounding for layer in reg.layers)


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_is_merged_with_both_at_once(kind):
    """One sum and one quantisation: what PEFT gives for one adapter that holds both."""
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(2))
    model = quantised_model(kind)
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
    randomise(model, 1)
    reg.end_task("one")
    randomise(model, 2)
    whole = quantised_model(kind)
    with torch.no_grad():
        for layer in reg.layers:
            module = whole.base_model.model.get_submodule(layer.name)
            a = [layer.module.lora_A[name].weight for name in ("default", TASK)]
            b = [layer.module.scaling[name] * layer.module.lora_B[name].weight for name in ("default", TASK)]
            module.lora_A["default"].weight = nn.Parameter(torch.cat(a))
            module.lora_B["default"].weight = nn.Parameter(torch.cat(b, 1))
            module.scaling["default"] = 1.0
        assert relative_error(model(x), whole(x)) < 1e-2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.merge_adapter()
            whole.merge_adapter()
        assert relative_error(model(x), whole(x)) < 1e-3
        for layer in reg.layers:
            ours = layer.module.get_base_layer().weight
            theirs = whole.base_model.model.get_submodule(layer.name).get_base_layer().weight
            assert (ours.data != theirs.data).float().mean() < 1e-3
    assert deltas(reg)
