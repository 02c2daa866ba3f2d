"""The penalty of a whole model: value, gradient, conventions, and what is on disk."""

from __future__ import annotations

import json
import math
import signal
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import ella_kernels as ek
from ella import EllaConfig, EllaRegularizer
from ella.checkpoint import PAST_FILE, load_past
from ella.config import AUTO_LAMBDA, MAX_LAMBDA
from tests.ella.models import EXPERTS, add_deltas, deltas, ids, randomise, tiny
from tests.kernels.cases import relative_error
from tests.processes import killed, started, tail


def model_with_past(config=None, tasks=2, size=1.0, **options):
    model = tiny(**options)
    reg = EllaRegularizer(model, config)
    total = {}
    for task in range(tasks):
        randomise(model, 10 + task, size=size)
        total = add_deltas(total, deltas(reg))
        reg.end_task(f"task {task}")
    randomise(model, 99, size=size)
    return model, reg, total


def penalty_by_hand(reg, total, scale=lambda layer, parts: 1.0):
    """``P`` per layer by dense matrices in float64."""
    new = deltas(reg)
    return {
        layer.name: scale(layer, total[layer.name])
        * sum((d * w).square().sum() for d, w in zip(new[layer.name], total[layer.name], strict=True)).item()
        for layer in reg.layers
        if layer.tied_to is None
    }


def mean_square(parts):
    return sum(w.square().sum() for w in parts).item() / sum(w.numel() for w in parts)


@pytest.mark.parametrize("penalty_rank", [None, 2])
def test_auto_is_a_strength_relative_to_the_past(penalty_rank):
    """AUTO_LAMBDA · N/E², E = ‖W_past‖_F² with what truncation left out."""
    _, reg, total = model_with_past(EllaConfig(penalty_rank=penalty_rank, past_rank=6), **EXPERTS)
    weights = [w for layer in reg.layers if layer.tied_to is None for w in total[layer.name]]
    energy, size = sum(w.square().sum() for w in weights).item(), sum(w.numel() for w in weights)
    # Energies that were dropped at different times add up without their cross terms.
    assert reg.strength() == pytest.approx(AUTO_LAMBDA * size / energy**2, rel=0.05)
    value = sum(reg.values().values())
    assert reg.penalty().item() == pytest.approx(reg.strength() * value, rel=1e-5)
    assert reg.add_gradient_().item() == pytest.approx(reg.strength() * value, rel=1e-5)
    assert EllaConfig.from_dict(reg.config.to_dict()) == reg.config


def test_auto_is_as_strong_by_chance_with_the_spectral_penalty():
    """A random update as large as the past adds AUTO_LAMBDA: with ``P = s²‖LᵀΔW Rᵀ‖²`` on average (ΣS)² a layer."""
    _, reg, total = model_with_past(EllaConfig(penalty="spectral"), **EXPERTS)
    weights = [w for layer in reg.layers if layer.tied_to is None for w in total[layer.name]]
    energy, size = sum(w.square().sum() for w in weights).item(), sum(w.numel() for w in weights)
    by_chance = sum(torch.linalg.svdvals(w).sum().square() for w in weights).item()
    assert by_chance > 2 * energy  # not one component
    assert reg.strength() == pytest.approx(AUTO_LAMBDA * size / (energy * by_chance), rel=1e-4)
    generator = torch.Generator().manual_seed(0)
    w = weights[0].double()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    left, right = u * s.sqrt(), s.sqrt().unsqueeze(-1) * vh
    draws = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for _ in range(400)]
    mean = sum((left.mT @ draw @ right.mT).square().sum() for draw in draws).item() / len(draws)
    assert mean == pytest.approx(s.sum().square().item(), rel=0.1)


@pytest.mark.parametrize("penalty", ["hadamard", "spectral"])
@pytest.mark.parametrize("size", [1e-6, 1e-22])
def test_auto_after_a_task_that_learned_next_to_nothing(size, penalty):
    _, reg, _ = model_with_past(EllaConfig(penalty=penalty), tasks=1, size=size, targets=["up"])
    for layer in reg.layers:
        layer.parameters()[1].data.zero_()
    assert 0 < reg.strength() <= MAX_LAMBDA
    assert reg.penalty().item() == 0.0 and reg.add_gradient_().item() == 0.0


