"""One layer: value, gradients, both, and gradients added in place."""

from __future__ import annotations

import pytest

from .headline import MARKS
from .headline import MODES as GRADIENT_MODES
from .providers import MODES, PROVIDERS
from .shapes import LAYER_CASES

# Forward, backward and in-place alone are shown where they differ in kind: gram and stream of one weight.
_ALL_MODES = {"LLaMA-3.1-8B q 4096x4096 r8 k8", "LLaMA-3.1-8B q 4096x4096 r8 k120"}

_MARKED = {mark.case for mark in MARKS}

_CASES = [
    (case, mode)
    for case in LAYER_CASES
    for mode in MODES
    if mode == "both" or case.name in _ALL_MODES or (case.name in _MARKED and mode in GRADIENT_MODES)
]


@pytest.mark.parametrize(
    ("case", "mode", "provider"),
    [pytest.param(*pair, name, id=f"{pair[0].name}-{pair[1]}-{name}") for pair in _CASES for name in PROVIDERS],
)
def bench_layer(case, mode, provider, measured, report):
    report(*measured("layer", case, mode)[provider])
