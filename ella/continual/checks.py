"""What a setting may be, whether it comes from a file or from a caller."""

from __future__ import annotations

import math
import sys
from numbers import Integral, Real
from typing import Any

import torch

__all__ = ["check_count", "check_kind", "check_number", "check_temperature", "check_template", "float_dtype"]

MIN_LENGTH = 4
TEMPLATE = "{sentence}\nOptions: {options}\nAnswer:"
#: What a model is loaded with, by kind.
KINDS = {"encoder": "AutoModel", "causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ValueError unless ``value`` is an integer of at least ``least``."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; expected an integer of at least {least}")


def check_number(
    name: str, value: Any, *, least: float = -math.inf, above: float = -math.inf, below: float = math.inf
) -> None:
    """Raises ValueError unless ``value`` is a finite number within the bounds; those given are named."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    # Compared, not converted: a whole number may be beyond every float.
    if not number or not abs(value) <= sys.float_info.max or value < least or not above < value < below:
        bounds = (("of at least", least), ("above", above), ("below", below))
        told = " and ".join(f"{word} {bound:g}" for word, bound in bounds if math.isfinite(bound))
        raise ValueError(f"{name} is {value!r}; expected a finite number {told}".rstrip())


def check_kind(kind: str) -> None:
    """Raises ValueError unless ``kind`` is "auto" or one of :data:`KINDS`."""
    if kind not in ("auto", *KINDS):
        raise ValueError(f"unknown model kind {kind!r}; expected 'auto' or one of {sorted(KINDS)}")


def check_temperature(temperature: float) -> None:
    """Raises ValueError for a temperature under which cosines are no scores."""
    try:
        check_number("temperature", temperature, above=0)
    except ValueError:
        raise ValueError(f"temperature must be above 0, found {temperature!r}; expected a finite number") from None


def check_template(template: str | None) -> None:
    """Raises ValueError unless the sentence has one place in the prompt; None and "" stand for :data:`TEMPLATE`."""
    if template and (not isinstance(template, str) or template.count("{sentence}") != 1):
        raise ValueError(f"the prompt template needs the field {{sentence}} once, found {template!r}")


def float_dtype(name: str) -> torch.dtype:
    """The floating-point dtype of a name. Raises ValueError."""
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"unknown dtype {name!r}; expected e.g. 'float32' or 'bfloat16'")
    return dtype