CHANGES = [
    {"ella_lambda": 3.0}, {"ella_lambda": "auto"}, {"penalty": "spectral"}, {"penalty_rank": 2},
    {"penalty_rank": 2, "penalty_energies": False}, {"reduction": "mean"}, {"include_scaling": False},
    {"normalize": "rms"},
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_another_config_may_be_assigned(tmp_path, change):
    """As a new regularizer of the same model; another λ in every task is one use of it."""
    model, reg, _ = model_with_past(EllaConfig(ella_lambda=1.0), **EXPERTS)
    before = reg.penalty().item()
    reg.config = replace(reg.config, **change)
    fresh = EllaRegularizer(model, reg.config)
    found = reg.penalty().item()
    assert found != before and found == fresh.penalty().item() and reg.values() == fresh.values()
    assert reg.add_gradient_().item() == pytest.approx(found, rel=1e-5)
    model.save_pretrained(tmp_path)
    assert EllaConfig.from_dict(load_past(tmp_path).config) == reg.config == fresh.config


def test_older_factors_over_finished_tasks_are_put_right_by_restore(tmp_path):
    """Nothing tells factors that PEFT loads over the knowledge from its own, but the saved state has them all."""
    model, reg, _ = model_with_past(EllaConfig(ella_lambda=1.0, past_rank=3), targets=["up"])
    model.save_pretrained(tmp_path / "older")
    reg.end_task("last")
    randomise(model, 5)
    reg.save_pretrained(tmp_path / "now")
    value = reg.penalty().item()
    model.load_adapter(tmp_path / "older", "default")
    assert reg.tasks == ["task 0", "task 1", "last"] and reg.penalty().item() != pytest.approx(value, rel=1e-3)
    reg.restore(tmp_path / "now")
    assert reg.penalty().item() == value


def test_an_assigned_config_caps_the_next_fold():
    _, reg, _ = model_with_past(EllaConfig(), targets=["up"])
    reg.config = replace(reg.config, past_rank=3)
    assert reg.end_task("next").ranks == {"up": 3}


def test_a_config_that_is_another_model_is_not_assigned():
    _, reg, _ = model_with_past(EllaConfig(), targets=["up"])
    with pytest.raises(ValueError, match="keep_past is 'adapter' and cannot become 'merge'"):
        reg.config = EllaConfig(keep_past="merge")
    with pytest.raises(TypeError, match="config must be an EllaConfig, found dict"):
        reg.config = {"ella_lambda": 1.0}
    assert reg.config == EllaConfig()


def test_the_penalty_of_frozen_factors():
    """A watched factor that is frozen for a while: the value stands, and no hook is asked of it."""
    model, reg, _ = model_with_past(EllaConfig(ella_lambda=1.0))
    value = reg.penalty().item()
    with model.disable_adapter():
        assert reg.penalty().item() == value
    for layer in reg.layers:
        layer.parameters()[1].requires_grad_(False)
    reg.penalty().backward()
    for layer in reg.layers:
        a, b = layer.parameters()
        assert b.grad is None and a.grad.abs().max() > 0


def test_one_adapter_of_a_model_has_finished_tasks():
    model = tiny(targets=["up"])
    model.add_adapter("other", LoraConfig(r=2, target_modules=["up"]))
    model.set_adapter("other")
    other = EllaRegularizer(model, EllaConfig(adapter_name="other"))
    model.set_adapter("default")
    reg = EllaRegularizer(model)
    reg.end_task("one")
    with pytest.raises(ValueError, match=r"'ella_task' is that of 'default'.*found 'other'"):
        other.penalty()


def test_the_folder_of_an_adapter_is_found(tmp_path):
    """PEFT saves adapters in folders of their names, but for "default"."""
    config = LoraConfig(r=2, target_modules=["up"])
    base = tiny(targets=["up"]).unload()
    model = get_peft_model(base, config, adapter_name="mine")
    reg = EllaRegularizer(model, EllaConfig(adapter_name="mine"))
    randomise(model, 1)
    reg.end_task("one")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "mine" / PAST_FILE).is_file() and not (tmp_path / PAST_FILE).exists()
    fresh = get_peft_model(tiny(targets=["up"]).unload(), config, adapter_name="mine")
    assert EllaRegularizer.from_pretrained(fresh, tmp_path).tasks == ["one"]


