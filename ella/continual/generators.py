"""Language models that write the answer: a class label, or a free text that a metric scores."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .checks import TEMPLATE, check_template
from .classifier import EncodedTask, TextClassifier, positions_of
from .scores import check_metric, score
from .tasks import Record, TextTask
from .texts import check_answers, check_labels, cut, ids_of, normal, specials

__all__ = ["EncodedTexts", "LabelGenerator"]

IGNORED = -100


@dataclass(frozen=True)
class EncodedTexts(EncodedTask):
    """Tokenised prompts and answers: the distinct answers of the split are its classes, as they follow the prompt.

    ``prompts`` are the texts of the records, ``metric`` scores what is written, ``bound`` tokens at most.
    """

    prompts: tuple[str, ...]
    metric: str
    bound: int

    @property
    def new_tokens(self) -> int:
        return self.bound

    def stored(self, row: int) -> int:
        return len(self.tokens[row]) + len(self.label_tokens[self.targets[row]])


class LabelGenerator(TextClassifier):
    """A causal or sequence-to-sequence language model that writes the label.

    The prompt is the sentence and its options; the loss is on the label's tokens only; a prediction is greedy and
    counts when it equals a label up to case, spaces and closing punctuation. Long sentences are cut, options never;
    a decoder's also so far that prompt and answer have positions together.

    Of a :class:`~ella.continual.tasks.TextTask` the prompt is the record's own, whatever the template, and what is
    written is scored by the task's metric.
    """

    def __init__(self, model: Any, tokenizer: Any, *, template: str | None = None, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.seq2seq = bool(getattr(model.config, "is_encoder_decoder", False))
        self.kind = "seq2seq" if self.seq2seq else "causal"
        check_template(template)
        self.template = template or TEMPLATE
        if tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has no eos token, so a generated label would not end; set one")

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"template": self.template}

    def encode(self, records: Sequence[Record], labels: Sequence[str]) -> EncodedTask:
        index = {label: i for i, label in enumerate(labels)}
        label_tokens = self._answers(labels)
        options = ", ".join(labels)
        parts = [part.replace("{options}", options) for part in self.template.split("{sentence}")]
        head_ids, tail_ids = ids_of(self.tokenizer, parts)
        front, back = specials(self.tokenizer)
        # A decoder's prompt is continued: a closing eos would end it before the answer.
        before, after = front + head_ids, tail_ids + (back if self.seq2seq else [])
        room = self._room(
            len(before) + len(after),
            f"{len(labels)} options",
            max(map(len, label_tokens)) + 1,
            "shorten the labels or the template",
        )
        sentences = cut(self.tokenizer, [r["sentence"] for r in records], room, self.max_length, self.keep_ends)
        return EncodedTask(
            self._checked([before + ids + after for ids in sentences], [r["sentence"] for r in records]),
            [index[record["label"]] for record in records],
            tuple(labels),
            label_tokens,
        )

    def _answers(self, labels: Sequence[str]) -> list[list[int]]:
        # A causal answer continues "Answer:", hence the space before it.
        answers = ids_of(self.tokenizer, [label if self.seq2seq else f" {label}" for label in labels])
        positions = self._decoder_positions()
        # Before the tokenizer is asked: labels that no generator tells apart.
        check_answers(labels, labels)
        check_labels(
            self.tokenizer,
            labels,
            answers,
            None if positions is None else positions - 2,
            f"shorten them, the decoder has {positions} positions",
        )
        check_answers(labels, self.tokenizer.batch_decode(answers, skip_special_tokens=True))
        return [[*ids, self.tokenizer.eos_token_id] for ids in answers]

    def encode_texts(self, task: TextTask, split: str) -> EncodedTexts:
        """Tokenise a split; warns of prompts and of answers in training that are cut.

        A prompt too long loses its middle (its start, with ``keep_ends`` False): its end says what is asked. What is
        written has at most the tokens of the longest answer in ``train``, and at most the task's ``answer_tokens``.

        Raises ValueError where a prompt has no room, ImportError where the metric's package is missing.
        """
        check_metric(task.metric)
        records: Sequence[Record] = getattr(task, split)
        prompts = [r["prompt"] for r in records]
        longest = max(map(len, self._ends(dict.fromkeys(map(self._continuation, task.train)))))
        bound = min(longest, task.answer_tokens, self._decoder_positions() or longest)
        front, back = specials(self.tokenizer)
        after = back if self.seq2seq else []
        beside = f"{len(front) + len(after)} special tokens"
        room = self._room(len(front) + len(after), beside, bound, "lower answer_tokens")
        texts = [self._continuation(record) for record in records]
        answers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        answer_tokens = self._ends(answers)
        if split == "train":
            self._tell_of_cut_answers([len(answer_tokens[answers[text]]) for text in texts], bound)
        tokens = cut(self.tokenizer, prompts, room, self.max_length, self.keep_ends, "prompts")
        return EncodedTexts(
            self._checked([front + ids + after for ids in tokens], prompts),
            [answers[text] for text in texts],
            tuple(answers),
            [ids[:bound] for ids in answer_tokens],
            tuple(prompts),
            task.metric,
            bound,
        )

    def _continuation(self, record: Record) -> str:
        """The answer as it follows the prompt: a decoder's as a word of its own."""
        joined = self.seq2seq or not record["prompt"] or record["prompt"][-1].isspace()
        return record["answer"] if joined else f" {record['answer']}"

    def _ends(self, answers: Iterable[str]) -> list[list[int]]:
        return [[*ids, self.tokenizer.eos_token_id] for ids in ids_of(self.tokenizer, list(answers))]

    @staticmethod
    def _tell_of_cut_answers(lengths: Sequence[int], bound: int) -> None:
        long = sum(length > bound for length in lengths)
        if long:
            warnings.warn(
                f"{long} of {len(lengths)} answers ({100 * long / len(lengths):.0f} %) are longer than the {bound} "
                "tokens that answer_tokens and the model leave them and were cut; no end is learned of these",
                stacklevel=3,
            )

    def _decoder_positions(self) -> int | None:
        """Of an encoder-decoder; a decoder's are those of prompt and answer together."""
        return positions_of(self.model, "decoder") if self.seq2seq else None

    def _room(self, fixed: int, beside: str, answer: int, advice: str) -> int:
        """Tokens a sentence may have beside ``fixed`` others, and in a decoder beside an answer of ``answer``."""
        room = self.max_length - fixed
        if room < 8:
            raise ValueError(
                f"max_length {self.max_length} leaves {room} tokens for a sentence beside {beside}; "
                f"raise it to at least {self.max_length - room + 8}"
            )
        if self.seq2seq or self.positions is None:
            return room
        left = self.positions - answer - fixed
        if left < 8:
            raise ValueError(
                f"the model's {self.positions} positions leave {left} tokens for a sentence beside "
                f"{beside} and an answer of {answer} tokens; expected at least 8: {advice}, or take a model with more "
                "positions"
            )
        return min(room, left)

    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        prompts = [task.tokens[i] for i in rows]
        answers = [task.label_tokens[task.targets[i]] for i in rows]
        if not self.seq2seq:
            targets = [[IGNORED] * len(p) + a for p, a in zip(prompts, answers, strict=True)]
            prompts = [p + a for p, a in zip(prompts, answers, strict=True)]
        else:
            targets = answers
        return self.model(
            input_ids=self._pad(prompts, self.tokenizer.pad_token_id),
            attention_mask=self._pad([[1] * len(p) for p in prompts], 0),
            labels=self._pad(targets, IGNORED),
        ).loss

    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        texts = self.tokenizer.batch_decode(task.label_tokens, skip_special_tokens=True)
        known = {normal(text): i for i, text in enumerate(texts)}
        return [known.get(normal(text), -1) for text in self.write(task, batch_size)]

    def _score(self, task: EncodedTask, batch_size: int) -> float:
        if not isinstance(task, EncodedTexts):
            return super()._score(task, batch_size)
        answers = [task.labels[target] for target in task.targets]
        return score(task.metric, task.prompts, self.write(task, batch_size), answers)

    @torch.no_grad()
    @contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Answers end as they were trained to, and nothing is forced or penalised, whatever the model's own settings
        for generation say: what they leave unset, transformers takes from the model."""
        from transformers import GenerationConfig

        own = self.model.generation_config
        plain = GenerationConfig(
            do_sample=False, num_beams=1, eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id, bos_token_id=own.bos_token_id,
            decoder_start_token_id=own.decoder_start_token_id,
        )  # fmt: skip
        base = self.model.get_base_model()
        of_base = base.generation_config
        self.model.generation_config = base.generation_config = plain
        try:
            yield
        finally:
            self.model.generation_config, base.generation_config = own, of_base

    def write(self, task: EncodedTask, batch_size: int = 32) -> list[str]:
        """What the model answers to every record, greedily.

        Raises ValueError where the model's scores are not finite.
        """
        written = [""] * len(task)
        for rows in task.batches(batch_size):
            prompts = [task.tokens[i] for i in rows]
            left = not self.seq2seq
            ids = self._pad(prompts, self.tokenizer.pad_token_id, left=left)
            mask = self._pad([[1] * len(p) for p in prompts], 0, left=left)
            finite: list[torch.Tensor] = []  # by token: [row]

            def watch(_: torch.Tensor, scores: torch.Tensor, finite: list[torch.Tensor] = finite) -> torch.Tensor:
                finite.append(scores.amax(-1).isfinite())  # NaN if one is; -inf alone bars a token
                return scores

            with self._plain_generation():
                output = self.model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    max_new_tokens=task.new_tokens,
                    logits_processor=[watch],
                )
            if finite:
                self._refuse_unless(torch.stack(finite).all(0), task, rows)
            new = output if self.seq2seq else output[:, ids.shape[1] :]
            for i, text in zip(rows, self.tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
                written[i] = text
        return written
