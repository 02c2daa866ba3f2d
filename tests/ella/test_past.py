"""Folding: the model's output stays, the same parameters train on, and the past is exact until its cap."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

import ella_kernels as ek
from ella import EllaConfig, EllaRegularizer
from ella.acting import TASK
from ella.past import fold_factors
from tests.ella.models import EXPERTS, TARGETS, add_deltas, deltas, ids, randomise, tiny
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
        assert relative_error(model(x).detach(), before) < 1e-6


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
    for task in ("one", "two"):
        reg.end_task(task)
        after = {n.replace(f".{TASK}", ".default"): p for n, p in model.named_parameters() if p.requires_grad}
        assert trained.keys() == after.keys() and all(after[n] is p and p.grad is None for n, p in trained.items())
        for parts in deltas(reg).values():
            assert not any(part.any() for part in parts)
        a, _ = reg.layers[1].parameters()
        assert a.any(), "lora_A is random again, not zero"
        randomise(model, 1)
    assert reg.adapter == TASK and model.active_adapter == TASK


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal", False])
def test_every_init_starts_afresh(init):
    model = tiny(targets=["up"], init_lora_weights=init)
    reg = EllaRegularizer(model)
    parameters = reg.layers[0].parameters()
    before = model(ids()).detach()
    reg.end_task("one")
    assert all(map(lambda a, b: a is b, reg.layers[0].parameters(), parameters))
    assert relative_error(model(ids()).detach(), before) < 1e-6
    assert deltas(reg)["up"][0].norm() < 1e-6 and reg.layers[0].parameters()[0].any()


def test_requires_grad_and_random_state_are_left_alone():
    model = tiny()
    model.base_model.model.up.base_layer.bias.requires_grad_(True)
    reg = EllaRegularizer(model)
    reg.layers[2].parameters()[0].requires_grad_(False)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    reg._finished.install({layer.name: reg._finished._folded(layer) for layer in reg.layers})
    assert torch.equal(torch.get_rng_state(), state)
    after = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: after[n.replace(".default", f".{TASK}")] for n in flags} == flags
    assert not any(flag for n, flag in after.items() if ".default" in n)


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
    with pytest.raises(ValueError, match=r"adapters \['ella_task'\] are merged in up; unmerge first"):
        reg.end_task("bad")


@pytest.mark.parametrize("write", ["reset", "restore", "from_pretrained"])
def test_factors_of_a_merged_adapter_are_not_written(tmp_path, write):
    """PEFT unmerges by the factors as they are then."""
    _, reg = folded(targets=["up"])
    reg.save_pretrained(tmp_path)
    model = tiny(targets=["up"])
    fresh = EllaRegularizer(model)
    randomise(model, 1)
    before = model.base_model.model.up.base_layer.weight.clone()
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters \['default'\] are merged in up; unmerge first"):
        if write == "reset":
            fresh.reset_adapter()
        elif write == "restore":
            fresh.restore(tmp_path)
        else:
            EllaRegularizer.from_pretrained(model, tmp_path)
    model.unmerge_adapter()
    assert relative_error(model.base_model.model.up.base_layer.weight, before) < 1e-6
    assert fresh.tasks == [] and list(model.peft_config) == ["default"]


def test_tasks_end_in_inference_mode_too(tmp_path):
    model = tiny(targets=["up", "down"])
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
    randomise(model, 1)
    with torch.inference_mode():
        reg.end_task("one")
        reg.save_pretrained(tmp_path)
    randomise(model, 2)
    again = tiny(targets=["up", "down"])
    with torch.inference_mode():
        restored = EllaRegularizer.from_pretrained(again, tmp_path)
    randomise(again, 2)
    assert restored.values() == reg.values() and min(reg.values().values()) > 0
    restored.penalty().backward()
    assert all(p.grad is not None for layer in restored.layers for p in layer.parameters())


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


def test_all_targets_are_covered():
    assert {layer.name.split(".")[0] for layer in EllaRegularizer(tiny()).layers} == set(TARGETS)


def test_a_copy_of_the_knowledge_adds_nothing_to_a_base_that_holds_it(tmp_path):
    """TRL's reference is such a copy. What is saved is the past all the same, for the base without it."""
    targets = ["tokens", "up", "down", "point"]
    model, _ = folded(config=EllaConfig(keep_past="merge"), targets=targets, rank_pattern={"up": 2})
    model.set_adapter("default")
    want = model(ids()).detach()
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name or name.endswith(".default"):
            model.get_parameter(name.replace(".default", ".ref")).data.copy_(parameter.data)
    model.set_adapter("ref")
    assert relative_error(model(ids()).detach(), want) < 1e-6
    model.save_pretrained(tmp_path)
    plain = tiny(targets=["up"]).unload()
    assert relative_error(plain(ids()).detach(), want) > 1e-2
    for folder in (tmp_path, tmp_path / "ref"):
        loaded = PeftModel.from_pretrained(tiny(targets=["up"]).unload(), folder).eval()
        assert relative_error(loaded(ids()).detach(), want) < 1e-6