def test_auto_before_the_first_task():
    reg = EllaRegularizer(tiny(targets=["up"]))
    assert reg.config.ella_lambda == "auto" and reg.strength() == 0.0
    assert reg.penalty().item() == 0.0 and reg.add_gradient_().item() == 0.0


@pytest.mark.parametrize(
    "options, found",
    [
        ({"normalize": "rms"}, "normalize='rms'"),
        ({"reduction": "mean"}, "reduction='mean'"),
        ({"include_scaling": False}, "include_scaling=False"),
    ],
)
def test_auto_has_its_own_conventions(options, found):
    with pytest.raises(ValueError, match=f"ella_lambda='auto' is a strength for normalize=None, .*{found}"):
        EllaConfig(**options)


@pytest.mark.parametrize("factor", [0.1, 30.0])
def test_auto_does_not_depend_on_the_size_of_updates(factor):
    """Past and new update larger by one factor: the same penalty. With a number it grows with the fourth power."""
    grown = {}
    for strength in ("auto", 1.0):
        values = [
            model_with_past(EllaConfig(ella_lambda=strength), size=size)[1].penalty().item() for size in (1.0, factor)
        ]
        grown[strength] = values[1] / values[0]
    assert grown["auto"] == pytest.approx(1, rel=1e-4)
    assert grown[1.0] == pytest.approx(factor**4, rel=1e-4)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("normalize", [None, "rms"])
@pytest.mark.parametrize("include_scaling", [True, False])
def test_conventions(reduction, normalize, include_scaling):
    config = EllaConfig(
        ella_lambda=7.0, reduction=reduction, normalize=normalize, include_scaling=include_scaling
    )  # fmt: skip
    _, reg, total = model_with_past(config, **EXPERTS)

    def scale(layer, parts):
        factor = 1.0 if include_scaling else layer.scaling() ** -2
        return factor / mean_square(parts) if normalize else factor

    want = penalty_by_hand(reg, total, scale)
    assert reg.values() == pytest.approx(want, rel=1e-5)
    summed = 7.0 * sum(want.values()) / (len(want) if reduction == "mean" else 1)
    assert reg.penalty().item() == pytest.approx(summed, rel=1e-5)


@pytest.mark.parametrize("name", ["hadamard", "spectral"])
@pytest.mark.parametrize("options", [{}, EXPERTS], ids=["all", "experts"])
def test_both_forms_give_the_gradient_of_autograd_on_dense_matrices(options, name):
    config = EllaConfig(ella_lambda=3.0, penalty=name, normalize="rms")
    model, reg, total = model_with_past(config, **options)
    loss = sum(
        3.0
        / mean_square(total[layer.name])
        * getattr(ek.reference, f"{name}_penalty")(a.double(), b.double(), w, layer.scaling())
        for layer in reg.layers
        for (a, b), w in zip(layer.factors(*layer.parameters()), total[layer.name], strict=True)
    )
    parameters = [p for p in model.parameters() if p.requires_grad]
    want = torch.autograd.grad(loss, parameters)
    found = torch.autograd.grad(reg.penalty(), parameters)
    for p in parameters:
        p.grad = torch.full_like(p, 0.25)
    value = reg.add_gradient_(2.0)
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    # A spectral past is W's even SVD; the reference makes its own, the same up to rounding.
    bound = 1e-5 if name == "hadamard" else 1e-4
    for p, exact, by_autograd in zip(parameters, want, found, strict=True):
        assert relative_error(by_autograd, exact) < bound
        assert relative_error(p.grad.double() - 0.25, 2 * exact.double()) < 10 * bound


def test_nothing_is_penalised_before_the_first_fold():
    model = tiny()
    reg = EllaRegularizer(model)
    assert reg.penalty().item() == 0.0 and set(reg.values().values()) == {0.0}
    reg.add_gradient_()
    assert not any(p.grad.any() for p in model.parameters() if p.requires_grad)


def test_frozen_factors_get_no_gradient():
    _, reg, _ = model_with_past(targets=["up"])
    a, b = reg.layers[0].parameters()
    a.requires_grad_(False)
    reg.add_gradient_()
    assert a.grad is None and b.grad.any()


