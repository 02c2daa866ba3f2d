"""A wrong way to compute the penalty is red and shows no speed; a right one is green and does."""

from dataclasses import replace

import pytest
import torch

import ella_kernels as ek
from bench import rows as rows_module
from bench.bench_fold import tail_error
from bench.bench_step import BASELINE as STEP_BASELINE
from bench.bench_step import CASES, Trained, Way
from bench.bench_truncation import quality, random_layers
from bench.providers import BASELINE, MODES, PROVIDERS
from bench.report import markdown
from bench.rows import Limits, Row, measure_calls, measure_case
from bench.shapes import Case, Size

LIMITS = Limits(budget=0.0, call_seconds=60.0, copy_rate=1e10, matmul_rate=1e11)
CASE = Case("mixed", (Size(40, 24, 3, 2), Size(16, 30, 2, 0, energy=True), Size(40, 24, 3, 2)))
# torch.compile takes seconds and is not ours to test.
NAMES = [name for name in PROVIDERS if name != "dense compiled"]
MACHINE = {
    "name": "test", "cores": 1, "threads": 1, "copy_bytes_per_s": 1e9, "matmul_flops_per_s": 1e9, "torch": "0",
    "python": "0", "commit": "0", "date": "2000-01-01", "load_before": 0.0, "precision": "fp32",
}  # fmt: skip


def _matrix_product(group, held):
    """The mistake a public implementation makes: ``‖ΔW W_pastᵀ‖²``."""
    return torch.stack(
        [
            (s * b @ a @ w.T).square().sum()
            for a, b, w, s in zip(group.lora_As, group.lora_Bs, held, group.scalings, strict=True)
        ]
    )


def _first_layer_only(group, held):
    values = PROVIDERS[BASELINE].penalties(group, held)
    return torch.cat([values[:1], values[1:].detach()])


def _not_finite(group, held):
    return PROVIDERS[BASELINE].penalties(group, held) * float("nan")


def _raises(group, held):
    raise RuntimeError("no kernel for this size")


@pytest.mark.parametrize("mode", MODES)
def test_every_provider_that_runs_here_is_green(mode):
    found = measure_case("layer", CASE, mode, NAMES, LIMITS)
    for name, (row, samples) in found.items():
        if PROVIDERS[name].refuses("cpu"):
            assert row.median is None and row.reason
        else:
            assert row.green, (name, row.reason)
            assert samples is not None and row.median > 0 and row.p20 <= row.median <= row.p80
            assert row.checked == (2 if PROVIDERS[name].penalty == "spectral" else 3) and row.ratio > 0


@pytest.mark.parametrize(
    ("wrong", "start"),
    [(_matrix_product, "red"), (_first_layer_only, "red"), (_not_finite, "red"), (_raises, "failed")],
)
def test_a_wrong_provider_is_red_and_shows_no_speed(monkeypatch, wrong, start):
    case = Case("alike", (Size(24, 24, 3, 2),) * 2)
    monkeypatch.setitem(PROVIDERS, "wrong", replace(PROVIDERS[BASELINE], name="wrong", penalties=wrong))
    found = measure_case("layer", case, "both", [BASELINE, "wrong"], LIMITS)
    row, samples = found["wrong"]
    assert row.reason.startswith(start) and row.failed and not row.green
    assert samples is None and row.median is None and row.ratio is None and row.roofline is None
    assert found[BASELINE][0].green, "the others keep their numbers"
    text = markdown({"machine": MACHINE, "rows": [r.as_dict() for r, _ in found.values()]})
    assert f"- not shown: wrong – {start}" in text and "| wrong |" not in text


def test_a_case_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(rows_module, "free_bytes", lambda device: 2**20)
    row, samples = measure_case("layer", Case("big", (Size(1024, 1024, 4, 4),)), "both", [BASELINE], LIMITS)[BASELINE]
    assert samples is None and "would need" in row.reason and not row.failed


def test_a_call_predicted_too_slow_is_skipped_with_the_prediction():
    row, samples = measure_case("layer", CASE, "both", [BASELINE], LIMITS._replace(call_seconds=1e-9))[BASELINE]
    assert samples is None and "at least" in row.reason and not row.failed


def test_rows_without_a_measured_error_are_not_timed():
    row = Row("fold", "case", "", "unchecked", gate=1e-5, error=1e-3)
    found = measure_calls({"unchecked": row}, {"unchecked": lambda: pytest.fail("timed")}, LIMITS)
    assert found["unchecked"][1] is None and row.failed


def test_counted_state_is_the_state_that_is_held():
    size = CASE.sizes[0]
    group = rows_module.make_group([size, CASE.sizes[1]])
    for entry in PROVIDERS.values():
        if entry.refuses("cpu") or entry.penalty == "spectral":
            continue
        for past, layer in zip(group.pasts, group.sizes, strict=True):
            held = entry.hold(past)
            tensors = [held] if isinstance(held, torch.Tensor) else [t for t in held if t is not None]
            assert sum(4 * t.numel() for t in tensors) == entry.held_bytes(layer), entry.name


def test_a_wrong_fold_is_seen():
    gen = torch.Generator().manual_seed(0)
    left, right = torch.randn(30, 8, generator=gen), torch.randn(8, 20, generator=gen)
    best = ek.truncate(left, right, 5)
    assert tail_error(left, right, best) < 1e-6
    assert tail_error(left, right, ek.LowRank(left[:, :5], right[:5])) > 1e-2
    assert tail_error(left, right, ek.LowRank(left, right)) < 1e-6


def test_a_wrong_penalty_in_a_training_step_is_seen():
    trained = Trained(CASES[0], "cpu")
    ways = trained.ways()
    for label in (STEP_BASELINE, "dense rebuilt", "ours loss term", "ours added to .grad"):
        assert trained.error(ways[label]) < 1e-5, label
    assert trained.error(ways["ours spectral, added to .grad"]) < 1e-5
    assert trained.error(Way(0, term=lambda: 4 * trained.reg.penalty())) > 1
    assert trained.error(Way(0, add_=lambda: trained.reg.add_gradient_(scale=1.01))) > 5e-3


def test_truncation_is_exact_at_full_rank_and_energies_repair_the_value():
    layers = random_layers(tasks=4, rank=4, width=64)
    whole, error = quality(layers, 16, energies=False)
    assert whole["value_error"] < 1e-6 and whole["gradient_error"] < 1e-6 and error < 1e-5
    alone, _ = quality(layers, 4, energies=False)
    repaired, error = quality(layers, 4, energies=True)
    assert repaired["value_error"] < 0.25 * alone["value_error"] and error < 1e-5
    assert repaired["bytes"] == alone["bytes"] + 4 * (64 + 64)
