"""Every recipe, with its small model: trained, stopped and resumed, and read by what it leaves."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ella.planning.memory import ZERO_BUCKET, ZERO_PERSISTED

ROOT = Path(__file__).parents[1]
# What ``attach`` supports of train.ENGINES; None: DDP.
ENGINES = (None,)
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


def script():
    spec = importlib.util.spec_from_file_location("recipes_train", ROOT / "recipes" / "train.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


train = script()


def weights(folder):
    """Of the finished tasks and of the adapter for the next one, as PEFT saved them."""
    return load_file(folder / "adapter_model.safetensors")


def penalties(out, task):
    (state,) = sorted((out / "checkpoints" / task).glob("checkpoint-4/trainer_state.json"))
    return [log["ella_penalty"] for log in json.loads(state.read_text())["log_history"] if "ella_penalty" in log]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_with_its_small_model(path, tmp_path):
    assert train.main([str(path), "--tiny", "--out", str(tmp_path)]) == 0
    first, second = tmp_path / "after-1-first", tmp_path / "after-2-second"
    assert json.loads((second / "finished.json").read_text())["tasks"] == ["first", "second"]
    assert all(value == 0 for value in penalties(tmp_path, "first"))
    assert penalties(tmp_path, "second")[-1] > 0
    rank = train.Recipe.read(path).lora["r"]
    for folder, tasks in ((first, 1), (second, 2)):
        found = weights(folder)
        keys = [key for key in found if "lora_A" in key]
        assert len(keys) > 0
        for key in keys:
            a, b = found[key], found[key.replace("lora_A", "lora_B")]
            assert a.shape[0] == min(tasks * rank, a.shape[1], b.shape[0]), key
    # Done already: nothing is trained again.
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")}
    assert train.main([str(path), "--tiny", "--out", str(tmp_path)]) == 0
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.safetensors")} == stamps


def test_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path):
    path = str(ROOT / "recipes" / "llama-3.1-8b.yaml")
    unbroken, stopped = tmp_path / "unbroken", tmp_path / "stopped"
    train.main([path, "--tiny", "--out", str(unbroken)])
    train.main([path, "--tiny", "--out", str(stopped), "--stop-after", "1"])
    assert not (stopped / "after-2-second").exists()
    # Killed in the second task, after its first checkpoint.
    shutil.copytree(unbroken / "checkpoints" / "second", stopped / "checkpoints" / "second")
    shutil.rmtree(stopped / "checkpoints" / "second" / "checkpoint-4")
    train.main([path, "--tiny", "--out", str(stopped)])
    expected, found = weights(unbroken / "after-2-second"), weights(stopped / "after-2-second")
    assert expected.keys() == found.keys() and len(found) > 0
    for key, value in expected.items():
        assert value.norm() > 0
        assert (found[key] - value).norm() / value.norm() < 1e-4, key


def test_what_is_left_is_a_plain_adapter(tmp_path):
    train.main([str(ROOT / "recipes" / "llama-3.1-8b.yaml"), "--tiny", "--out", str(tmp_path)])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "tiny_model", dtype=torch.float32).eval()
    ids = torch.tensor([[4, 5, 6, 7]])
    with torch.no_grad():
        plain = base(ids).logits.clone()
        model = PeftModel.from_pretrained(base, tmp_path / "after-2-second").eval()
        assert (model(ids).logits - plain).norm() / plain.norm() > 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES, ids=lambda engine: engine or "ddp")
def test_two_processes(tmp_path, engine):
    out, path = tmp_path / "out", ROOT / "recipes" / "t5-large.yaml"
    options = ["--tiny", "--out", str(out), *(["--engine", engine] if engine else [])]
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(ROOT / "recipes" / "train.py"), str(path), *options],
        capture_output=True, text=True, check=False, cwd=tmp_path, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("second: folded") == 1, "one process reports"
    assert json.loads((out / "after-2-second" / "finished.json").read_text())["tasks"] == ["first", "second"]
    assert penalties(out, "second")[-1] > 0


def test_a_recipe_says_what_is_wrong(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: x\nlora: {}\nella: {}\ntraining: {}\ntasks: {}\ntiny: {}\nlamda: 3\n")
    with pytest.raises(ValueError, match=r"unknown keys \['lamda'\]; a recipe has \['dtype', 'ella'"):
        train.Recipe.read(path)
    llama = ROOT / "recipes" / "llama-3.1-8b.yaml"
    train.main([str(llama), "--tiny", "--out", str(tmp_path / "out"), "--stop-after", "1"])
    recipe = train.Recipe.read(llama)
    other = {"other": train.tiny_tasks()["first"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "tiny_tasks", lambda: other)
        with pytest.raises(ValueError, match=r"has finished the tasks \['first'\], the recipe's are \['other'\]"):
            train.run(recipe, tmp_path / "out", tiny=True)


def test_tasks_from_files(tmp_path):
    lines = [{"prompt": "1 + 1 =", "completion": " 2"}, {"prompt": "2 + 2 =", "completion": " 4"}]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, lines)))
    recipe = train.Recipe("x", {}, {}, {}, {"files": {"sums": "sums.jsonl"}}, {}, folder=tmp_path)
    assert train.read_tasks(recipe) == {"sums": [("1 + 1 =", " 2"), ("2 + 2 =", " 4")]}


def test_the_loss_is_on_the_completion(tmp_path):
    recipe = train.Recipe.read(ROOT / "recipes" / "llama-3.1-8b.yaml")
    train.save_tiny(recipe, tmp_path)
    tokenizer, _ = train.load(recipe, str(tmp_path))
    (one,) = train.encoded(tokenizer, [train.Example("I saw one owl", " bird")], 16, False)
    assert tokenizer.decode([t for t in one["labels"] if t != -100]) == "bird </s>"
    assert one["input_ids"][-2:] == one["labels"][-2:] and one["labels"][:-2] == [-100] * (len(one["labels"]) - 2)
    (cut,) = train.encoded(tokenizer, [train.Example("I saw one owl", " bird")], 4, False)
    assert tokenizer.decode(cut["input_ids"]) == "one owl bird </s>"
    (pair,) = train.encoded(tokenizer, [train.Example("I saw one owl", " bird")], 16, True)
    assert tokenizer.decode(pair["labels"]) == "bird </s>"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_knows_every_setting(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))  # refuses keys it does not know
    settings = yaml.safe_load(path.read_text())
    assert config.distributed_type.value == settings["distributed_type"] and config.num_processes == 8
    assert path.stem != "fsdp2" or settings["fsdp_config"]["fsdp_version"] == 2
    named = settings.get("deepspeed_config", {}).get("deepspeed_config_file")
    assert named is None or (ROOT / named).is_file()


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_settings_are_those_of_the_plan(stage):
    settings = json.loads((ROOT / "recipes" / "deepspeed" / f"zero{stage}.json").read_text())["zero_optimization"]
    assert settings["stage"] == stage and settings["reduce_bucket_size"] == ZERO_BUCKET
    assert stage == 2 or settings["stage3_param_persistence_threshold"] == ZERO_PERSISTED
