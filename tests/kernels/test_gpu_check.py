"""The GPU script on a machine without one: its stages, its memory plan, and what is left when something goes wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu_check, gpu_plan, gpu_stages
from bench.measure import Samples
from bench.providers import BASELINE, PROVIDERS
from bench.rows import Row
from bench.shapes import Case, Size
from ella_kernels import recognition

# (MiB that nvidia-smi shows, bytes of last-level cache): an H100 and an H200.
CARDS = ((81559, 50 * 2**20), (143771, 60 * 2**20))


@pytest.mark.slow
def test_dry_run_walks_every_stage_and_shows_no_times(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--output", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "gpu_check.jsonl",
        "gpu_check.log",
        "gpu_dry-run.json",
    ]
    results = json.loads((tmp_path / "gpu_dry-run.json").read_text())
    assert [row["stage"] for row in results["stages"]] == list(gpu_stages.STAGES)
    assert all(row["passed"] for row in results["stages"]) and results["dry_run"] is True
    assert {row["algorithm"] for row in results["checks"] if "algorithm" in row} == set(gpu_stages.ALGORITHMS)
    assert all(row["passed"] for row in results["checks"])
    assert [row for row in results["rows"] if row["median"] is not None or row["roofline"]] == []
    assert {(row["stage"], row["provider"]) for row in results["rows"]} >= {
        *((stage, gpu_plan.OURS) for stage in (*gpu_plan.FIRST, *gpu_plan.COMPARED)),
        *((stage, BASELINE) for stage in gpu_plan.COMPARED),
    }
    assert {row["between"] for row in results["probes"]} == {"to nearest"}
    assert len((tmp_path / "gpu_check.jsonl").read_text().splitlines()) == sum(
        len(results[name]) for name in ("probes", "rows", "checks", "kernels", "stages")
    ) + 1  # fmt: skip
    assert "every check passed" in capsys.readouterr().out


# A stage of its own in a process: the name says what it does.
STAGE = """
import os, sys, time
from pathlib import Path
from bench.gpu_check import emit, run_stage
name, path = sys.argv[1], Path(sys.argv[2])

def rows(context):
    yield {"kind": "check", "check": "first", "passed": True}
    if name == "raises":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if name == "dies":
        os.abort()
    if name == "hangs":
        time.sleep(60)
    yield {"kind": "check", "check": "second", "passed": True}

