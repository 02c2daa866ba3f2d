"""``add_updates``: values, gradients and memory of both adapters together, against plain PEFT with both active."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from ella import acting
from ella.acting import TASK, act_together
from tests.kernels.cases import relative_error

KNOWN = "default"
IN, OUT, K, R = 12, 10, 5, 3
# More rows than k + r: the factors are joined. As many or fewer: each adapter for itself.
MANY, FEW = (4, 7, IN), (2, 4, IN)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: torch.finfo(torch.bfloat16).eps}


def pair(dtype=torch.float64, adapters=None, dropout=0.0, **options):
    """One linear layer twice, weights alike: as ELLA runs it, and as PEFT does with both adapters active."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT)).to(dtype).requires_grad_(False)
    lora = {"target_modules": ["0"], "init_lora_weights": False} | options
    model = get_peft_model(base, LoraConfig(r=K, lora_alpha=K, **lora))
    model.add_adapter(TASK, LoraConfig(r=R, lora_alpha=2 * R, lora_dropout=dropout, **lora))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, dtype=torch.float64).to(adapters or dtype)
            parameter.requires_grad_(f".{TASK}" in name)
    plain = copy.deepcopy(model)
    plain.base_model.set_adapter([KNOWN, TASK])
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_("lora_" in name and f".{TASK}" in name)
    model.set_adapter(TASK)
    ours, reference = (m.base_model.model[0] for m in (model, plain))
    ours.scaling[KNOWN] = reference.scaling[KNOWN] = 1.0
    act_together(ours, KNOWN, in_base=False, forwarded=True, folded=True)
    return ours.train(), reference.train()


def inputs(shape=MANY, dtype=torch.float64, requires_grad=True):
    gen = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype).requires_grad_(requires_grad)


