"""Quantiles, interleaving, peak memory and the float64 reference of the suite."""

import pytest
import torch

import ella_kernels as ek
from bench.measure import Samples, exact, interleave, peak_bytes, relative_error


def test_quantiles_interpolate_between_order_statistics():
    samples = Samples([4.0, 1.0, 3.0, 2.0, 5.0])
    assert samples.median == 3.0
    assert samples.quantile(0.0) == 1.0 and samples.quantile(1.0) == 5.0
    assert samples.quantile(0.2) == pytest.approx(1.8) and samples.quantile(0.8) == pytest.approx(4.2)
    assert Samples([7.0]).quantile(0.8) == 7.0


def test_a_ratio_is_formed_inside_rounds():
    # The second round was slow for both: the ratio stays 2 in every round, that of the medians would not.
    slow, fast = Samples([2.0, 20.0, 2.0]), Samples([1.0, 10.0, 1.0])
    assert fast.ratio(slow).seconds == [2.0, 2.0, 2.0]


def test_candidates_take_turns_and_rotate_their_operands():
    seen = []
    calls = {name: [lambda n=name, i=i: seen.append((n, i)) for i in range(2)] for name in ("a", "b")}
    found = interleave(calls, budget=0.0, rounds=(4, 4), sample=0.0)
    assert [len(samples.seconds) for samples in found.values()] == [4, 4]
    timed = seen[4:]  # after one warm-up and one estimating call each
    assert {name for name, _ in timed[:2]} == {name for name, _ in timed[2:4]} == {"a", "b"}
    assert timed[0][0] != timed[2][0], "the order alternates from round to round"
    assert {i for name, i in timed if name == "a"} == {0, 1}


def test_peak_bytes_counts_what_is_alive_at_once():
    n = 2**18
    one_alive = peak_bytes(lambda: [torch.zeros(n).sum() for _ in range(4)])
    four_alive = peak_bytes(lambda: [torch.zeros(n) for _ in range(4)])
    assert 4 * n <= one_alive < 2 * 4 * n
    assert 4 * 4 * n <= four_alive < 5 * 4 * n


@pytest.mark.parametrize("energy", [False, True])
@pytest.mark.parametrize("penalty", ["hadamard", "spectral"])
def test_the_blockwise_reference_is_the_whole_one(penalty, energy):
    gen = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((3, 20), (50, 3)))
    left, right = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((50, 9), (9, 20)))
    past = ek.truncate(left, right, 4) if energy else ek.LowRank(left, right)
    value = getattr(ek.reference, f"{penalty}_penalty")(a, b, past, 1.5)
    grads = getattr(ek.reference, f"{penalty}_grad")(a, b, past, 1.5)
    for found, expected in zip(exact(a, b, past, 1.5, penalty, rows=16), (value, *grads), strict=True):
        assert relative_error(found, expected) < 1e-13


def test_what_is_no_number_is_infinitely_wrong():
    assert relative_error(torch.tensor([1.0, float("nan")]), torch.ones(2, dtype=torch.float64)) == float("inf")


def test_a_zero_reference_proves_nothing():
    with pytest.raises(ValueError, match="reference is zero"):
        relative_error(torch.zeros(3), torch.zeros(3, dtype=torch.float64))
