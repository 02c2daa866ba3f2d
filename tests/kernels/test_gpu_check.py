"""The GPU script on a machine without one: the dry run is its own code on tiny shapes, under the interpreter."""

from __future__ import annotations

import json

import pytest
import torch

from bench import gpu_check


def test_dry_run_checks_every_kernel_and_writes_no_times(tmp_path):
    output = tmp_path / "gpu.json"
    assert gpu_check.main(["--dry-run", "--output", str(output)]) == 0
    results = json.loads(output.read_text())
    assert results["dry_run"] is True and "rows" not in results and "machine" not in results
    assert {entry["algorithm"] for entry in results["kernels"]} == {"gram", "stream", "dense", "spectral"}
    for entry in results["kernels"]:
        assert entry["passed"] and 0 < entry["grad_error"] <= entry["bound"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_wrong_kernel_fails_the_check(monkeypatch):
    import ella_kernels as ek

    right = ek.add_hadamard_grad_

    def wrong(*args, **kwargs):
        return right(*args, **kwargs) * 1.1

    monkeypatch.setattr(ek, "add_hadamard_grad_", wrong)
    entry = gpu_check._check("cpu", gpu_check.TINY_SHAPES, "gram", "auto", torch.float32)
    assert not entry["passed"] and entry["value_error"] > 0.05


def test_without_a_gpu_nothing_is_written(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_check.main(["--output", str(tmp_path / "gpu.json")]) == 2
    assert "nothing is measured" in capsys.readouterr().out and not list(tmp_path.iterdir())


def test_workloads_are_those_of_the_plan():
    names = [case.name for case in gpu_check.cases()]
    assert len(names) == len(set(names)) == 15
    assert names[0] == "LLaMA-3.1-8B, q and v (64 layers) r8 k8"
    assert sum("+energy" in name for name in names) == 3
    assert set(gpu_check.PROVIDERS) <= set(__import__("bench.providers", fromlist=["PROVIDERS"]).PROVIDERS)