sys.exit(0 if run_stage(name, rows, path, None) else 1)
"""


def run(folder: Path, **stages: float) -> dict:
    gpu_check.run_stages(
        stages, lambda name: [sys.executable, "-c", STAGE, name, str(folder / "gpu_check.jsonl")], folder
    )
    return gpu_check.collect(folder / "gpu_check.jsonl", False, 1.0)


def test_a_failing_stage_loses_nothing_of_the_others(tmp_path):
    results = run(tmp_path, before=60, raises=60, dies=60, hangs=8, after=60)
    rows = {
        name: [r["check"] for r in results["checks"] if r["stage"] == name]
        for name in ("before", "raises", "dies", "hangs", "after")
    }
    assert rows == {
        "before": ["first", "second"], "raises": ["first"], "dies": ["first"], "hangs": ["first"],
        "after": ["first", "second"],
    }  # fmt: skip
    stages = {row["stage"]: row for row in results["stages"]}
    assert [stages[name]["passed"] for name in rows] == [True, False, False, False, True]
    assert "illegal memory access" in stages["raises"]["failure"]
    assert stages["dies"]["failure"] == f"exit status {-signal.SIGABRT}"
    assert stages["hangs"]["failure"].startswith("killed after")
    assert "illegal memory access" in (tmp_path / "gpu_check.log").read_text()
    assert len(gpu_check.failures(results)) == 3 and "3 failed" in gpu_check.summary(results)


def test_a_kill_in_the_middle_keeps_the_rows_before_it(tmp_path):
    path = tmp_path / "gpu_check.jsonl"
    process = subprocess.Popen([sys.executable, "-c", STAGE, "hangs", str(path)])
    try:
        while not path.exists() or not path.read_text().endswith("\n"):
            time.sleep(0.05)
            assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    with path.open("a") as file:
        file.write('{"stage": "hangs", "kind": "che')
    assert [row["check"] for row in gpu_check.read_rows(path)] == ["first"]


def test_what_has_no_time_left_is_a_row(tmp_path):
    gpu_check.run_stages({"a": 30, "sanitizer": 30}, lambda name: ["true"], tmp_path, seconds=35)
    rows = gpu_check.read_rows(tmp_path / "gpu_check.jsonl")
    # The sanitizer's own time is set aside.
    assert [(row["stage"], row["reason"]) for row in rows] == [("a", "the run's time was over")]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_sanitizer_is_killed_with_what_it_started(tmp_path):
    tool, pid = tmp_path / "compute-sanitizer", tmp_path / "pid"
    # As the tool does: the program it watches is its child.
    tool.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {pid}.part\nmv {pid}.part {pid}\nwait\n")
    tool.chmod(0o755)
    gpu_check.run_stages({"sanitizer": 2}, lambda name: [str(tool)], tmp_path)
    (row,) = gpu_check.read_rows(tmp_path / "gpu_check.jsonl")
    assert row["passed"] is False and row["failure"].startswith("killed after 2")
    child = int(pid.read_text())
    waited = time.monotonic() + 5
    while is_running(child) and time.monotonic() < waited:
        time.sleep(0.05)
    assert not is_running(child)


def test_a_sanitizer_that_is_not_there_is_said_to_be(tmp_path):
    gpu_check.run_stages({"sanitizer": 20}, lambda name: [], tmp_path)
    (row,) = gpu_check.read_rows(tmp_path / "gpu_check.jsonl")
    assert row["passed"] is None and "not installed" in row["reason"]


@pytest.mark.parametrize("mib, cache", CARDS)
def test_the_plan_fits_the_card(mib, cache):
    free = mib * 2**20 - 600 * 2**20
    cases = {**{name: (case, (gpu_plan.OURS,)) for name, case in gpu_plan.FIRST.items()}, **gpu_plan.COMPARED}
    for name, (case, names) in cases.items():
        found = gpu_plan.fit(case, names, free, cache)
        assert found.needed <= 0.85 * free, name
        assert found.pinned <= 4 * 2**30, name
        assert set(found.kept) | set(found.left_out) == set(names)
        # What is compared is there on every card.
        assert {gpu_plan.OURS, BASELINE, "dense compiled"} & set(names) <= set(found.kept), name
        # At least what is held: one dense past, or the factors.
        dense = sum(4 * size.weight for size in case.sizes) if BASELINE in names else 0
        assert found.needed > dense + sum(4 * (s.out + s.in_) * (3 * s.r + s.k) for s in case.sizes)
    left_out = gpu_plan.fit(*gpu_plan.COMPARED["dense all k 16"], 24 * 2**30, cache).left_out
    assert BASELINE in left_out and gpu_plan.OURS not in left_out and "24.0 GiB" in left_out[BASELINE]


@pytest.mark.parametrize("mib, cache", CARDS)
def test_no_eager_batch_has_more_operand_sets_than_are_recognised(mib, cache):
    for case, names in (*((case, (gpu_plan.OURS,)) for case in gpu_plan.FIRST.values()), *gpu_plan.COMPARED.values()):
        ours = [name for name in names if name.startswith("ours ")]
        batches = gpu_plan.eager_batches(ours, case.sizes, cache)
        assert [name for batch in batches for name in batch] == ours
        for batch in batches:
            assert sum(gpu_plan.n_sets(name, case.sizes, cache) for name in batch) <= gpu_plan.signature_memory()
    # Several sets where the cache would hold one: else the cache is timed.
    assert gpu_plan.n_sets(gpu_plan.OURS, gpu_plan.FIRST["q,v k 8"].sizes, cache) > 2


def test_eager_calls_stay_recognised_in_their_batches(monkeypatch):
    """The torch twins in turns, as they are timed: none is checked anew, unless what was built is forgotten."""
    sizes = (Size(96, 64, 8, 8),) * 3
    touched = sum(4 * (s.out + s.in_) * (s.r + s.k) for s in sizes)
    names = ["ours gram, torch", "ours stream, torch", "ours auto, torch"]
    batches = gpu_plan.eager_batches(names, sizes, 2 * touched)
    assert batches == [names[:2], names[2:]]
    limits = gpu_stages.Limits(0.1, 1.0, 1e10, 1e11)
    context = gpu_stages.Context("cpu")
    groups = [gpu_stages.make_group(sizes, seed=i) for i in range(4)]
    calls = {name: [gpu_stages.prepare(PROVIDERS[name], group, "in-place").call for group in groups] for name in names}
    rows = {name: Row("gpu_check", "x", "in-place", name) for name in names}
    found = list(gpu_stages._eager_rows(context, Case("x", sizes), rows, calls, limits, "x", 2 * touched))
    assert [row["unrecognised"] for row in found if row["kind"] == "check"] == [0, 0]
    assert [row["provider"] for row in found if row["kind"] == "time"] == names
    assert gpu_stages.unrecognised([calls[name] for name in names]) == 0
    recognition.forget()
    assert gpu_stages.unrecognised([calls[name] for name in names]) == sum(map(len, calls.values()))


def test_ours_keeps_its_times_when_it_is_red_and_nothing_else_does(monkeypatch, tmp_path):
    errors = {gpu_plan.OURS: 3e-4, BASELINE: 1e-7, "dense rebuilt": 1e-3}
    error = iter(errors.values())
    monkeypatch.setattr(gpu_stages, "gate_error", lambda prepared, references: next(error))
    case = Case("x", (Size(40, 56, 4, 4),))
    rows = list(gpu_stages.time_case(gpu_stages.Context("cpu"), case, tuple(errors), "x"))
    checks = {row["check"]: row for row in rows if row["kind"] == "check"}
    assert [checks[f"x: {name}"]["passed"] for name in errors] == [False, True, False]
    assert [checks[f"x: {name}"]["bound"] for name in errors] == [1e-4, 1e-5, 1e-5]
    reached = {(row["provider"], row["graphed"]) for row in rows if row["kind"] == "time"}
    assert reached == {(gpu_plan.OURS, True), (gpu_plan.OURS, False), (BASELINE, False), ("dense rebuilt", None)}
    # On a GPU, where there are times:
    red = Row("gpu_check", "x", "in-place", gpu_plan.OURS, error=3e-4, gate=1e-4, reason="red: relative error 3.0e-04")
    times = {gpu_plan.OURS: Samples([1e-4] * 3), BASELINE: Samples([6e-3] * 3)}
    (row,) = gpu_stages._timed(gpu_stages.Context("cuda"), {gpu_plan.OURS: red}, [gpu_plan.OURS], times)
    assert (row.median, round(row.ratio), row.reason) == (1e-4, 60, red.reason)
    gpu_check.emit(tmp_path / "rows", {"stage": "x", "kind": "time", "graphed": True} | row.as_dict())
    assert "60.0× 3e-04 red" in gpu_check.summary(gpu_check.collect(tmp_path / "rows", False, 1.0))


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    import ella_kernels as ek

    right = ek.add_hadamard_grad_

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * 1.1

    assert gpu_stages.check("cpu", gpu_stages.TINY_SHAPES, "gram", "auto", torch.float32)["passed"]
    monkeypatch.setattr(ek, "add_hadamard_grad_", wrong)
    entry = gpu_stages.check("cpu", gpu_stages.TINY_SHAPES, "gram", "auto", torch.float32)
    assert not entry["passed"] and entry["value_error"] > 0.05


def test_the_probe_tells_roundings_apart():
    from bench import gpu_probe

    ulp = 2.0**-23
    assert gpu_probe.rounding(1.0, -1.0) == "toward zero"
    assert gpu_probe.rounding(1.0 + ulp, -1.0 - ulp) == "to nearest"
    assert gpu_probe.rounding(1.0, -1.0 - ulp) == "down"
    assert gpu_probe.rounding(float("nan"), 1.0).startswith("neither")

    def toward_zero(x, y):
        acc = torch.zeros(x.shape[0], y.shape[1], dtype=torch.float64)
        for k in range(0, x.shape[1], 8):
            acc = acc + x[:, k : k + 8].double() @ y[k : k + 8].double()
            single = acc.float()
            over = single.double().abs() > acc.abs()
            acc = torch.where(over, torch.nextafter(single, torch.zeros_like(single)), single).double()
        return acc.float()

    found = gpu_probe._probe_one(toward_zero, 16, "cpu")
    assert found["between"] == found["within"] == "toward zero"
    assert found["share_below"] == 1.0 and found["bias"] < -1e-6


def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_check.main(["--output", str(tmp_path)]) == 2
    assert "nothing is measured" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_the_folder_is_the_one_asked_for_else_out_else_results(tmp_path, monkeypatch):
    out = {"OUT": str(tmp_path / "out")}
    assert gpu_check.output_folder(tmp_path, out) == tmp_path
    assert gpu_check.output_folder(None, out) == tmp_path / "out"
    assert gpu_check.output_folder(None, {}) == gpu_check.output_folder(None, {"OUT": ""}) == gpu_check.RESULTS
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    assert gpu_check.main(["--dry-run", "--only", "nothing else"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"gpu_check.jsonl", "gpu_dry-run.json"}


def test_stages_are_those_of_the_plan():
    names = list(gpu_stages.STAGES)
    assert names[0] == "versions" and names[1:4] == list(gpu_plan.FIRST) and names[-1] == gpu_check.LAST
    assert sum(stage.seconds for stage in list(gpu_stages.STAGES.values())[:5]) < gpu_check.SECONDS
    first = gpu_plan.FIRST["q,v p 16"].sizes[0]
    assert (first.k, first.energy) == (16, True) and gpu_plan.FIRST["q,v k 120"].sizes[0].k == 120
    assert {name for _, names in gpu_plan.COMPARED.values() for name in names} <= set(PROVIDERS)
    assert set(gpu_plan.PREDICTED) == set(gpu_plan.FIRST)


def test_the_readme_takes_a_run_of_it(tmp_path):
    from bench.readme import section

    path = tmp_path / "gpu_check.jsonl"
    ours = Row("gpu_check", "a case", "in-place", gpu_plan.OURS, error=1e-6, median=1e-4, ratio=60.0)
    gpu_check.emit(path, {"stage": "versions", "kind": "machine", "name": "a GPU", "date": "2026-01-01"})
    gpu_check.emit(path, {"stage": "x", "kind": "time", "graphed": True} | ours.as_dict())
    text = section(None, gpu_check.collect(path, False, 1.0))
    assert "**GPU**: a GPU" in text and "60×" in text


def test_clocks_are_summed_up_and_absent_without_the_tool(monkeypatch):
    found = gpu_stages.sampled("1980, 3201, 600.5, 40\n345, 3201, [N/A], 42\n1500, 3201, 500, 4")
    assert found["clocks.sm"] == [345.0, 1500.0, 1980.0] and found["power.draw"] == [500.0, 550.25, 600.5]
    monkeypatch.setenv("PATH", "")
    assert gpu_stages.state() == {}
    with gpu_stages.clocks() as sampled:
        pass
    assert sampled == {}


@pytest.mark.slow
def test_a_cache_filled_ahead_is_taken_wherever_the_sources_lie(tmp_path):
    """Filled here for an sm_90; then the same sources elsewhere, with the cache moved, compile nothing."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(gpu_check.__file__).parents[1]
    for package in ("bench", "ella_kernels"):
        shutil.copytree(root / package, tmp_path / "elsewhere" / package, ignore=shutil.ignore_patterns("__pycache__"))
    counts = []
    for folder, cache in ((root, tmp_path / "cache"), (tmp_path / "elsewhere", tmp_path / "carried")):
        if counts:
            (tmp_path / "cache").rename(cache)
        command = [sys.executable, "-m", "bench.gpu_cache", str(cache), "--small"]
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=folder, env=environment | {"PYTHONPATH": str(folder)},
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        manifest = json.loads((cache / "gpu_cache.json").read_text())
        counts.append((manifest["compiled"], manifest["from_cache"]))
    (compiled, none), (again, taken) = counts
    assert compiled >= 15 and none == 0 and (again, taken) == (0, compiled)
    assert {path.suffix for path in (tmp_path / "carried").glob("*/*")} == {".cubin", ".json"}


def test_a_cache_of_another_installation_is_named_as_one(tmp_path, monkeypatch):
    from bench import gpu_cache

    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    assert gpu_cache.compare() == "none"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert gpu_cache.compare() == "none"
    manifest, identity = tmp_path / "gpu_cache.json", gpu_cache.identity()
    manifest.write_text(json.dumps({"identity": identity | {"triton_key": "0", "python": "3.0"}}))
    assert gpu_cache.compare() == "does not fit: python, triton_key differ"
    manifest.write_text(json.dumps({"identity": identity}))
    assert gpu_cache.compare() == "fits"