def run(layer, x, call=None, autocast=False):
    """Output and all gradients, in float64; dropout masks are the same for every layer."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    torch.manual_seed(2)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x) if call is None else call(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    y.backward(weight.to(y.dtype))
    found = {"output": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.detach().double() for name, t in found.items() if t is not None}


def check(found, expected, bound):
    assert found.keys() == expected.keys() and {"output"} < found.keys()
    for name, want in expected.items():
        assert relative_error(found[name], want) < bound, name


@pytest.fixture
def joined(monkeypatch):
    """How often the factors were joined, in the custom function or without gradients."""
    calls = []
    original = acting._add_joined
    monkeypatch.setattr(acting, "_add_joined", lambda *a: calls.append(1) or original(*a))
    return calls


SHAPES = {
    "many rows": MANY, "few rows": FEW, "one row": (1, IN), "a vector": (IN,), "2-D": (20, IN), "4-D": (2, 3, 4, IN),
    "as many rows as ranks": (K + R, IN), "one more": (K + R + 1, IN),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_those_of_both_adapters(shape, dtype, joined):
    ours, reference = pair(dtype)
    check(run(ours, inputs(shape, dtype)), run(reference, inputs(shape, dtype)), BOUND[dtype])
    assert len(joined) == (inputs(shape).numel() > (K + R) * IN)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("options", [{"dropout": 0.4}, {"lora_bias": True}, {"use_rslora": True}], ids=str)
def test_dropout_bias_and_scaling(shape, options):
    ours, reference = pair(**options)
    check(run(ours, inputs(shape)), run(reference, inputs(shape)), 1e-12)
    check(run(ours.eval(), inputs(shape)), run(reference.eval(), inputs(shape)), 1e-12)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("base", "adapters", "autocast"),
    [
        (torch.bfloat16, torch.bfloat16, False),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.float32, True),
        (torch.float32, torch.float32, True),
        (torch.float64, torch.float64, True),
    ],
)
def test_half_precision_is_as_exact_as_its_dtype(shape, dropout, base, adapters, autocast):
    ours, reference = pair(base, adapters, dropout)
    x = inputs(shape, base)
    expected = run(copy.deepcopy(reference).double(), x.detach().double().requires_grad_())
    found = run(ours, x, autocast=autocast)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        dtypes = ours(x).dtype, reference(x).dtype
        # The backward too, which some call inside.
        inside = run(ours, x, autocast=autocast)
    assert dtypes[0] == dtypes[1] and x.grad.dtype == x.dtype
    assert all(p.grad.dtype == p.dtype for p in ours.parameters() if p.requires_grad)
    bound = BOUND[torch.float64 if base == torch.float64 else torch.bfloat16]
    check(inside, expected, bound)
    check(found, expected, bound)


@pytest.mark.parametrize("shape", [(0, IN), (3, 0, IN)])
def test_an_empty_batch_gives_zero_gradients(shape):
    ours, _ = pair()
    x = inputs(shape)
    y = ours(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad.norm() == 0 for p in ours.parameters() if p.requires_grad)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, 1), "strided": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(4, -1, -1), "columns apart": lambda t: torch.cat((t, t), -1)[..., ::2],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_inputs_that_are_not_contiguous(layout):
    ours, reference = pair()
    found, expected = (run(layer, inputs(), lambda x, at=layer: at(layout(x))) for layer in (ours, reference))
    check(found, expected, 1e-12)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
def test_a_base_output_and_gradient_that_are_not_contiguous(shape):
    ours, reference = pair()

    class Turned(nn.Linear):
        def forward(self, x):
            return super().forward(x).transpose(0, -1).contiguous().transpose(0, -1)

    for layer in (ours, reference):
        layer.base_layer.__class__ = Turned
    found, expected = (
        run(layer, inputs(shape), lambda x, at=layer: at(x).transpose(0, -1)) for layer in (ours, reference)
    )
    check(found, expected, 1e-12)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("frozen", [("x",), ("lora_A",), ("lora_B",), ("x", "lora_A"), ("lora_A", "lora_B")], ids=str)
def test_only_what_needs_a_gradient_gets_one(shape, frozen):
    layers = pair()
    found = []
    for layer in layers:
        layer.base_layer.bias.requires_grad_()
        for name in set(frozen) - {"x"}:
            getattr(layer, name)[TASK].requires_grad_(False)
        found.append(run(layer, inputs(shape, requires_grad="x" not in frozen)))
    check(*found, 1e-12)
    assert ("x" in found[0]) == ("x" not in frozen) and "base_layer.bias" in found[0]


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
def test_nothing_is_kept_without_gradients(shape, joined):
    ours, reference = pair()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            y = ours(inputs(shape))
            assert not y.requires_grad and relative_error(y, reference(inputs(shape))) < 1e-12
    assert len(joined) == 2 * (shape == MANY)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(shape, dropout, use_reentrant):
    ours, reference = pair(dropout=dropout)
    found = run(ours, inputs(shape), lambda x: checkpoint(ours, x, use_reentrant=use_reentrant))
    check(found, run(reference, inputs(shape)), 1e-12)


@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
def test_a_graph_is_used_twice_and_its_output_changed_in_place(shape):
    ours, reference = pair()
    found, expected = (
        run(layer, inputs(shape), lambda x, at=layer: torch.relu_(at(x)).mul(2)) for layer in (ours, reference)
    )
    check(found, expected, 1e-12)
    leaves = x, a, b = inputs(shape), ours.lora_A[TASK].weight, ours.lora_B[TASK].weight
    a.grad = b.grad = None
    y = ours(x).square().sum()
    y.backward(retain_graph=True)
    once = [t.grad.clone() for t in leaves]
    y.backward()
    assert all(one.norm() > 0 and torch.equal(t.grad, 2 * one) for one, t in zip(once, leaves, strict=True))


def test_finite_differences_of_the_joined_product():
    gen = torch.Generator().manual_seed(4)
    shapes = ((3, 4, OUT), (3, 4, IN), (K, IN), (OUT, K), (R, IN), (OUT, R))
    result, x, a_k, b_k, a_t, b_t = (torch.randn(s, generator=gen, dtype=torch.float64) for s in shapes)
    trained = [t.requires_grad_() for t in (result, x, a_t, b_t)]

    def joined(result, x, a_t, b_t):
        return acting._AddJoined.apply(result, x, a_k, b_k, a_t, b_t, 1.5, torch.float64)

    assert torch.autograd.gradcheck(joined, trained)


def test_a_knowledge_that_is_trained_gets_its_gradient():
    layers = pair()
    for layer in layers:
        layer.lora_A[KNOWN].requires_grad_()
    found, expected = (run(layer, inputs()) for layer in layers)
    assert f"lora_A.{KNOWN}.weight" in found
    check(found, expected, 1e-12)


def test_a_knowledge_that_was_rescaled_acts_so():
    layers = pair()
    for layer in layers:
        layer.scaling = {name: 0.5 * scaling for name, scaling in layer.scaling.items()}
    check(*(run(layer, inputs()) for layer in layers), 1e-12)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [MANY, FEW], ids=["many", "few"])
def test_the_whole_layer_compiles(shape, dropout):
    ours, _ = pair(dropout=dropout)
    expected = run(ours, inputs(shape))
    torch.compiler.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    check(run(ours, inputs(shape), compiled), expected, 1e-12)
    ours.eval()
    with torch.no_grad():
        assert relative_error(compiled(inputs(shape)), ours(inputs(shape))) < 1e-12


# --- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(layer, x):
    """Of storages kept for the backward, parameters and ``x`` apart."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x).sum()
    for tensor in (x, *layer.parameters()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values())


@pytest.mark.parametrize("shape", [(8, 20, IN), FEW], ids=["many", "few"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(
    ("base", "autocast"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_no_more_activations_are_kept_than_by_plain_lora(shape, dropout, base, autocast):
    ours, plain = pair(base, torch.float32, dropout)
    plain._active_adapter = [TASK]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        kept, allowed = saved_bytes(ours, inputs(shape, base)), saved_bytes(plain, inputs(shape, base))
    rows = inputs(shape).numel() // IN
    assert 0 < kept <= allowed + 4 * rows * (K + R)
    if not (dropout or autocast) and base == torch.float32:
        assert kept == 4 * rows * R, "x itself is kept, and (n, r) of its products"


def test_each_activation_is_kept_once():
    ours, _ = pair(torch.float32)
    x, packed = inputs(dtype=torch.float32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        ours(x)
    assert len([t for t in packed if t.data_ptr() == x.data_ptr()]) == 1
