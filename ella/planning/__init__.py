"""``ella plan``: bytes, operations, collectives and time of training with ELLA, from a model's configuration alone.

:mod:`shapes` builds the model on the meta device and lets PEFT adapt it, :mod:`memory` and :mod:`work` hold the
formulae (docs/scaling.md), :mod:`gpus` the rates, :mod:`describe` the table that the command prints.
"""

from __future__ import annotations

from .gpus import GPUS, Gpu
from .memory import ENGINES, Memory
from .plan import Plan, make_plan, plan_shapes
from .presets import PRESETS
from .shapes import ModelShapes, model_shapes
from .work import Collective, Operations, Times

__all__ = [
    "ENGINES", "GPUS", "PRESETS", "Collective", "Gpu", "Memory", "ModelShapes", "Operations", "Plan", "Times",
    "make_plan", "model_shapes", "plan_shapes",
]  # fmt: skip
