"""One run per folder: who comes second is refused, whoever was killed is not waited for."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from ella.config import EllaConfig
from ella.continual.compare import compare_arms
from ella.continual.environment import environment
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.report import write_report
from ella.continual.running import one_run
from ella.continual.state import StreamState
from ella.continual.stream import StreamConfig, run_stream
from ella.regularizer import EllaRegularizer

from ..ella.test_files import ODD, ended, in_child
from . import tiny

CONFIG = StreamConfig(arm="inclora", batch_size=8, ella=EllaConfig(1.0, normalize="rms"))
REFUSED = r"another process is running here: process \d+ on .* has .*\.ella-run\.lock; wait for it"


def running(folder) -> int:
    """The process id of a child that holds ``folder`` until it is killed."""
    read, write = os.pipe()

    def hold():
        with one_run(folder):
            os.write(write, b".")
            time.sleep(60)

    pid = in_child(hold)
    assert os.read(read, 1) == b"."
    return pid


def killed(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    ended(pid)


def refused(folder, message=REFUSED) -> None:
    with pytest.raises(BlockingIOError, match=message), one_run(folder):
        pytest.fail("two runs in one folder")


@pytest.mark.parametrize("name", ["run", ODD])
def test_the_second_is_refused_while_the_first_lives(tmp_path, name):
    folder = tmp_path / name
    pid = running(folder)
    try:
        refused(folder)
        refused(folder, f"process {pid} on ")
        with one_run(tmp_path / "another"):
            pass
    finally:
        killed(pid)
    # Its file is still there, and holds nobody up.
    assert len(list(folder.iterdir())) == 1
    with one_run(folder):
        refused(folder, f"process {os.getpid()} on ")
    assert list(folder.iterdir()) == []


def test_threads_are_told_apart(tmp_path):
    with one_run(tmp_path), ThreadPoolExecutor(1) as pool:
        pool.submit(refused, tmp_path).result()


def test_of_many_that_start_at_once_one_runs_at_a_time(tmp_path):
    """Each that gets in makes a folder that no other may find."""
    inside, entered = tmp_path / "inside", tmp_path / "entered"

    def work():
        for _ in range(300):
            try:
                with one_run(tmp_path / "run"):
                    inside.mkdir()
                    inside.rmdir()
                    with open(entered, "a") as file:
                        file.write("x")
            except BlockingIOError:
                pass
        os.kill(os.getpid(), signal.SIGUSR1)

    assert [ended(pid) for pid in [in_child(work) for _ in range(3)]] == [signal.SIGUSR1] * 3
    assert entered.stat().st_size > 10


def test_places_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match="file"), one_run(folder):
            pass
    (tmp_path / "run" / ".ella-run.lock").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"cannot run in .*run: Is a directory"), one_run(tmp_path / "run"):
        pass


# --- runs ------------------------------------------------------------------------------------------------------------


def build(bert):
    return build_classifier(bert, lora=LoraSettings(r=4, alpha=8))


def test_a_run_keeps_its_folder_and_lets_others_write_there(tmp_path, bert):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    met = []

    def meanwhile(index, result):
        with pytest.raises(BlockingIOError, match=REFUSED):
            run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False)
        with pytest.raises(BlockingIOError, match=REFUSED):
            StreamState(tmp_path, {}).clear()
        # Not a run: what a caller writes into the same folder as it goes.
        if result.matrix.complete:
            write_report(tmp_path, [result], title="t", notes={"path": ODD}, env=environment())
        met.append(index)

    first = run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False, on_task_end=meanwhile)
    assert met == [0, 1]
    again = run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False)
    assert again.to_dict() == first.to_dict()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "after-2-beings",
        "progress.json",
        "report.html",
        "report.json",
        "report.md",
    ]
    assert '"path": "caf\\udce9"' in (tmp_path / "report.json").read_text(encoding="utf-8")


def test_a_comparison_is_refused_before_anything_is_cleared(tmp_path, bert):
    def compare(**options):
        return compare_arms(
            lambda: build(bert),
            lambda seed: tiny.two_tasks(n_train=8, n_test=4),
            CONFIG,
            arms=("inclora",),
            seeds=(0,),
            out_dir=tmp_path,
            title="t",
            notes={},
            progress=False,
            echo=lambda text: None,
            **options,
        )

    (first,) = compare()
    pid = running(tmp_path)
    try:
        with pytest.raises(BlockingIOError, match=REFUSED):
            compare(resume=False)
    finally:
        killed(pid)
    assert compare()[0].to_dict() == first.to_dict()
    assert compare(resume=False)[0].tasks[0]["seconds"] != first.tasks[0]["seconds"]


def stopped_after_one_task(folder, bert, tasks) -> None:
    class Stop(BaseException):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        run_stream(build(bert), tasks, CONFIG, folder, progress=False, on_task_end=stop)


@pytest.mark.parametrize("noted", [True, False], ids=["noted in progress.json", "not noted there"])
def test_a_run_without_its_past_is_refused(tmp_path, bert, noted):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    stopped_after_one_task(tmp_path, bert, tasks)
    shutil.move(tmp_path / "after-1-things" / "past", tmp_path / "past")
    if not noted:
        progress = json.loads((tmp_path / "progress.json").read_text())
        assert progress.pop("past") is True
        (tmp_path / "progress.json").write_text(json.dumps(progress))
    with pytest.raises(ValueError, match="which is incomplete, without past" if noted else "has no saved past"):
        run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False)
    shutil.move(tmp_path / "past", tmp_path / "after-1-things" / "past")
    assert len(run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False).tasks) == 2


def test_the_past_of_another_run_is_refused(tmp_path, bert):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    stopped_after_one_task(tmp_path, bert, tasks)
    past = tmp_path / "after-1-things" / "past"
    shutil.rmtree(past)
    EllaRegularizer(build(bert).model, CONFIG.ella).save_pretrained(past)
    with pytest.raises(ValueError, match=r"after-1-things/past holds the past of \[\]; expected that of \['things'\]"):
        run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False)


def test_a_damaged_result_is_refused(tmp_path, bert):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    stopped_after_one_task(tmp_path, bert, tasks)
    progress = json.loads((tmp_path / "progress.json").read_text())
    for result in ({}, progress["result"] | {"more": 1}, progress["result"] | {"matrix": {}}):
        (tmp_path / "progress.json").write_text(json.dumps(progress | {"result": result}))
        with pytest.raises(ValueError, match=r"the saved result is damaged .*; delete it to start over"):
            run_stream(build(bert), tasks, CONFIG, tmp_path, progress=False)
