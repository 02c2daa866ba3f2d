"""All LoRA layers of one model in one call, by modules adapted."""

from __future__ import annotations

import pytest

from .providers import PROVIDERS
from .shapes import MODEL_CASES

# Gradients added in place: what a training step does. The ways that are far behind in "both" are not timed twice.
_IN_PLACE = [name for name in PROVIDERS if name not in ("dense rebuilt", "ours stream, torch", "ours dense, torch")]

_CASES = [
    (case, mode, names) for case in MODEL_CASES for mode, names in (("both", list(PROVIDERS)), ("in-place", _IN_PLACE))
]


@pytest.mark.parametrize(
    ("case", "mode", "provider"),
    [pytest.param(case, mode, name, id=f"{case.name}-{mode}-{name}") for case, mode, names in _CASES for name in names],
)
def bench_model(case, mode, provider, measured, report):
    report(*measured("model", case, mode)[provider])
