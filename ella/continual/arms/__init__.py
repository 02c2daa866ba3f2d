"""The methods of a stream, by name. Each is a class that says which paper it is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from ella.config import EllaConfig

from .base import Arm, Batch, FoldingArm, task_seed
from .ella import Ella
from .ewc import Ewc
from .lines import Lines
from .nlora import NLora
from .olora import OLora
from .osf import Osf
from .plain import IncLora, Joint, Separate, SeqLora
from .replay import Replay
from .slao import Slao

__all__ = ["ARMS", "Arm", "Batch", "FoldingArm", "arm_class", "arm_settings", "task_seed"]

ARMS: dict[str, type[Arm]] = {
    "seqlora": SeqLora,
    "inclora": IncLora,
    "ella": Ella,
    "olora": OLora,
    "nlora": NLora,
    "lines": Lines,
    "ewc": Ewc,
    "slao": Slao,
    "osf": Osf,
    "replay": Replay,
    "alone": Separate,
    "joint": Joint,
}
#: Names of version 0.1.
OLD_NAMES = {"one": "seqlora", "fresh": "inclora"}


def arm_class(name: str) -> type[Arm]:
    """Raises ValueError for a name that no method has."""
    found = ARMS.get(OLD_NAMES.get(name, name))
    if found is None:
        raise ValueError(f"arm is {name!r}; expected one of {list(ARMS)}")
    return found


def arm_settings(name: str, values: Mapping[str, Any], ella: EllaConfig) -> tuple[Any, EllaConfig]:
    """What ``values`` set of a method: its own ``Settings``, and ``ella`` with the fields that the method reads.

    Raises:
        TypeError, ValueError: naming the setting, what was found and what was expected.
    """
    kind = arm_class(name)
    own = {f.name for f in fields(kind.Settings)}
    unknown = sorted(map(str, values.keys() - own - set(kind.ella_fields)))
    if unknown:
        raise ValueError(f"arm {name!r} has no settings {unknown}; known are {sorted(own | set(kind.ella_fields))}")
    settings = kind.Settings(**{key: value for key, value in values.items() if key in own})
    ella = replace(ella, **{key: value for key, value in values.items() if key not in own})
    kind.check(ella)
    return settings, ella
