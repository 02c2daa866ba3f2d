"""ELLA against the best other method, seed by seed, and in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..metrics import NAN
from ..stream import StreamResult
from .summary import METRIC_TITLES, by_arm, by_order, given_to, mean, spread, title_of

__all__ = ["OURS", "Comparison", "comparisons"]

#: The label of the arm that is compared with the others.
OURS = "ella"


@dataclass(frozen=True)
class Comparison:
    """Paired differences of ELLA and ``rival`` in ``metric``, in points: one per run of the same order and seed.

    ``mean`` is theirs, ``standard_error`` that of the mean (NaN for one pair); ``wins`` of ``pairs`` are above zero.
    ``orders`` is how many orders the pairs are of, ``runs`` how many runs ELLA has; ``ours`` is the form of ELLA.
    """

    metric: str
    rival: str
    mean: float
    standard_error: float
    wins: int
    pairs: int
    runs: int
    orders: int = 1
    ours: str = OURS

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What there is to say, whichever way it went.

        >>> Comparison("OA", "inclora", 5.3, 1.2, 3, 3, 3).sentence
        'By overall accuracy ELLA is 5.3 ± 1.2 points above IncLoRA, the best other method, ahead on 3 of 3 seeds.'
        """
        rival = f"{title_of(self.rival)}, the best other method"
        error = "" if math.isnan(self.standard_error) else f" ± {self.standard_error:.1f}"
        size, ours = f"{abs(self.mean):.1f}", title_of(self.ours)
        if size == "0.0":
            said = f"{ours} is level with {rival} (a difference of {size}{error} points)"
        else:
            said = f"{ours} is {size}{error} points {'above' if self.mean > 0 else 'below'} {rival}"
        unit = "seed" if self.orders == 1 else "run"
        if self.pairs == 1:
            count = f"{'ahead' if self.wins else 'not ahead'} on the one {unit}"
        else:
            count = f"ahead on {self.wins} of {self.pairs} {unit}s"
        if self.pairs < self.runs:
            count += " that both have"
        # Few seeds make no test; but a difference of the size of its own error should not be read as one.
        if self.pairs > 1 and abs(self.mean) < 2 * self.standard_error:
            count += "; this difference is less than two standard errors"
        return f"By {METRIC_TITLES[self.metric]} {said}, {count}."


def comparisons(results: Sequence[StreamResult]) -> list[Comparison]:
    """By overall accuracy and by backward transfer, where both arms have them; over all orders in ``results``.

    The rival is the method with the best mean, over orders where there are several; ELLA under other settings is none,
    nor is a method that is given more than a stream gives. ELLA with a penalty of its own is compared too.
    """
    ours = [OURS, *(arm for arm, runs in by_arm(results).items() if arm != OURS and _has_own_penalty(runs[0]))]
    return [
        found for arm in ours for metric in ("OA", "BWT") if (found := _comparison(results, arm, metric)) is not None
    ]


def _has_own_penalty(run: StreamResult) -> bool:
    settings = {**run.config.get("ella", {}), **run.config.get("settings", {})}
    return run.config["arm"] == OURS and settings.get("penalty", "hadamard") != "hadamard"


def _comparison(results: Sequence[StreamResult], ours: str, metric: str) -> Comparison | None:
    orders = list(by_order(results))
    scores = {arm: _scores(runs, metric) for arm, runs in by_arm(results).items()}
    mine = scores.get(ours, {})
    rivals = {
        arm: level
        for arm, runs in by_arm(results).items()
        if runs[0].config["arm"] != OURS and not given_to(runs[0]) and mine.keys() & scores[arm].keys()
        if not math.isnan(level := _level(scores[arm], orders))
    }
    if not rivals:
        return None
    rival = max(rivals, key=lambda arm: rivals[arm])
    pairs = [key for key in mine if key in scores[rival]]
    differences = [mine[key] - scores[rival][key] for key in pairs]
    error = spread(differences) / math.sqrt(len(differences)) if len(differences) > 1 else NAN
    return Comparison(
        metric=metric,
        rival=rival,
        mean=mean(differences),
        standard_error=error,
        wins=sum(d > 0 for d in differences),
        pairs=len(differences),
        runs=len(mine),
        orders=len(orders),
        ours=ours,
    )


def _scores(runs: Sequence[StreamResult], metric: str) -> dict[tuple[str, int], float]:
    done = ((r.config.get("order", ""), r.seed, r.matrix.summary()[metric]) for r in runs if r.matrix.complete)
    return {(order, seed): value for order, seed, value in done if not math.isnan(value)}


def _level(scores: dict[tuple[str, int], float], orders: Sequence[str]) -> float:
    """The mean over orders of the mean over seeds; NaN where an order is missing."""
    return mean([mean([v for (o, _), v in scores.items() if o == order]) for order in orders])