def test_a_scaler_on_the_device_scales_the_gradient():
    _, reg, _ = model_with_past(targets=["up"])
    _, b = reg.layers[0].parameters()
    reg.add_gradient_(torch.tensor(8.0))
    scaled, b.grad = b.grad, None
    reg.add_gradient_()
    assert torch.allclose(scaled, 8 * b.grad, rtol=1e-6, atol=0)


def test_penalty_rank_uses_fewer_components_and_the_energies_of_the_rest():
    _, reg, total = model_with_past(EllaConfig(penalty_rank=3), tasks=3, targets=["up"])
    (stored,) = reg.state().layers["up"].parts
    assert stored.right.shape[0] > 3
    past = ek.truncate(stored.left, stored.right, 3)
    (delta,) = deltas(reg)["up"]
    want = (delta.square() * ek.reference.past_squared(ek.LowRank(*(t.double() for t in past)))).sum().item()
    assert reg.values()["up"] == pytest.approx(want, rel=1e-5)
    assert reg.values()["up"] == pytest.approx(penalty_by_hand(reg, total)["up"], rel=0.3)


@pytest.mark.parametrize("options", [{"penalty_rank": 3}, {"past_rank": 3}])
def test_without_energies_what_was_dropped_has_no_part(options):
    config = EllaConfig(ella_lambda=1.0, penalty_energies=False, **options)
    _, reg, total = model_with_past(config, tasks=3, targets=["up"])
    (stored,) = reg.state().layers["up"].parts
    (delta,) = deltas(reg)["up"]
    kept = ek.truncate(stored.left, stored.right, 3)
    want = (delta * (kept.left.double() @ kept.right.double())).square().sum().item()
    assert reg.values()["up"] == pytest.approx(want, rel=1e-5)
    assert want < 0.97 * penalty_by_hand(reg, total)["up"]


def test_a_moved_past_is_seen():
    """The operands are kept between steps; writing into the past must not leave the penalty on the old one."""
    _, reg, _ = model_with_past(targets=["up"])
    before = reg.values()["up"]
    a, _ = reg.layers[0].parameters("default")
    with torch.no_grad():
        a.mul_(2)
    assert reg.values()["up"] == pytest.approx(4 * before, rel=1e-6)
    a.data = a.data.clone() / 2
    assert reg.values()["up"] == pytest.approx(before, rel=1e-6)


def test_a_non_finite_factor_reaches_the_penalty():
    _, reg, _ = model_with_past()
    reg.layers[0].parameters()[0].data[0, 0] = math.nan
    assert math.isnan(reg.penalty().item())


def test_the_penalty_keeps_training_away_from_the_past():
    """Gradient descent on the penalty alone lowers the overlap and nothing else is touched."""
    model, reg, _ = model_with_past(EllaConfig(ella_lambda=1.0))
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    before = sum(reg.values().values())
    for _ in range(20):
        optimizer.zero_grad()
        reg.add_gradient_()
        optimizer.step()
    assert sum(reg.values().values()) < before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@pytest.mark.parametrize(
    "field, value, error",
    [
        ("ella_lambda", -1.0, ValueError),
        ("ella_lambda", math.nan, ValueError),
        ("ella_lambda", "1", TypeError),
        ("penalty", "frobenius", ValueError),
        ("past_rank", 0, ValueError),
        ("past_rank", 8.0, TypeError),
        ("penalty_rank", -1, ValueError),
        ("reduction", "max", ValueError),
        ("normalize", "max", ValueError),
        ("keep_past", "both", ValueError),
        ("include_scaling", 1, TypeError),
        ("adapter_name", "", ValueError),
        ("adapter_name", "ella_past", ValueError),
        ("adapter_name", "ella_task", ValueError),
    ],
)
def test_bad_settings_are_named(field, value, error):
    with pytest.raises(error, match=field):
        EllaConfig(**{field: value})


def test_config_is_plain_json():
    config = EllaConfig(ella_lambda=3e4, normalize="rms", penalty_rank=16)
    assert EllaConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"unknown EllaConfig fields \['lambda'\]"):
        EllaConfig.from_dict({"lambda": 1.0})


