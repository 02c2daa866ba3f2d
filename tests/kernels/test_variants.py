"""Rows of the tile table that are switched without editing code."""

from __future__ import annotations

import pytest
import torch

import ella_kernels as ek
from ella_kernels.triton_backend import tiles
from tests.kernels.cases import BOUND, exact, factors, relative_error


@pytest.mark.parametrize("name", list(tiles.VARIANTS))
def test_a_variant_is_a_row_while_it_lasts_and_computes_the_same(name):
    algorithm, changes = tiles.VARIANTS[name]
    row_of = {"gram": tiles.gram_tile, "stream": tiles.stream_tile}[algorithm]
    a, b, past = factors(160, 96, 8, 8)
    expected = exact(a, b, past, 1.5)
    grads = torch.zeros_like(a), torch.zeros_like(b)

    def run():
        for grad in grads:
            grad.zero_()
        options = {"algorithm": algorithm, "backend": "triton", "weight": 1.0}
        value = ek.add_hadamard_grad_([a], [b], [past], [1.5], [grads[0]], [grads[1]], **options)
        for found, want in zip((value[0], *grads), expected, strict=True):
            assert relative_error(found, want) < BOUND[torch.float32]

    row = row_of("sm_90", "tf32x3")
    run()
    with tiles.variant(name):
        changed = row_of("sm_90", "tf32x3")
        assert {field: getattr(changed, field) for field in changes} == changes and changed != row
        run()
    assert row_of("sm_90", "tf32x3") == row
    run()


def test_an_unknown_variant_is_named():
    with pytest.raises(ValueError, match=r"variant must be one of .* found 'warp drive'"), tiles.variant("warp drive"):
        pass
