"""A short smoke of the real suite: rows come out gated and whole. No clock is asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.headline import MARKS
from bench.shapes import LAYER_CASES, MODEL_CASES, MODELS, layers_of

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "pytest", "-c", "bench/pytest.ini", "bench/bench_layer.py", "--out", str(out)]
    chosen = ["-k", "MiniLM-L6 and q and not compiled", "--threads", "1", "-q", "-p", "no:warnings"]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_every_row_is_green_or_says_why_not(smoke):
    found = json.loads((smoke / "results.json").read_text())
    rows = found["rows"]
    assert {row["provider"] for row in rows} >= {"dense eager", "dense rebuilt", "ours gram, torch", "ours auto, torch"}
    for row in rows:
        if row["reason"] is None:
            assert row["error"] <= row["gate"] == 1e-5
            assert 0 < row["p20"] <= row["median"] <= row["p80"] and row["rounds"] >= 3
            assert row["flops"] > 0 and row["bytes"] > 0 and row["held_bytes"] > 0 and row["peak_bytes"] > 0
        else:
            assert row["median"] is None and not row["reason"].startswith(("red", "failed"))
    assert found["machine"]["threads"] == 1 and found["machine"]["commit"]
    assert found["machine"]["copy_bytes_per_s"] > 0 and found["machine"]["matmul_flops_per_s"] > 0


def test_every_report_is_written(smoke):
    header = (smoke / "results.csv").read_text().splitlines()[0]
    assert header.startswith("bench,case,mode,provider,")
    report = (smoke / "report.md").read_text()
    assert "| dense eager |" in report and "not shown: ours gram, triton" in report
    assert (smoke / "roofline.png").stat().st_size > 1000
    assert not [path for path in smoke.iterdir() if path.name.startswith(".")], "no temporary file is left"


def test_shapes_are_those_of_the_models():
    parameters = {name: sum(x.out * x.in_ * x.count for x in layers_of(name, "all")) for name in MODELS}
    # Linear parameters of the published models, embeddings and norms apart.
    assert parameters["LLaMA-3.1-8B"] == 6_979_321_856
    assert parameters["T5-large"] == 24 * 4 * 1024**2 + 24 * 8 * 1024**2 + 48 * 2 * 4096 * 1024
    assert len({case.name for case in LAYER_CASES}) == len(LAYER_CASES)
    assert len({case.name for case in MODEL_CASES}) == len(MODEL_CASES)
    assert all(mark.case in {case.name for case in (*LAYER_CASES, *MODEL_CASES)} for mark in MARKS)
    ranks = {size[2:4] for case in LAYER_CASES for size in case.sizes}
    assert min(r for r, _ in ranks) == 4 and max(r for r, _ in ranks) == 64
    assert min(k for _, k in ranks) == 0 and max(k for _, k in ranks) == 512
