"""A run whose process is killed goes on after its last finished task and ends like an unbroken one."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers.normalizers import Lowercase

from ella.config import EllaConfig
from ella.continual.arms import ARMS
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.stream import StreamConfig, run_stream
from tests.processes import killed, started, tail

from . import tiny

CONFIG = StreamConfig(batch_size=4, ella=EllaConfig(ella_lambda=10.0, normalize="rms"))
TOUCHED = "base_model.model.encoder.layer.1.output.dense.weight"
TASKS = tiny.three_tasks(n_train=64, n_test=32)


def run(folder, **options):
    """The real MiniLM, so that the second task takes seconds."""
    built = build_classifier(max_length=32, lora=LoraSettings(r=4, alpha=8))
    return run_stream(built, TASKS, CONFIG, folder, progress=False, **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    (state,) = folder.glob("after-*")
    return {f"{p.name}/{k}": v for p in state.rglob("*.safetensors") for k, v in load_file(p).items()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    return folder, run(folder)


def run_and_kill(folder: Path) -> None:
    """Start the run, kill the process once the first task is saved and the second has begun."""
    log = folder.parent / "log"
    process = started(log, run, folder)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "progress.json").exists():
            assert process.exitcode is None, tail(log)
            assert time.monotonic() < deadline, "the first task was not saved within two minutes"
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        killed(process)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX")
def test_a_killed_run_ends_like_an_unbroken_one(tmp_path, unbroken):
    whole_folder, whole = unbroken
    folder = tmp_path / "run"
    run_and_kill(folder)
    progress = json.loads((folder / "progress.json").read_text())
    finished = len(progress["result"]["tasks"])
    assert finished < len(TASKS), "the run was over before it was killed"

    done = []
    resumed = run(folder, on_task_end=lambda index, _: done.append(index))
    assert done == list(range(finished, len(TASKS)))
    assert resumed.matrix.to_dict() == whole.matrix.to_dict()
    assert [t["loss"] for t in resumed.tasks] == [t["loss"] for t in whole.tasks]
    assert [t["penalty"] for t in resumed.tasks] == [t["penalty"] for t in whole.tasks]
    # Not only the scores: the adapter and the past are the same bits.
    ours, theirs = tensors(folder), tensors(whole_folder)
    assert ours.keys() == theirs.keys() and len(ours) > 40
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert sum(t.double().norm().item() for t in ours.values()) > 0


def test_a_finished_run_is_not_run_again(unbroken):
    folder, whole = unbroken
    built = build_classifier(max_length=32, lora=LoraSettings(r=4, alpha=8))
    built.loss = None  # no step can be taken
    again = run_stream(built, TASKS, CONFIG, folder, progress=False, on_task_end=lambda *_: pytest.fail("trained"))
    assert again.to_dict() == whole.to_dict()
    # The model is the one the run left: it scores what the last row says.
    scores = [built.accuracy(built.encode(task.test, task.labels)) for task in TASKS]
    assert scores == whole.matrix.rows[-1]


# Joint training has nothing to resume: it trains in the last task's turn alone.
@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "joint"])
def test_every_arm_resumes_after_every_task(tmp_path, bert, arm):
    """Stopped by an error after the first task and again after the second: same matrix, same costs but the clock."""
    settings = {"fisher_batches": 8} if arm == "ewc" else {}
    config = StreamConfig(arm=arm, settings=settings, batch_size=8, learning_rate=1e-2, ella=CONFIG.ella, dropout=True)
    tasks = tiny.three_tasks(n_train=24, n_test=32)

    def go(folder=None, **options):
        built = build_classifier(bert, lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        return run_stream(built, tasks, config, folder, progress=False, **options)

    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    whole = go()
    for _ in range(2):
        with pytest.raises(Stop):
            go(tmp_path, on_task_end=stop)
    resumed = go(tmp_path)
    assert resumed.matrix.to_dict() == whole.matrix.to_dict()
    for ours, theirs in zip(resumed.tasks, whole.tasks, strict=True):
        assert [ours[k] for k in ("loss", "penalty", "state_bytes")] == [
            theirs[k] for k in ("loss", "penalty", "state_bytes")
        ]


def test_another_run_in_the_folder_is_refused(tmp_path, bert):
    def build(**options):
        return build_classifier(bert, lora=LoraSettings(r=4, alpha=8), **options)

    tasks = tiny.two_tasks(n_train=8, n_test=4)
    config = StreamConfig(batch_size=8)
    run_stream(build(), tasks, config, tmp_path, progress=False)
    before = (tmp_path / "progress.json").read_bytes()

    def refused(message, classifier=None, tasks=tasks, config=config):
        with pytest.raises(ValueError, match=message):
            run_stream(classifier or build(), tasks, config, tmp_path, progress=False)

    refused("config.learning_rate was 0.002, now 0.01", config=StreamConfig(batch_size=8, learning_rate=0.01))
    refused("ella.ella_lambda was 'auto', now 1.0", config=StreamConfig(batch_size=8, ella=EllaConfig(1.0)))
    refused("model.temperature was 20.0, now 5.0", build(temperature=5.0))
    other = tiny.save_bert(tmp_path / "other", seed=2)
    refused("model.base_fingerprint was", build_classifier(other, lora=LoraSettings(r=4, alpha=8)))
    # Other weights in one place only, and another tokenizer of the same size, where the first ones were.
    touched = build()
    with torch.no_grad():
        touched.model.get_parameter(TOUCHED)[-1, -1] += 1e-3
    refused("model.base_fingerprint was", touched)
    lower = build()
    lower.tokenizer.backend_tokenizer.normalizer = Lowercase()
    assert len(lower.tokenizer) == len(build().tokenizer)
    refused("model.tokenizer_fingerprint was", lower)
    rescaled = build()
    rescaled.model.peft_config["default"].use_rslora = True
    rescaled.model.peft_config["default"].alpha_pattern = {"query": 64}
    refused("model.lora.alpha_pattern was", rescaled)
    refused("model.lora.use_rslora was", rescaled)
    refused(r"order was \['things', 'beings'\], now \['beings', 'things'\]", tasks=tasks[::-1])
    refused("tasks.beings was", tasks=[tasks[0], tasks[1].subset(train=6)])
    assert (tmp_path / "progress.json").read_bytes() == before


def test_a_run_saved_before_there_was_a_choice_goes_on(tmp_path, bert):
    def run(**changes):
        classifier = build_classifier(bert, lora=LoraSettings(r=4, alpha=8))
        return run_stream(classifier, tasks, StreamConfig(batch_size=8, **changes), tmp_path, progress=False)

    tasks = tiny.two_tasks(n_train=8, n_test=4)
    first = run().matrix.rows
    path = tmp_path / "progress.json"
    saved = json.loads(path.read_text())
    for name in ("lr_scheduler_type", "general"):
        del saved["run"]["config"][name]
    del saved["run"]["config"]["ella"]["penalty_energies"], saved["run"]["model"]["lora"]
    path.write_text(json.dumps(saved))
    assert run().matrix.rows == first
    # As it stood then, and not otherwise.
    with pytest.raises(ValueError, match=r"config.lr_scheduler_type was 'constant', now 'linear'"):
        run(lr_scheduler_type="linear")
    with pytest.raises(ValueError, match=r"config.ella.penalty_energies was True, now False"):
        run(ella=EllaConfig(penalty_energies=False))
