"""All LoRA layers of one model in one call, by modules adapted."""

from __future__ import annotations

import pytest

from .providers import PROVIDERS
from .shapes import MODEL_CASES, Case

# Gradients added in place: what a training step does. The ways that are far behind in "both" are not timed twice.
_IN_PLACE = [name for name in PROVIDERS if name not in ("dense rebuilt", "ours stream, torch", "ours dense, torch")]

# Dense ways of these take seconds a call: `make bench` has time for one mode.
_LARGE = ("LLaMA-3.1-8B", "LLaMA-3.1-70B", "Qwen3-30B-A3B")


def _both(case: Case) -> Case:
    return case._replace(short=case.short and not case.name.startswith(_LARGE))


_CASES = [
    *((_both(case), "both", list(PROVIDERS)) for case in MODEL_CASES),
    *((case, "in-place", _IN_PLACE) for case in MODEL_CASES),
]


@pytest.mark.parametrize(
    ("case", "mode", "provider"),
    [pytest.param(case, mode, name, id=f"{case.name}-{mode}-{name}") for case, mode, names in _CASES for name in names],
)
def bench_model(case, mode, provider, measured, report):
    report(*measured("model", case, mode)[provider])
