"""A past that the forward or the backward gets wrong is red in the bench of the whole step; a right one is green."""

import pytest
import torch

from bench import bench_past, readme
from bench.bench_past import BOTH, CASES, EVERYTHING, FORWARD, KEEPS, PENALTY, Added, PastCase, Trained, measure_past
from bench.bench_step import StepCase, base_model
from ella import acting

from .test_compare import results
from .test_gates import LIMITS

# 32 rows are more than the 16 + 8 ranks after two tasks: factors are joined, as in the full cases.
TINY = PastCase(StepCase("tiny", 32, 64, 2, 4, 64, 2, 16, 2), "all-linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", bench_past.TARGETS)
def test_every_row_is_green_and_has_its_ratios(dtype, targets):
    found = measure_past(TINY._replace(dtype=dtype, targets=targets), LIMITS)
    ours = {(f"ours, {keep}", mode) for keep in KEEPS for mode in (FORWARD, BOTH, PENALTY, EVERYTHING)}
    others = {(name, mode) for name in (bench_past.PLAIN, bench_past.ADDED) for mode in (FORWARD, BOTH)}
    assert found.keys() == ours | others
    for (provider, mode), (row, samples) in found.items():
        assert row.green and samples is not None and row.p20 <= row.median <= row.p80, (provider, mode, row.reason)
        assert (row.error > 0) == (provider != bench_past.ADDED)
        assert row.gate == (5e-2 if dtype == torch.bfloat16 and mode != PENALTY and row.error else 1e-5)
        assert ("over_plain" in row.extra) == (provider != bench_past.ADDED and mode != PENALTY)
        assert ("over_plain_and_added" in row.extra) == (provider == "ours, adapter" and mode in (FORWARD, BOTH))
        assert ("backward_seconds" in row.extra) == (mode == BOTH)
        assert ("merge_error" in row.extra) == (provider == "ours, merge")


def _without_knowledge(module, result, x, adapters):
    return result + module.lora_B[adapters[-1]](module.lora_A[adapters[-1]](x)) * module.scaling[adapters[-1]]


def _without_its_gradient(original):
    def add_updates(module, result, x, adapters):
        detached = original(module, result.detach(), x.detach(), adapters[:1])
        return detached + result - result.detach() + _without_knowledge(module, torch.zeros_like(result), x, adapters)

    return add_updates


@pytest.mark.parametrize("wrong", ["knowledge", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_past_is_red_and_shows_no_speed(monkeypatch, wrong, dtype):
    function = _without_knowledge if wrong == "knowledge" else _without_its_gradient(acting.add_updates)
    monkeypatch.setattr(acting, "add_updates", function)
    found = measure_past(TINY._replace(dtype=dtype), LIMITS)
    red = {key for key, (row, _) in found.items() if not row.green}
    expected = {("ours, adapter", mode) for mode in (FORWARD, BOTH, EVERYTHING)}
    assert red == (expected if wrong == "knowledge" else expected - {("ours, adapter", FORWARD)})
    for key in red:
        row, samples = found[key]
        assert row.reason.startswith("red") and samples is None and row.median is None and not row.extra


def test_the_added_products_are_those_of_the_adapted_layers():
    torch.manual_seed(0)
    trained = Trained(base_model(TINY.model), TINY, "adapter", "cpu")
    added = Added(trained)
    k, rows = 16, 32
    shapes = [tuple(layer.shape) for layer in trained.reg.layers]
    assert [(b.shape[1], a.shape[0]) for _, _, a, b in added.forwards] == shapes and len(shapes) == 14
    assert all(x.shape == (rows, a.shape[0]) and a.shape[1] == k for _, x, a, _ in added.forwards)
    # The embedding is frozen: what the first block's q, k and v read has no gradient.
    assert len(added.backwards) == len(shapes) - 3
    before = added.forwards[0][0].clone()
    added.both()
    assert not torch.equal(added.forwards[0][0], before)


def test_the_readme_shows_six_rows_of_one_case_each():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) == 12 and len(readme.WHOLE_STEP) == 6
    for end, keep in readme.WHOLE_STEP:
        assert len([name for name in names if name.endswith(end)]) == 1 and keep in KEEPS
    found = measure_past(TINY._replace(model=TINY.model._replace(tasks=1)), LIMITS)
    text = readme.summary(None, None, results(*(row for row, _ in found.values())))
    assert (
        text.count("| tiny, 2x16 tokens, all-linear, fp32, r8 k8, adapter |") == 1
        and "The whole step on a CPU (`pytest" in text
    )
