"""Settings that are numbers, checked in one wording."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

__all__ = ["check_count", "check_number"]


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def check_number(name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf):
    """Raises ValueError unless ``value`` is a finite number within the bounds; those given are named."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    # Compared, not converted: a whole number may be beyond every float.
    if not number or not abs(value) <= sys.float_info.max or value < least or not above < value < below:
        bounds = (("of at least", least), ("above", above), ("below", below))
        told = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        raise ValueError(f"{name} is {value!r}; expected a finite number {told}".rstrip())
