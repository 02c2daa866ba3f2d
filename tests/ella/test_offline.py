"""Folding saved adapter folders without their model, and what ``ella inspect`` says of the result."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from ella import EllaConfig, EllaRegularizer, fold_adapters
from ella.inspection import describe_state
from tests.ella.models import Tiny, ids, randomise, tiny
from tests.kernels.cases import relative_error

LAYERS = {"targets": ["tokens", "up", "down", "attention", "image", "point", "line"]}
OPTIONS = {
    "plain": LAYERS,
    "rslora": LAYERS | {"use_rslora": True},
    "patterns": LAYERS | {"rank_pattern": {"up": 2}, "alpha_pattern": {"up": 5, "point": 3}},
    "lora_bias": {"targets": ["up", "point"], "lora_bias": True},
}


def saved(tmp_path, n=3, **options):
    folders = []
    for task in range(n):
        model = tiny(**options)
        randomise(model, task)
        model.save_pretrained(tmp_path / f"task-{task}")
        folders.append(tmp_path / f"task-{task}")
    return folders


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_offline_equals_online(tmp_path, options):
    reports = fold_adapters(saved(tmp_path, **options), tmp_path / "out", past_rank=10)
    model = tiny(**options)
    reg = EllaRegularizer(model, EllaConfig(past_rank=10))
    for task in range(3):
        randomise(model, task)
        reg.end_task(f"task-{task}")
    randomise(model, 9)
    fresh = tiny(**options)
    randomise(fresh, 9)
    loaded = EllaRegularizer.from_pretrained(fresh, tmp_path / "out")
    assert loaded.tasks == ["task-0", "task-1", "task-2"] == [report.task for report in reports]
    assert loaded.values() == pytest.approx(reg.values(), rel=1e-5)
    assert relative_error(fresh(ids()).detach(), model(ids()).detach()) < 1e-6


def test_the_result_is_a_peft_adapter(tmp_path):
    options = {"targets": ["up", "point", "tokens"]}
    fold_adapters(saved(tmp_path, **options), tmp_path / "out")
    want = tiny(**options)
    EllaRegularizer.from_pretrained(want, tmp_path / "out")
    with want.disable_adapter():
        want = want(ids()).detach()
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Tiny(), tmp_path / "out").eval()
    assert relative_error(plain(ids()).detach(), want) < 1e-6


def test_what_cannot_be_folded_is_named(tmp_path):
    one, two = saved(tmp_path, 2, targets=["up"])
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        fold_adapters([tmp_path / "missing"], tmp_path / "out")
    with pytest.raises(ValueError, match="at least one adapter folder"):
        fold_adapters([], tmp_path / "out")
    other = tiny(targets=["down"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"adapts other layers than .*task-0: \['down', 'up'\]"):
        fold_adapters([one, tmp_path / "other"], tmp_path / "out")
    tiny(targets=["up"], use_dora=True).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="cannot be folded offline: it uses use_dora"):
        fold_adapters([tmp_path / "dora"], tmp_path / "out")
    (two / "adapter_model.safetensors").rename(two / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        fold_adapters([one, two], tmp_path / "out")
    (two / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        fold_adapters([one, two], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        fold_adapters([one], one)


def test_a_failed_fold_leaves_nothing(tmp_path, monkeypatch):
    folders = saved(tmp_path, 2, targets=["up"])
    before = sorted(tmp_path.iterdir())

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr("ella.offline._write_peft", fail)
    with pytest.raises(OSError, match="no space left"):
        fold_adapters(folders, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_inspection_shows_every_layer_its_rank_energy_and_bytes(tmp_path):
    model = tiny(targets=["up", "point"])
    reg = EllaRegularizer(model, EllaConfig(past_rank=5))
    for task in range(2):
        randomise(model, task)
        reg.end_task(f"task {task}")
    reg.save_pretrained(tmp_path / "state")
    text = describe_state(tmp_path / "state")
    assert describe_state(tmp_path) == text
    assert "tasks: task 0, task 1" in text and "past_rank 5" in text
    (line,) = [line for line in text.splitlines() if line.startswith("up ")]
    columns = line.split()
    assert columns[1] == "16×12" and columns[2] == "5" and columns[4] == "%"
    kept = float(columns[3])
    (past,) = reg.state().layers["up"].parts
    assert kept == pytest.approx(
        100 / (1 + past.row_energy.sum() / past.left.square().sum(0).square().sum()).item(), abs=0.01
    )
    assert int(columns[5].replace(",", "")) == 4 * (16 + 12) * (5 + 1) and columns[6] == str(4 * 16 * 12)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="expected a saved regularizer"):
        describe_state(tmp_path / "empty")
