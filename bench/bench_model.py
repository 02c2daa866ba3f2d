"""All LoRA layers of one model in one call, by modules adapted."""

from __future__ import annotations

import pytest

from .providers import PROVIDERS
from .shapes import MODEL_CASES

_CASES = [(case, mode) for case in MODEL_CASES for mode in ("both", "in-place")]


@pytest.mark.parametrize(
    ("case", "mode", "provider"),
    [pytest.param(*pair, name, id=f"{pair[0].name}-{pair[1]}-{name}") for pair in _CASES for name in PROVIDERS],
)
def bench_model(case, mode, provider, measured, report):
    report(*measured("model", case, mode)[provider])
