"""How far a generated text is the answer: metrics of one output each, in percent.

Those of TRACE (Wang et al. 2023, arXiv:2310.06762), as its code computes them where not said otherwise.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from statistics import fmean
from typing import Any

__all__ = ["METRICS", "check_metric", "edit_similarity", "rouge_l", "sari", "score"]

_WORDS = re.compile(r"\d+(?:[.,]\d+)+|\w+|[^\w\s]")
_LITERAL = re.compile(r"<(STR|NUM|CHAR)_LIT(?::(.*?))?>", re.DOTALL)


def check_metric(metric: str) -> None:
    """Raises ValueError for a metric that is none of :data:`METRICS`, ImportError where its package is missing."""
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; expected one of {sorted(METRICS)}")
    package = {"rouge-l": "rouge_score", "edit": "rapidfuzz"}.get(metric)
    if package:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"metric {metric!r} needs {package}, which is not installed: pip install 'ella-kernels[trace]'"
            ) from error


def score(metric: str, prompts: Sequence[str], outputs: Sequence[str], answers: Sequence[str]) -> float:
    """The mean of a metric over all outputs, in percent; spaces around outputs and answers do not count."""
    check_metric(metric)
    measure = METRICS[metric]
    return fmean(measure(p, o.strip(), a.strip()) for p, o, a in zip(prompts, outputs, answers, strict=True))


def rouge_l(output: str, answer: str) -> float:
    """F of the longest common subsequence of words (Lin 2004), of ``rouge-score``, without stemming."""
    return 100.0 * _rouge().score(answer, output)["rougeL"].fmeasure


def edit_similarity(output: str, answer: str) -> float:
    """``100 · (1 - insertions and deletions / characters of both)``, of code whose masked literals are filled in.

    ``<STR_LIT:text>`` is its text, ``<NUM_LIT>`` 0 and ``<STR_LIT>`` nothing, as in CodeXGLUE (Lu et al. 2021).
    """
    from rapidfuzz import fuzz

    return fuzz.ratio(_literals(output), _literals(answer))


def sari(source: str, output: str, references: Sequence[str]) -> float:
    """SARI of a simplified text: the mean of F_add, F_keep and P_delete, each the mean over n = 1..4 (Xu et al. 2016).

    As it is commonly computed (``evaluate``'s, which TRACE's numbers are of): the precisions of keeping and deleting
    are means over distinct n-grams, counts of source and output are multiplied by the number of references, what is
    added is counted once, and 0/0 is 1. Texts are in lower case, punctuation apart.

    >>> round(sari("the cat sat down", "the cat sat", ["the cat sat"]), 1)
    100.0
    """
    words = [_WORDS.findall(text.casefold()) for text in (source, output, *references)]
    parts = [part for n in range(1, 5) for part in _operations(*(_ngrams(text, n) for text in words))]
    return 100.0 * fmean(parts)


def _operations(source: Counter, output: Counter, *references: Counter) -> tuple[float, float, float]:
    """(F_keep, P_delete, F_add) of n-grams of one length."""
    wanted = sum(references, Counter())
    source, output = (Counter({gram: n * len(references) for gram, n in c.items()}) for c in (source, output))
    kept, to_keep, deleted = source & output, source & wanted, source - output
    rightly = kept & wanted
    keep = _f(_share(rightly, kept), sum(rightly.values()) / sum(to_keep.values()) if to_keep else 1.0)
    added, to_add = output.keys() - source.keys(), wanted.keys() - source.keys()
    right = added & to_add
    add = _f(len(right) / len(added) if added else 1.0, len(right) / len(to_add) if to_add else 1.0)
    return keep, _share(deleted - wanted, deleted), add


def _share(part: Mapping[Any, int], whole: Mapping[Any, int]) -> float:
    """The mean over distinct n-grams of how much of each is in ``part``."""
    return sum(n / whole[gram] for gram, n in part.items()) / len(whole) if whole else 1.0


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _ngrams(words: Sequence[str], n: int) -> Counter:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _literals(code: str) -> str:
    return _LITERAL.sub(lambda m: m[2] if m[2] is not None else "0" if m[1] == "NUM" else "", code)


@lru_cache(maxsize=1)
def _rouge() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


#: Metric -> percent of (prompt, output, answer). "choice" compares the first letter, "exact" the whole text.
METRICS: dict[str, Callable[[str, str, str], float]] = {
    "choice": lambda prompt, output, answer: 100.0 * (output[:1] == answer[:1]),
    "exact": lambda prompt, output, answer: 100.0 * (output == answer),
    "rouge-l": lambda prompt, output, answer: rouge_l(output, answer),
    "edit": lambda prompt, output, answer: edit_similarity(output, answer),
    "sari": lambda prompt, output, answer: sari(prompt, output, [answer]),
}
