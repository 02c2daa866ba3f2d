"""What a stream trains: a PEFT LoRA model that classifies texts, without a head per task.

An encoder scores a label by the cosine between the sentence's embedding and the label text's, both from the same
model. A decoder or encoder-decoder generates the label, and the text is matched. Both learn any number of tasks with
any labels in the same parameters, which is what a continual stream needs.
"""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch

from ella.tensorfile import digest

from .checks import MIN_LENGTH, check_count
from .tasks import Record, TextTask
from .texts import tokenizer_fingerprint

__all__ = ["EncodedTask", "TextClassifier", "evaluating", "positions_of"]


@dataclass(frozen=True)
class EncodedTask:
    """Tokenised records: ``tokens[i]`` the ids of record i, ``targets[i]`` its class index, ``labels`` the texts and
    ``label_tokens`` their ids."""

    tokens: list[list[int]]
    targets: list[int]
    labels: tuple[str, ...]
    label_tokens: list[list[int]]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def new_tokens(self) -> int:
        """Tokens written at most: the longest answer and one more, so that one that goes on is not taken for it."""
        return max(map(len, self.label_tokens)) + 1

    def stored(self, row: int) -> int:
        """How many numbers keep a record: its tokens and its class."""
        return len(self.tokens[row]) + 1

    def batches(self, batch_size: int, seed: int | None = None) -> Iterator[list[int]]:
        """Row indices in batches of like length. With a seed: shuffled, the same order for the same seed."""
        order = list(range(len(self)))
        if seed is None:
            order.sort(key=lambda i: len(self.tokens[i]))
            yield from (order[i : i + batch_size] for i in range(0, len(order), batch_size))
            return
        rng = random.Random(seed)
        rng.shuffle(order)
        # Sorted within windows of eight batches: little padding, and the order still changes with the seed.
        window = 8 * batch_size
        batches = []
        for start in range(0, len(order), window):
            chunk = sorted(order[start : start + window], key=lambda i: len(self.tokens[i]))
            batches += [chunk[i : i + batch_size] for i in range(0, len(chunk), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _own_settings(lora: Any) -> dict[str, Any]:
    """What a ``LoraConfig`` sets otherwise than PEFT does, of what shapes the adapter and is not named on its own."""
    plain = type(lora)()
    named = {"r", "lora_alpha", "lora_dropout", "target_modules"}
    # Where it is from and what it is used for.
    apart = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
    found = {f.name: getattr(lora, f.name) for f in fields(lora) if f.name not in named | apart}
    values = {name: value for name, value in found.items() if value != getattr(plain, name)}
    return json.loads(json.dumps(values, default=lambda value: sorted(value) if isinstance(value, set) else str(value)))


class TextClassifier(ABC):
    """A PEFT model, its tokenizer, and how the two classify text.

    Attributes: ``model`` (a ``PeftModel`` with one trainable LoRA adapter ``adapter_name``), ``tokenizer``,
    ``max_length`` (tokens a sentence may have), ``kind`` ("encoder", "causal" or "seq2seq"), ``keep_ends`` (whether a
    pair too long loses its middle, not its end; see :func:`~ella.continual.texts.cut`), ``positions`` (tokens the
    model has positions for; None where it does not say).
    """

    kind: str

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 128,
        adapter_name: str = "default",
        keep_ends: bool = True,
    ) -> None:
        from peft import PeftModel

        if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
            raise ValueError(f"expected a PeftModel with an adapter {adapter_name!r}; wrap it with peft.get_peft_model")
        check_count("max_length", max_length, 0)
        positions = positions_of(model, "encoder")
        if max_length < MIN_LENGTH or (positions is not None and max_length > positions):
            raise ValueError(
                f"max_length is {max_length}; expected {MIN_LENGTH} to the model's {positions or 'longest'} positions"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token
        rows = len(model.get_input_embeddings().weight)
        if tokenizer.pad_token_id >= rows:
            raise ValueError(
                f"the tokenizer pads with token {tokenizer.pad_token_id}, but the model has {rows} embeddings: set "
                "tokenizer.pad_token to one that it has, or call resize_token_embeddings before get_peft_model"
            )
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.adapter_name, self.keep_ends = max_length, adapter_name, keep_ends
        self.positions = positions

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @abstractmethod
    def encode(self, records: Sequence[Record], labels: Sequence[str]) -> EncodedTask:
        """Tokenise records once; what :meth:`loss` and :meth:`predict` read. Warns of sentences that are cut.

        Raises ValueError for labels that the tokenizer loses or does not keep apart, and for a record without tokens.
        """

    def encode_texts(self, task: TextTask, split: str) -> EncodedTask:
        """Tokenise a split of a task whose answers are free texts; raises ValueError unless the model writes texts."""
        raise ValueError(
            f"a model of kind {self.kind!r} classifies and writes no text, which metric {task.metric!r} scores; "
            "take a causal or seq2seq model"
        )

    @abstractmethod
    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        """Mean training loss over the given rows, a 0-dim tensor with a graph."""

    @abstractmethod
    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        """The class index of every record; -1 where a generated text matched no label.

        Raises ValueError where the model's scores are not finite.
        """

    def accuracy(self, task: EncodedTask, batch_size: int = 32) -> float:
        """Percent of records whose class is predicted, or the mean of a text task's metric in percent; in eval mode."""
        with evaluating(self.model):
            return self._score(task, batch_size)

    def _score(self, task: EncodedTask, batch_size: int) -> float:
        predicted = self.predict(task, batch_size)
        return 100.0 * sum(p == t for p, t in zip(predicted, task.targets, strict=True)) / len(task)

    def describe(self) -> dict[str, Any]:
        """Kind, backbone, fingerprints of its weights and tokenizer, and settings: what a saved run must agree on."""
        lora = self.model.peft_config[self.adapter_name]
        targets = lora.target_modules or ()
        base = [p for n, p in self.model.named_parameters() if "lora_" not in n]
        # Buffers too: some quantised layers keep their weights there.
        weights = {n: t for n, t in self.model.state_dict().items() if "lora_" not in n and torch.is_tensor(t)}
        return {
            "kind": self.kind,
            "model_type": getattr(self.model.config, "model_type", type(self.model).__name__),
            "base_parameters": sum(p.numel() for p in base),
            "base_dtype": str(base[0].dtype).removeprefix("torch."),
            "base_fingerprint": digest(weights)[:16],
            "tokenizer_fingerprint": tokenizer_fingerprint(self.tokenizer),
            "r": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "max_length": self.max_length,
            "keep_ends": self.keep_ends,
            "lora": _own_settings(lora),
        }

    def _checked(self, tokens: list[list[int]], texts: Sequence[str]) -> list[list[int]]:
        for i, (ids, text) in enumerate(zip(tokens, texts, strict=True)):
            if not ids:
                raise ValueError(
                    f"record {i}, {text!r}, has no tokens: the tokenizer makes none of it and adds none "
                    "of its own; leave the record out or give it a text"
                )
        return tokens

    def _refuse_unless(self, sound: torch.Tensor, task: EncodedTask, rows: Sequence[int]) -> None:
        """``sound[n]``: whether what the model gave for record ``rows[n]`` can be compared."""
        if not sound.all():
            i = rows[int((~sound).nonzero()[0])]
            raise ValueError(
                f"the model's scores are not finite for record {i}, {self.tokenizer.decode(task.tokens[i])!r}; its "
                "weights are broken, or too large for their dtype: train with a lower learning_rate, or in float32"
            )

    def _pad(self, sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
        width = max(len(s) for s in sequences)
        padding = [[value] * (width - len(s)) for s in sequences]
        rows = [p + list(s) if left else list(s) + p for s, p in zip(sequences, padding, strict=True)]
        return torch.tensor(rows, device=self.device)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode; every module is left in the mode that it was in."""
    # Module by module: a fresh PeftModel says it trains while the base inside it does not.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def positions_of(model: Any, side: str) -> int | None:
    """Tokens that the "encoder" or "decoder" has positions for; a model that is not both has one number."""
    config = model.config
    configs = [getattr(config, side, None), getattr(config, "text_config", None), config]
    names = (f"max_{side}_position_embeddings", "max_position_embeddings")
    found = (getattr(c, name, None) for c in configs for name in names)
    positions = next((n for n in found if isinstance(n, int) and n > 0), None)
    if positions is None:
        return None
    # RoBERTa's kind counts positions from the one after padding's.
    padding = (getattr(m, "padding_idx", None) for n, m in model.named_modules() if n.endswith("position_embeddings"))
    return positions - max((index + 1 for index in padding if index is not None), default=0)
