"""Finished and current tasks as one plain LoRA that PEFT loads alone, from a live model and from every saved form."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open

from ella import EllaConfig, EllaRegularizer, export_state, fold_adapters
from ella.cli import main
from ella.export import VLLM_RANKS, ExportReport
from tests.ella.models import EXPERTS, Tiny, bert, ids, llama, logits, lora, randomise, tiny, train_rest
from tests.kernels.cases import relative_error

KINDS = {
    "all": {},
    "experts": EXPERTS,
    "lora_bias": {"targets": ["up", "point"], "lora_bias": True},
    "patterns": {"rank_pattern": {"up": 6, "image": 2}, "alpha_pattern": {"up": 3}, "use_rslora": True},
}


def within_a_task(tasks=2, config=None, lora_config=None, base=llama):
    model = get_peft_model(base(), lora_config or lora())
    reg = EllaRegularizer(model, config)
    for task in range(tasks):
        randomise(model, task)
        train_rest(model, task)
        reg.end_task(f"task {task}")
    done = logits(model)
    randomise(model, 9)
    train_rest(model, 9)
    return model, reg, done


def loaded(folder, base=llama):
    return logits(PeftModel.from_pretrained(base(), folder))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tasks", [0, 2])
def test_every_kind_of_layer(tmp_path, kind, tasks):
    model = tiny(**KINDS[kind])
    reg = EllaRegularizer(model)
    for task in range(tasks):
        randomise(model, task)
        reg.end_task(f"task {task}")
    randomise(model, 9)
    report = reg.export_adapter(tmp_path / "out")
    assert report.max_relative_error == 0.0
    torch.manual_seed(0)
    plain = PeftModel.from_pretrained(Tiny(), tmp_path / "out").eval()
    # Factors are rounded to fp32 once more, and this model amplifies.
    assert relative_error(plain(ids()).detach(), model(ids()).detach()) < 3e-6
    model.save_pretrained(tmp_path / "saved")
    if tasks:
        export_state(tmp_path / "saved", tmp_path / "offline")
        torch.manual_seed(0)
        plain = PeftModel.from_pretrained(Tiny(), tmp_path / "offline").eval()
        assert relative_error(plain(ids()).detach(), model(ids()).detach()) < 3e-6


@pytest.mark.parametrize("keep_past", ["adapter", "external"])
def test_every_saved_form(tmp_path, keep_past, capsys):
    model, reg, done = within_a_task(config=EllaConfig(keep_past=keep_past), lora_config=lora(use_rslora=True))
    beside, _, done = within_a_task(lora_config=lora(use_rslora=True))
    live = logits(beside)
    model.save_pretrained(tmp_path / "peft")
    reg.save_pretrained(tmp_path / "state")
    for name, want, rank in (("peft", live, 16), ("state", done, 8)):
        assert main(["export", str(tmp_path / name), "-o", str(tmp_path / f"out-{name}")]) == 0
        assert f"vLLM serves it with max_lora_rank={rank}" in capsys.readouterr().out
        assert relative_error(loaded(tmp_path / f"out-{name}"), want) < 1e-6, name
    reg.export_adapter(tmp_path / "live")
    assert relative_error(loaded(tmp_path / "live"), live) < 1e-6


def test_folded_adapters_are_exported(tmp_path):
    for task in range(2):
        model = get_peft_model(llama(), lora())
        randomise(model, task)
        model.save_pretrained(tmp_path / str(task))
    fold_adapters([tmp_path / "0", tmp_path / "1"], tmp_path / "folded")
    export_state(tmp_path / "folded", tmp_path / "out")
    assert relative_error(loaded(tmp_path / "out"), loaded(tmp_path / "folded")) < 1e-6


def test_modules_trained_as_a_whole_go_along(tmp_path):
    config = lora(modules_to_save=["lm_head"])
    model, reg, done = within_a_task(lora_config=config)
    live = logits(model)
    reg.export_adapter(tmp_path / "live")
    model.save_pretrained(tmp_path / "peft")
    export_state(tmp_path / "peft", tmp_path / "offline")
    assert relative_error(loaded(tmp_path / "live"), live) < 1e-6
    assert relative_error(loaded(tmp_path / "offline"), live) < 1e-6
    assert relative_error(loaded(tmp_path / "peft"), done) < 1e-6
    reg.save_pretrained(tmp_path / "state")
    with pytest.raises(
        ValueError, match=r"no weights of modules_to_save \['lm_head'\]; export from a folder that PEFT"
    ):
        export_state(tmp_path / "state", tmp_path / "refused")
    assert not (tmp_path / "refused").exists()
    # Folding such an adapter keeps its module too.
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    randomise(model, 3)
    train_rest(model, 3)
    model.save_pretrained(tmp_path / "one")
    fold_adapters([tmp_path / "one"], tmp_path / "folded")
    assert relative_error(loaded(tmp_path / "folded"), logits(model)) < 1e-6


def test_a_sequence_classifier(tmp_path):
    config = lora(task_type="SEQ_CLS", target_modules=["query"])
    model, reg, _ = within_a_task(lora_config=config, base=bert)
    reg.export_adapter(tmp_path / "out")
    assert relative_error(loaded(tmp_path / "out", bert), logits(model)) < 1e-6


def test_a_rank_cuts_and_says_what_it_lost(tmp_path):
    model, reg, _ = within_a_task(tasks=3)
    live = logits(model)
    errors = []
    for rank in (4, 8, 64):
        report = reg.export_adapter(tmp_path / str(rank), rank=rank)
        errors.append(relative_error(loaded(tmp_path / str(rank)), live))
        assert report.rank == min(rank, 16)
        config = json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == report.rank and config["rank_pattern"] == {}
        with safe_open(tmp_path / str(rank) / "adapter_model.safetensors", "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                rows, columns = file.get_slice(key).get_shape()
                assert (rows if "lora_A" in key else columns) == report.rank
        (a, b), layer = reg.layers[0].factors(*reg.layers[0].parameters())[0], reg.layers[0]
        w = layer.module.get_delta_weight("default").double() + layer.scaling() * b.double() @ a.double()
        s = torch.linalg.svdvals(w)
        lost = (s[rank:].square().sum() / s.square().sum()).sqrt().item()
        assert report.relative_error[layer.name] == pytest.approx(lost, abs=1e-6)
    assert errors[0] > errors[1] > 1e-3 and errors[2] < 1e-6


def test_no_component_without_effect_is_exported(tmp_path):
    _, reg, done = within_a_task()
    reg.reset_adapter()
    assert reg.export_adapter(tmp_path / "out").rank == 8
    assert relative_error(loaded(tmp_path / "out"), done) < 1e-6
    fresh = EllaRegularizer(get_peft_model(llama(), lora()))
    assert fresh.export_adapter(tmp_path / "nothing").rank == 1
    assert torch.equal(loaded(tmp_path / "nothing"), logits(llama()))


def test_ranks_of_vllm_are_named():
    assert [ExportReport(r, {}).vllm_rank for r in (1, 8, 9, 257, 512, 513)] == [8, 8, 16, 320, 512, None]
    assert "vLLM serves ranks up to 512: cut it with rank=" in str(ExportReport(513, {"a": 0.0}))
    assert sorted(VLLM_RANKS) == list(VLLM_RANKS)


def test_bad_requests_write_nothing(tmp_path, capsys):
    _, reg, _ = within_a_task()
    reg.save_pretrained(tmp_path / "state")
    EllaRegularizer(get_peft_model(llama(), lora())).save_pretrained(tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for rank, error in ((0, ValueError), (True, TypeError), (2.0, TypeError), ("8", TypeError)):
        with pytest.raises(error, match="rank must be"):
            reg.export_adapter(tmp_path / "out", rank=rank)
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        reg.export_adapter(tmp_path / "full")
    with pytest.raises(ValueError, match=r"has no finished task; export it with EllaRegularizer\.export_adapter"):
        export_state(tmp_path / "new", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no saved past"):
        export_state(tmp_path / "nowhere", tmp_path / "out")
    assert main(["export", str(tmp_path / "nowhere"), "-o", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("ella: no saved past at")
    assert not (tmp_path / "out").exists() and sorted(p.name for p in tmp_path.iterdir()) == ["full", "new", "state"]
