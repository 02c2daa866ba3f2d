"""Layers as factors, against PEFT's own ``get_delta_weight``; and every kind that is refused, with its reason."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig
from torch import nn

from ella import EllaConfig, EllaRegularizer
from ella.lora import adapted_layers
from tests.ella.models import EXPERTS, deltas, randomise, tiny
from tests.kernels.cases import relative_error


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"up": 6, "image": 2}, "alpha_pattern": {"up": 3}},
        EXPERTS,
        {"targets": ["up"], "lora_bias": True},
    ],
    ids=["plain", "rslora", "patterns", "experts", "lora_bias"],
)
def test_factors_are_the_update(options):
    model = tiny(**options)
    layers = adapted_layers(model, "default")
    kinds = {layer.kind for layer in layers}
    assert kinds >= ({"linear"} if "lora_bias" in options else {"linear", "embedding", "conv", "attention"})
    assert ("experts" in kinds) == ("target_parameters" in options)
    reg = EllaRegularizer(model)
    for layer, (name, expected) in zip(layers, deltas(reg).items(), strict=True):
        parts = layer.factors(*layer.parameters())
        assert layer.name == name and len(parts) == len(expected) == layer.n_parts
        for (a, b), want in zip(parts, expected, strict=True):
            assert tuple(want.shape) == layer.shape
            found = layer.scaling() * b.double() @ a.double()
            assert relative_error(found.detach(), want) < 1e-6


def quantised_model(kind):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).half()
    for i in range(2):
        if kind == "4bit":
            quantised = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
            quantised.weight = bnb.nn.Params4bit(base[i].weight.data, requires_grad=False, quant_type="nf4")
        else:
            quantised = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
            quantised.weight = bnb.nn.Int8Params(base[i].weight.data, requires_grad=False, has_fp16_weights=False)
        base[i] = quantised.to("cpu")
    setattr(base, f"is_loaded_in_{kind}", True)  # what transformers notes, and PEFT asks
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]))
    randomise(model, 1)
    return model


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_quantised_base_is_never_read(kind):
    model = quantised_model(kind)
    reg = EllaRegularizer(model)
    x = torch.randn(3, 64)
    past = deltas(reg)
    before = model(x)
    reg.end_task("one")
    # Equal up to the rounding of the base's own output dtype.
    assert relative_error(model(x).detach(), before.detach()) < 1e-2
    randomise(model, 2)
    for name, new in deltas(reg).items():
        want = (new[0] * past[name][0]).square().sum()
        assert abs(reg.values()[name] / want - 1) < 1e-5
    with pytest.raises(
        ValueError, match=r"keep_past='merge' needs float32, bfloat16 or float16 base.*0 is a (Params4bit|Int8Params)"
    ):
        EllaRegularizer(quantised_model(kind), EllaConfig(keep_past="merge"))


def linear_model(**options):
    base = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    return get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"], **options))


def arrow_model():
    base = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "1"]), adapter_name="task_0")
    arrow = ArrowConfig(top_k=1)
    arrow.task_adapter_names = ["task_0"]  # set here by PEFT's create_arrow_model, which loads saved experts
    model.add_adapter("default", LoraConfig(r=4, target_modules=["0", "1"], arrow_config=arrow))
    return model


REFUSED = [
    ({"use_dora": True}, "DoRA rescales every row"),
    ({"kasa_config": KasaConfig()}, "KaSA truncates the base weight"),
    ({"use_bdlora": BdLoraConfig(target_modules_bd_a=["0", "1"], nblocks=2)}, "BD-LoRA stores block-diagonal"),
    ({"use_qalora": True, "qalora_group_size": 4}, "QA-LoRA pools the input"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weight"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' changes the base weight"),
    ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weight"),
    ({"init_lora_weights": "mica"}, "MiCA freezes B"),
]


@pytest.mark.parametrize(
    "options, reason", REFUSED, ids=[reason.split()[0] + str(i) for i, (_, reason) in enumerate(REFUSED)]
)
def test_other_updates_are_refused_with_layer_and_reason(options, reason):
    model = linear_model(**options)
    with pytest.raises(ValueError, match="cannot penalise 2 of the LoRA layers: 0: " + reason):
        EllaRegularizer(model)


@pytest.mark.parametrize("init", ["corda", "loftq", "lora_ga"])
def test_inits_that_need_data_are_refused_by_their_config(init):
    model = linear_model()
    model.peft_config["default"].init_lora_weights = init
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weight"):
        EllaRegularizer(model)


def test_arrow_is_refused():
    with pytest.raises(ValueError, match="Arrow routes every token"):
        EllaRegularizer(arrow_model())


def test_the_reason_for_refusing_dora_holds():
    """PEFT's get_delta_weight of a DoRA layer is not the change of its weight: a penalty on it would be wrong."""
    torch.manual_seed(0)
    model = linear_model(use_dora=True)
    randomise(model, 0)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    eye = torch.eye(16)
    change = (layer(eye) - layer.base_layer(eye)).T.detach()
    assert relative_error(layer.get_delta_weight("default").detach(), change) > 0.1


def test_grouped_convolutions_are_refused_and_can_be_left_out():
    base = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "1"]))
    with pytest.raises(ValueError, match=r"0: a grouped convolution \(groups=2\)"):
        EllaRegularizer(model)
    with pytest.warns(UserWarning, match="leaves out 1 LoRA layers.*0: a grouped convolution"):
        reg = EllaRegularizer(model, EllaConfig(skip_unsupported=True))
    assert list(reg.values()) == ["1"]
    randomise(model, 0)
    x = torch.randn(2, 4, 9, 9)
    before = model(x)
    reg.end_task("one")
    assert relative_error(model(x).detach(), before.detach()) < 1e-6


def test_everything_unsupported_is_an_error_even_when_skipping():
    with pytest.raises(ValueError, match="cannot penalise 2"):
        EllaRegularizer(linear_model(use_dora=True), EllaConfig(skip_unsupported=True))


def test_wrong_models_and_adapters_are_named():
    with pytest.raises(TypeError, match="expected a PeftModel with LoRA adapters, found Linear"):
        EllaRegularizer(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"no adapter 'other'; it has \['default'\]"):
        EllaRegularizer(linear_model(), EllaConfig(adapter_name="other"))


def test_tied_layers_are_counted_once_and_both_keep_the_effect():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

        def forward(self, x):
            return self.b(torch.tanh(self.a(x)))

    model = get_peft_model(Tied(), LoraConfig(r=2, target_modules=["a", "b"]))
    randomise(model, 0)
    first, second = (model.base_model.model.get_submodule(n) for n in "ab")
    # Two Parameters over one storage, as PEFT ties an embedding and its head.
    for name in ("lora_A", "lora_B"):
        weight = getattr(first, name)["default"].weight
        getattr(second, name)["default"].weight = nn.Parameter(weight.data)
    reg = EllaRegularizer(model)
    assert list(reg.values()) == ["a"] and [layer.tied_to for layer in reg.layers] == [None, "a"]
    x = torch.randn(4, 8)
    before = model(x)
    reg.end_task("one")
    assert relative_error(model(x).detach(), before.detach()) < 1e-6


def test_names_are_those_of_the_base_model():
    names = [layer.name for layer in adapted_layers(tiny(**EXPERTS), "default")]
    assert set(names) == {
        "tokens", "up", "attention", "attention.out_proj", "experts.up", "image", "point", "line", "volume",
    }  # fmt: skip
