"""Text to tokens for a classifier: labels that stay apart, sentences cut to length, both with what is lost said."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

__all__ = [
    "check_answers", "check_labels", "cut", "cuts_together", "ids_of", "normal", "specials", "tokenizer_fingerprint",
]  # fmt: skip

# Names that the parts of a pair go by, e.g. "premise: ... hypothesis: ..." or "sentence 1: ... sentence 2: ...".
_PART = re.compile(
    r"\b((?:premise|hypothesis|sentence|question|query|answer|passage|paragraph|context|document|claim|evidence)"
    r"(?: ?[12ab])?|text ?[12ab])\s*:",
    re.IGNORECASE,
)


def ids_of(tokenizer: Any, texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Token ids of whole texts, nothing cut."""
    return tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]


def specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text (bos, a closing eos), found by asking it once."""
    inner, whole = ids_of(tokenizer, ["a"])[0], ids_of(tokenizer, ["a"], special=True)[0]
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []


def normal(text: str) -> str:
    """The text by which a generated label is recognised: without case, closing punctuation and extra spaces."""
    words = " ".join(text.casefold().split())
    return words.rstrip(" .,;:!?") or words


def check_labels(
    tokenizer: Any, labels: Sequence[str], tokens: Sequence[Sequence[int]], room: int | None = None, limit: str = ""
) -> None:
    """Refuse labels that are lost on the way to the model: empty, unknown, cut, or the same as another.

    Args:
        tokens: the labels' ids, without special ones.
        room: how many of them a label may have; None where nothing limits them.
        limit: what sets ``room`` and what to do about it, in words.

    Raises:
        ValueError: naming the labels, why, and what to do.
    """
    pairs = list(zip(labels, tokens, strict=True))
    empty = [label for label, ids in pairs if not ids or not label.strip()]
    if empty:
        raise ValueError(f"labels {empty} are empty to the tokenizer: it drops their characters; reword them")
    unknown = [label for label, ids in pairs if tokenizer.unk_token_id in ids]
    if unknown:
        raise ValueError(
            f"labels {unknown} hold characters that the tokenizer does not know "
            f"({tokenizer.unk_token}); reword them or take a model whose vocabulary has them"
        )
    long = {label: len(ids) for label, ids in pairs if room is not None and len(ids) > room}
    if long:
        raise ValueError(f"labels would be cut: tokens of each {long}, room for {room}; {limit}")
    same: dict[tuple[int, ...], list[str]] = {}
    for label, ids in pairs:
        same.setdefault(tuple(ids), []).append(label)
    alike = [group for group in same.values() if len(group) > 1]
    if alike:
        raise ValueError(
            f"labels become the same tokens, so the model cannot tell them apart: {alike}; reword them "
            "(this tokenizer does not keep what they differ in: case, accents or spaces)"
        )


def check_answers(labels: Sequence[str], texts: Sequence[str]) -> None:
    """Refuse labels that a generator cannot answer with: ``texts`` are what their tokens are read back as.

    Raises:
        ValueError: naming the labels and their texts.
    """
    changed = {label: text for label, text in zip(labels, texts, strict=True) if _core(text) != _core(label)}
    if changed:
        raise ValueError(f"labels are not what their tokens are read back as, {changed}; reword them")
    same: dict[str, list[str]] = {}
    for label, text in zip(labels, texts, strict=True):
        same.setdefault(normal(text), []).append(label)
    alike = [group for group in same.values() if len(group) > 1]
    if alike:
        raise ValueError(f"labels must differ by more than case, spaces and closing punctuation: {alike}")


def _core(text: str) -> str:
    """A text without what tokenizers commonly change: case, accents, compatibility forms, spaces, controls."""
    folded = unicodedata.normalize("NFKD", text.casefold())
    return "".join(c for c in folded if unicodedata.category(c)[0] not in "CMZ")


def cut(
    tokenizer: Any,
    sentences: Sequence[str],
    room: int,
    max_length: int,
    keep_ends: bool,
    kind: Literal["sentences", "prompts"] = "sentences",
) -> list[list[int]]:
    """Ids of the sentences, each at most ``room``; one warning with the share of those that were longer.

    A long sentence loses its end (its start, where the tokenizer's ``truncation_side`` is "left"). With ``keep_ends``
    a pair loses its middle instead: both the start of its first part and the end of its last are read. A sentence is a
    pair if it names two parts ("premise:" and "hypothesis:", "sentence 1:" and "sentence 2:", "question:" and
    "passage:", ...) or holds the tokenizer's separator. Of a prompt, whose end says what is asked, the middle is lost
    with ``keep_ends``, the start without.
    """
    tokens = ids_of(tokenizer, sentences)
    long = [i for i, ids in enumerate(tokens) if len(ids) > room]
    prompts = kind == "prompts"
    pairs = {i for i in long if keep_ends and (prompts or _is_pair(sentences[i], tokenizer.sep_token))}
    for i in long:
        ids = tokens[i]
        end = room // 2 if i in pairs else room if prompts or tokenizer.truncation_side == "left" else 0
        tokens[i] = ids[: room - end] + ids[len(ids) - end :]
    _tell((kind, room, max_length), (len(long), len(tokens), 0 if prompts else len(pairs)))
    return tokens


_Limits = tuple[str, int, int]
_Counts = tuple[int, int, int]
# While cuts are told together: what was cut so far, of all, and of pairs, by kind, room and max_length.
_together: ContextVar[dict[_Limits, list[_Counts]] | None] = ContextVar("together", default=None)


@contextmanager
def cuts_together() -> Iterator[None]:
    """What is cut within is told once, after it, with all that was read."""
    found: dict[_Limits, list[_Counts]] = {}
    before = _together.set(found)
    try:
        yield
    finally:
        _together.reset(before)
    for limits, counts in found.items():
        long, of, pairs = map(sum, zip(*counts, strict=True))
        _tell(limits, (long, of, pairs))


def _tell(limits: _Limits, counts: _Counts) -> None:
    (kind, room, max_length), (long, of, pairs) = limits, counts
    together = _together.get()
    if together is not None:
        together.setdefault(limits, []).append(counts)
    elif long:
        of_pairs = f"; {pairs} that are pairs lost their middle" if pairs else ""
        warnings.warn(
            f"{long} of {of} {kind} ({100 * long / of:.0f} %) are longer than the {room} tokens that "
            f"max_length {max_length} and the model leave them and were cut{of_pairs}; "
            "a higher max_length, where the model has positions for it, reads more of them",
            stacklevel=4,
        )


def _is_pair(sentence: str, separator: str | None) -> bool:
    named = {re.sub(r"\s", "", part.casefold()) for part in _PART.findall(sentence)}
    return len(named) > 1 or bool(separator and separator in sentence)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of all that decides a text's tokens: the vocabulary, its rules, and which tokens are special."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = (
        json.loads(backend.to_str()) if backend is not None else {"vocabulary": sorted(tokenizer.get_vocab().items())}
    )
    # Set by whoever called last.
    own = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    told = [own, tokenizer.special_tokens_map, tokenizer.truncation_side]
    return hashlib.sha256(json.dumps(told, default=str).encode()).hexdigest()[:16]
