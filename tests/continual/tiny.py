"""Small random models with a real tokenizer, saved as model folders, and tasks they can learn."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from ella.continual import Task

WORDS = {
    "fruit": ["apple", "pear", "plum", "cherry"],
    "metal": ["iron", "copper", "zinc", "silver"],
    "bird": ["robin", "heron", "finch", "crow"],
    "tool": ["hammer", "chisel", "wrench", "saw"],
    "river": ["danube", "volga", "rhine", "loire"],
    "planet": ["venus", "saturn", "mars", "neptune"],
}
FRAMES = ["I saw the {} again", "{} stood there", "a {} of some age was what we were shown", "they spoke of {} all day"]


def word_task(name: str, labels: tuple[str, ...], n_train: int = 32, n_test: int = 16) -> Task:
    """Sentences around one word each; the label is the word's kind. Train and test may share words, not the draw."""

    def draw(n: int, key: str) -> tuple[dict[str, str], ...]:
        rng = random.Random(f"{name}/{key}")
        chosen = [labels[i % len(labels)] for i in range(n)]
        return tuple({"sentence": rng.choice(FRAMES).format(rng.choice(WORDS[k])), "label": k} for k in chosen)

    return Task(name=name, train=draw(n_train, "train"), test=draw(n_test, "test"), labels=labels)


def two_tasks(**sizes: int) -> list[Task]:
    return [word_task("things", ("fruit", "metal"), **sizes), word_task("beings", ("bird", "tool"), **sizes)]


def three_tasks(**sizes: int) -> list[Task]:
    return [*two_tasks(**sizes), word_task("names", ("river", "planet"), **sizes)]


def tokenizer(front: str = "", back: str = "") -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained here; ``front`` and ``back`` are what it puts around a text."""
    special = ["<pad>", "<s>", "</s>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    texts = [frame.format(word) for words in WORDS.values() for word in words for frame in FRAMES]
    texts += [f"Options: {', '.join(WORDS)}\nAnswer: {label}" for label in WORDS]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single=f"{front} $A {back}".strip(), special_tokens=[(token, i) for i, token in enumerate(special)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def word_tokenizer(words: str) -> PreTrainedTokenizerFast:
    """One token a word, without case and accents; a word that is not among ``words`` is <unk>."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *words.split()]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def save_llama(folder: Path, seed: int = 0) -> Path:
    own = tokenizer(front="<s>")
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(own),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _save(folder, LlamaForCausalLM(config), own)


def save_t5(folder: Path, seed: int = 0, factor: float = 1.0) -> Path:
    """``factor`` scales the initial weights: a large one makes what is generated depend on the input at once."""
    own = tokenizer(back="</s>")
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(own),
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        initializer_factor=factor,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return _save(folder, T5ForConditionalGeneration(config), own)


def save_bert(folder: Path, seed: int = 0) -> Path:
    own = tokenizer(front="<s>", back="</s>")
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(own),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.2,
        pad_token_id=0,
    )
    return _save(folder, BertModel(config), own)


def save_gpt2(folder: Path, positions: int) -> Path:
    own = tokenizer()
    torch.manual_seed(0)
    sizes = {"n_positions": positions, "n_embd": 32, "n_layer": 1, "n_head": 2, "initializer_range": 0.2}
    return _save(folder, GPT2LMHeadModel(GPT2Config(vocab_size=len(own), bos_token_id=1, eos_token_id=2, **sizes)), own)


def save_bart(folder: Path, positions: int) -> Path:
    own = tokenizer(front="<s>", back="</s>")
    torch.manual_seed(0)
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 32))}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": positions}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = BartConfig(
        vocab_size=len(own), d_model=32, init_std=0.2, forced_eos_token_id=None, **sizes, **heads, **ids
    )
    return _save(folder, BartForConditionalGeneration(config), own)


def save_roberta(folder: Path, positions: int) -> Path:
    own = tokenizer(front="<s>", back="</s>")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = RobertaConfig(vocab_size=len(own), max_position_embeddings=positions, pad_token_id=1, **sizes)
    return _save(folder, RobertaModel(config), own)


def _save(folder: Path, model: torch.nn.Module, own: PreTrainedTokenizerFast) -> Path:
    model.eval().save_pretrained(folder)
    own.save_pretrained(folder)
    return folder