# --- on disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, EXPERTS, {"targets": ["up", "point"], "lora_bias": True}], ids=str)
def test_round_trip_is_bit_exact(tmp_path, options):
    config = EllaConfig(ella_lambda=5.0, past_rank=6, normalize="rms")
    model, reg, _ = model_with_past(config, tasks=3, **options)
    reg.save_pretrained(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [PAST_FILE]
    fresh = tiny(**options)
    randomise(fresh, 99)
    again = EllaRegularizer.from_pretrained(fresh, tmp_path)
    assert again.config == config and again.tasks == reg.tasks == ["task 0", "task 1", "task 2"]
    assert again.values() == reg.values()
    assert torch.equal(fresh(ids()), model(ids()))
    again.save_pretrained(tmp_path / "again")
    one, two = load_file(tmp_path / PAST_FILE), load_file(tmp_path / "again" / PAST_FILE)
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert load_past(tmp_path).layers["up"].relative_error == load_past(tmp_path / "again").layers["up"].relative_error
    # And the next fold goes on identically.
    assert again.end_task("next") == reg.end_task("next")
    assert again.state().layers["up"].parts[0].left.equal(reg.state().layers["up"].parts[0].left)


def test_a_state_without_a_past_round_trips(tmp_path):
    EllaRegularizer(tiny(targets=["up"]), EllaConfig(ella_lambda=2.0)).save_pretrained(tmp_path)
    again = EllaRegularizer.from_pretrained(tiny(targets=["up"]), tmp_path)
    assert again.tasks == [] and again.config.ella_lambda == 2.0 and again.penalty() == 0


def test_other_layers_are_refused_and_listed(tmp_path):
    _, reg, _ = model_with_past(targets=["up", "point"])
    reg.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"up is saved but not in the model; line is in the model but not saved"):
        EllaRegularizer.from_pretrained(tiny(targets=["line", "point"]), tmp_path)
    wider = tiny(targets=["up", "point"])
    model = wider.base_model.model
    model.up = type(model.point)(torch.nn.Conv2d(1, 9, 1), "default", wider.peft_config["default"], r=4, lora_alpha=8)
    with pytest.raises(ValueError, match=r"up has \(parts, out, in\) \(1, 9, 1\), saved \(1, 16, 12\)"):
        EllaRegularizer.from_pretrained(wider, tmp_path)


def test_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no saved past at"):
        EllaRegularizer.from_pretrained(tiny(targets=["up"]), tmp_path)
    _, reg, _ = model_with_past(targets=["up"])
    reg.save_pretrained(tmp_path)
    whole = (tmp_path / PAST_FILE).read_bytes()
    for cut in (0, 7, 100, len(whole) - 1):
        (tmp_path / PAST_FILE).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="is not a whole safetensors file"):
            EllaRegularizer.from_pretrained(tiny(targets=["up"]), tmp_path)


def test_a_failed_save_leaves_the_old_state(tmp_path, monkeypatch):
    _, reg, _ = model_with_past(targets=["up"])
    reg.save_pretrained(tmp_path)
    old = (tmp_path / PAST_FILE).read_bytes()
    reg.end_task("another")

    def fail(*_, **__):
        raise OSError("no space left")

    for target in ("ella.checkpoint.save_file", "os.fsync", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(target, fail)
            with pytest.raises(OSError, match="no space left"):
                reg.save_pretrained(tmp_path)
        assert (tmp_path / PAST_FILE).read_bytes() == old and len(list(tmp_path.iterdir())) == 1


def end_tasks(folder, ready):
    model = tiny()
    reg = EllaRegularizer(model)
    ready.touch()
    for task in range(10**6):
        randomise(model, task)
        reg.end_task(str(task))
        reg.save_pretrained(folder)


def test_a_kill_at_any_moment_leaves_a_whole_state(tmp_path):
    folder = tmp_path / "state"
    for attempt in range(4):
        ready = tmp_path / f"ready {attempt}"
        process = started(tmp_path / "log", end_tasks, folder, ready)
        while not (ready.exists() and (folder / PAST_FILE).exists()):
            assert process.exitcode is None, tail(tmp_path / "log")
            time.sleep(0.01)
        time.sleep(0.05 + 0.037 * attempt)
        assert killed(process) == -signal.SIGKILL
        reg = EllaRegularizer.from_pretrained(tiny(), folder)
        assert len(reg.tasks) >= 1 and reg.tasks == [str(i) for i in range(len(reg.tasks))]
