"""ELLA continual learning for PEFT models: LoRA that keeps away from what earlier tasks wrote.

>>> from ella import EllaConfig
>>> EllaConfig(ella_lambda=3e4).reduction
'sum'
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ella_kernels import __version__

if TYPE_CHECKING:
    from .config import EllaConfig
    from .export import ExportReport
    from .offline import export_state, fold_adapters
    from .past import FoldReport
    from .regularizer import EllaRegularizer
    from .shrinkage import interference, interference_bound, shrink, shrink_spectral
    from .trainer import EllaCallback, attach
    from .zero import with_penalty

# Names load on first use: `import ella` stays light, and the command line answers before PEFT is imported.
_HOME = {
    "EllaCallback": "trainer",
    "EllaConfig": "config",
    "EllaRegularizer": "regularizer",
    "ExportReport": "export",
    "FoldReport": "past",
    "attach": "trainer",
    "export_state": "offline",
    "fold_adapters": "offline",
    "interference": "shrinkage",
    "interference_bound": "shrinkage",
    "shrink": "shrinkage",
    "shrink_spectral": "shrinkage",
    "with_penalty": "zero",
}

__all__ = [
    "EllaCallback",
    "EllaConfig",
    "EllaRegularizer",
    "ExportReport",
    "FoldReport",
    "__version__",
    "attach",
    "export_state",
    "fold_adapters",
    "interference",
    "interference_bound",
    "shrink",
    "shrink_spectral",
    "with_penalty",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ella' has no attribute {name!r}; it has {__all__}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
