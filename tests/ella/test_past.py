"""Folding: the model's output stays, the past is exact until its cap, and PEFT and Trainer see one adapter."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel

import ella_kernels as ek
from ella import EllaConfig, EllaRegularizer
from ella.past import PAST, fold_factors
from tests.ella.models import EXPERTS, TARGETS, Tiny, add_deltas, deltas, ids, randomise, tiny
from tests.kernels.cases import relative_error

KINDS = {"all": {}, "experts": EXPERTS, "lora_bias": {"targets": ["up", "point"], "lora_bias": True}}


def folded(tasks=2, config=None, **options):
    model = tiny(**options)
    reg = EllaRegularizer(model, config)
    for task in range(tasks):
        randomise(model, 10 + task)
        reg.end_task(f"task {task}")
    randomise(model, 99)
    return model, reg


@pytest.mark.parametrize("kind", KINDS)
def test_output_before_and_after_a_fold_is_equal(kind):
    model = tiny(**KINDS[kind])
    reg = EllaRegularizer(model)
    x = ids()
    for task in range(3):
        randomise(model, task)
        before = model(x).detach()
        report = reg.end_task(f"task {task}")
        assert relative_error(model(x).detach(), before) < 1e-6
        assert report.max_relative_error == 0.0 and report.task == reg.tasks[-1] == f"task {task}"
    with model.disable_adapter():
        untouched = model(x).detach()
    if kind == "lora_bias":
        # Every layer takes the hook: disabling the current adapter leaves the model of the tasks before it.
        assert relative_error(model(x).detach(), untouched) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_past_is_the_sum_of_updates(kind):
    model = tiny(**KINDS[kind])
    reg = EllaRegularizer(model)
    total = {}
    for task in range(3):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        reg.end_task(f"task {task}")
    randomise(model, 9)
    new, values = deltas(reg), reg.values()
    for layer in reg.layers:
        stored = reg.state().layers[layer.name]
        for part, want in zip(stored.parts, total[layer.name], strict=True):
            assert relative_error(part.left.double() @ part.right.double(), want) < 1e-6
        want = sum((d * w).square().sum() for d, w in zip(new[layer.name], total[layer.name], strict=True))
        assert abs(values[layer.name] / want - 1) < 1e-5


def test_the_fresh_adapter_has_no_effect_and_trains_the_same_parameters():
    model = tiny()
    reg = EllaRegularizer(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reg.penalty().backward()
    reg.end_task("one")
    after = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert trained.keys() == after.keys() and all(after[n] is p and p.grad is None for n, p in trained.items())
    for parts in deltas(reg).values():
        assert not any(part.any() for part in parts)
    a, _ = reg.layers[1].parameters()
    assert a.any(), "lora_A is random again, not zero"


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_every_init_starts_afresh(init):
    model = tiny(targets=["up"], init_lora_weights=init)
    reg = EllaRegularizer(model)
    parameters = reg.layers[0].parameters()
    before = model(ids()).detach()
    reg.end_task("one")
    assert reg.layers[0].parameters() == parameters
    assert relative_error(model(ids()).detach(), before) < 1e-6
    assert deltas(reg)["up"][0].norm() < 1e-6 and reg.layers[0].parameters()[0].any()


def test_requires_grad_and_random_state_are_left_alone():
    model = tiny()
    model.base_model.model.up.base_layer.bias.requires_grad_(True)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    reg = EllaRegularizer(model)
    state = torch.get_rng_state()
    reg._adopt({layer.name: reg._fold(layer) for layer in reg.layers})
    assert torch.equal(torch.get_rng_state(), state)
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n] for n in flags} == flags
    assert not any(flag for n, flag in after.items() if f".{PAST}" in n)
    model.set_adapter("default")
    assert not any(p.requires_grad for n, p in model.named_parameters() if f".{PAST}" in n)


@pytest.mark.parametrize("kind", ["hook", "active"])
def test_the_past_stays_after_peft_switches_adapters(kind):
    model, reg = folded(**({"targets": ["up", "point"]} if kind == "hook" else EXPERTS))
    want = model(ids()).detach()
    model.set_adapter("default")
    with model.disable_adapter():
        pass
    reg.values()  # a step puts back what a switch took away in layers without a hook
    assert relative_error(model(ids()).detach(), want) < 1e-6
    assert model.active_adapter == "default"


def test_disabling_the_adapter_gives_the_model_before_the_task():
    model, reg = folded(tasks=2, targets=["up", "point", "tokens"])
    with model.disable_adapter():
        reference = model(ids()).detach()
    for layer in reg.layers:
        layer.reset(True)
    assert relative_error(model(ids()).detach(), reference) < 1e-6


def test_merging_both_adapters_does_not_count_the_past_twice():
    model, _ = folded(targets=["up", "point", "tokens", "line"])
    want = model(ids()).detach()
    model.merge_adapter(["default", PAST])
    assert relative_error(model(ids()).detach(), want) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model(ids()).detach(), want) < 1e-5
    model.base_model.set_adapter(["default", PAST])
    assert relative_error(model(ids()).detach(), want) < 1e-5
    model.base_model.set_adapter("default")
    plain = model.merge_and_unload(adapter_names=["default", PAST])
    assert relative_error(plain(ids()).detach(), want) < 1e-5


def test_two_regularizers_add_the_past_once():
    model, reg = folded(targets=["up", "point"])
    want = model(ids()).detach()
    EllaRegularizer(model, reg.config)
    assert torch.equal(model(ids()).detach(), want)


def test_a_copied_model_keeps_its_own_past():
    model, _ = folded(targets=["up", "point", "tokens"])
    want = model(ids()).detach()
    twin = copy.deepcopy(model)
    randomise(model, 5, PAST)
    assert torch.equal(twin(ids()).detach(), want) and not torch.equal(model(ids()).detach(), want)


def test_the_truncated_past_reports_its_error_and_keeps_the_energies():
    config = EllaConfig(past_rank=6)
    model = tiny(targets=["up"])
    reg = EllaRegularizer(model, config)
    total, errors = {}, []
    for task in range(3):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        errors.append(reg.end_task(f"task {task}").relative_error["up"])
    assert errors[0] == 0.0 and all(0 < error < 1 for error in errors[1:])
    (past,) = reg.state().layers["up"].parts
    w = total["up"][0]
    assert past.right.shape[0] == 6 and reg.state().layers["up"].relative_error == errors
    # One truncation is the best approximation; its error is the one reported.
    first = ek.truncate(past.left, past.right, 6)
    assert relative_error(first.left @ first.right, past.left @ past.right) < 1e-5
    dropped = (w - past.left.double() @ past.right.double()).square()
    assert abs(past.row_energy.sum() / dropped.sum() - 1) < 0.5
    randomise(model, 7)
    (delta,) = deltas(reg)["up"]
    want = (delta.square() * ek.reference.past_squared(ek.LowRank(*(t.double() for t in past)))).sum()
    assert abs(reg.values()["up"] / want - 1) < 1e-5


def test_one_fold_beyond_the_cap_is_the_best_approximation():
    gen = torch.Generator().manual_seed(0)
    a, b = torch.randn(6, 30, generator=gen), torch.randn(20, 6, generator=gen)
    past, error = fold_factors(None, a, b, 2.0, 4)
    w = 2.0 * b.double() @ a.double()
    s = torch.linalg.svdvals(w)
    assert error == pytest.approx((s[4:].square().sum() / s.square().sum()).sqrt().item(), rel=1e-9)
    assert relative_error(past.left.square().sum(0), s[:4]) < 1e-6
    assert relative_error(past.row_energy, (w - past.left.double() @ past.right.double()).square().sum(1)) < 1e-5


def test_a_factor_that_is_not_finite_changes_nothing():
    model, reg = folded()
    reg.layers[2].parameters()[1].data.view(-1)[3] = float("nan")
    before = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"lora_B of down is not finite; 'bad' is not folded"):
        reg.end_task("bad")
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and len(reg.tasks) == 2
    assert all(torch.equal(after[n].nan_to_num(7.0), p.nan_to_num(7.0)) for n, p in before.items())


def test_merged_adapters_are_not_folded():
    model, reg = folded(targets=["up"])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged in up; unmerge first"):
        reg.end_task("bad")


def test_half_precision_models_keep_an_fp32_past():
    model = tiny(targets=["up", "down", "point"], dtype=torch.bfloat16)
    for layer in EllaRegularizer(model).layers:
        for p in layer.parameters():
            p.data = p.data.bfloat16()
    reg = EllaRegularizer(model)
    before = model(ids()).detach()
    total = deltas(reg)
    reg.end_task("one")
    (past,) = reg.state().layers["up"].parts
    assert past.left.dtype == torch.float32
    assert relative_error(past.left @ past.right, total["up"][0]) < 4e-3  # ΔW itself was rounded to bf16 by PEFT
    assert relative_error(model(ids()).detach(), before) < 2e-2


def test_peft_saves_and_loads_the_past(tmp_path):
    model, reg = folded(tasks=3, r=3)
    want = model(ids()).detach()
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Tiny(), tmp_path, is_trainable=True).eval()
    loaded.load_adapter(tmp_path / PAST, PAST)
    again = EllaRegularizer(loaded)
    assert relative_error(loaded(ids()).detach(), want) < 1e-6
    assert again.values() == pytest.approx(reg.values(), rel=1e-6)


def test_a_past_that_leaves_layers_out_is_refused(tmp_path):
    model, _ = folded(targets=["up"])
    model.save_pretrained(tmp_path)
    other = tiny(targets=["up", "point"])
    other.load_adapter(tmp_path / PAST, PAST)
    with pytest.raises(ValueError, match=r"'ella_past' leaves out 1 of the layers of adapter 'default': \['point'\]"):
        EllaRegularizer(other)


@pytest.mark.parametrize("bias", [False, True])
def test_merging_into_fp32_bases_keeps_the_output(bias):
    options = {"targets": ["up", "down", "tokens", "image", "point"]} if not bias else KINDS["lora_bias"]
    model = tiny(**options)
    reg = EllaRegularizer(model, EllaConfig(keep_past="merge"))
    total = {}
    for task in range(2):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        before = model(ids()).detach()
        reg.end_task(f"task {task}")
        assert relative_error(model(ids()).detach(), before) < 1e-6
    randomise(model, 5)
    new = deltas(reg)
    for name, value in reg.values().items():
        assert abs(value / (new[name][0] * total[name][0]).square().sum() - 1) < 1e-5


def test_merging_is_refused_elsewhere_with_the_reason():
    merge = EllaConfig(keep_past="merge")
    with pytest.raises(
        ValueError, match=r"needs float32 base weights: rounding loses most.*up is a Parameter of torch.b"
    ):
        EllaRegularizer(tiny(targets=["up"], dtype=torch.bfloat16), merge)
    with pytest.raises(ValueError, match="does not support attention layers, found attention; use keep_past='adapter'"):
        EllaRegularizer(tiny(targets=["attention"]), merge)
    with pytest.raises(ValueError, match=r"does not support experts layers, found experts\.up"):
        EllaRegularizer(tiny(targets=["up"], target_parameters=["experts.up"]), merge)


def test_all_targets_are_covered():
    assert {layer.name.split(".")[0] for layer in EllaRegularizer(tiny()).layers} == set(TARGETS)
