"""Weight shapes of named models, and what a benchmark case is made of.

Shapes come from the published configurations (``config.json``) of each model; ``(out, in)`` is that of the weight.
"""

from __future__ import annotations

from typing import NamedTuple

from ella_kernels.workspace import Size

__all__ = ["LAYER_CASES", "MODELS", "MODEL_CASES", "TARGETS", "Case", "Size", "layers_of", "model_case"]

TARGETS = ("qv", "attention", "all")


class Linear(NamedTuple):
    """``count`` layers of one kind in a model; ``kind`` is "qv", "attention" (the other two) or "mlp"."""

    name: str
    kind: str
    out: int
    in_: int
    count: int


def _decoder(hidden: int, kv: int, ffn: int, blocks: int) -> tuple[Linear, ...]:
    return (
        Linear("q", "qv", hidden, hidden, blocks),
        Linear("v", "qv", kv, hidden, blocks),
        Linear("k", "attention", kv, hidden, blocks),
        Linear("o", "attention", hidden, hidden, blocks),
        Linear("gate", "mlp", ffn, hidden, blocks),
        Linear("up", "mlp", ffn, hidden, blocks),
        Linear("down", "mlp", hidden, ffn, blocks),
    )


def _qwen_moe(blocks: int) -> tuple[Linear, ...]:
    # Qwen3-30B-A3B: 32 heads of 128 on a hidden size of 2048, 4 key-value heads, 128 experts of 768.
    return (
        Linear("q", "qv", 4096, 2048, blocks),
        Linear("v", "qv", 512, 2048, blocks),
        Linear("k", "attention", 512, 2048, blocks),
        Linear("o", "attention", 2048, 4096, blocks),
        Linear("expert gate", "mlp", 768, 2048, 128 * blocks),
        Linear("expert up", "mlp", 768, 2048, 128 * blocks),
        Linear("expert down", "mlp", 2048, 768, 128 * blocks),
    )


MODELS: dict[str, tuple[Linear, ...]] = {
    "MiniLM-L6": (
        Linear("q", "qv", 384, 384, 6),
        Linear("v", "qv", 384, 384, 6),
        Linear("k", "attention", 384, 384, 6),
        Linear("o", "attention", 384, 384, 6),
        Linear("intermediate", "mlp", 1536, 384, 6),
        Linear("output", "mlp", 384, 1536, 6),
    ),
    # No published model: two blocks of the size that tests train.
    "tiny LLaMA": _decoder(64, 32, 172, 2),
    # 6 encoder blocks with one attention, 6 decoder blocks with two.
    "T5-small": (
        Linear("q", "qv", 512, 512, 18),
        Linear("v", "qv", 512, 512, 18),
        Linear("k", "attention", 512, 512, 18),
        Linear("o", "attention", 512, 512, 18),
        Linear("wi", "mlp", 2048, 512, 12),
        Linear("wo", "mlp", 512, 2048, 12),
    ),
    # 24 encoder blocks with one attention, 24 decoder blocks with two.
    "T5-large": (
        Linear("q", "qv", 1024, 1024, 72),
        Linear("v", "qv", 1024, 1024, 72),
        Linear("k", "attention", 1024, 1024, 72),
        Linear("o", "attention", 1024, 1024, 72),
        Linear("wi", "mlp", 4096, 1024, 48),
        Linear("wo", "mlp", 1024, 4096, 48),
    ),
    "LLaMA-3.2-1B": _decoder(2048, 512, 8192, 16),
    "LLaMA-3.1-8B": _decoder(4096, 1024, 14336, 32),
    "LLaMA-3.1-70B": _decoder(8192, 1024, 28672, 80),
    "Qwen3-30B-A3B": _qwen_moe(48),
    "Qwen3-30B-A3B, 1 of 48 blocks": _qwen_moe(1),
}


class Case(NamedTuple):
    """What one measurement runs on.

    Attributes:
        name: shown in tables, unique per bench.
        sizes: one per layer.
        short: part of ``make bench``; the others need ``make bench-full``.
    """

    name: str
    sizes: tuple[Size, ...]
    short: bool = True


def layers_of(model: str, targets: str) -> tuple[Linear, ...]:
    """The linear layers of ``model`` that LoRA adapts: "qv" (the paper's), "attention" (q, k, v, o) or "all".

    >>> sum(linear.count for linear in layers_of("T5-large", "qv"))
    144
    """
    if targets not in TARGETS:
        raise ValueError(f"targets must be one of {TARGETS}, found {targets!r}")
    kinds = TARGETS if targets == "all" else ("qv", "attention")[: 1 + (targets == "attention")]
    return tuple(linear for linear in MODELS[model] if targets == "all" or linear.kind in kinds)


def model_case(model: str, targets: str, r: int, k: int, *, short: bool = True) -> Case:
    """A whole model as one case."""
    sizes = tuple(
        Size(linear.out, linear.in_, r, k) for linear in layers_of(model, targets) for _ in range(linear.count)
    )
    what = {"qv": "q and v", "attention": "q, k, v, o", "all": "all linear"}[targets]
    return Case(f"{model}, {what} ({len(sizes)} layers) r{r} k{k}", sizes, short)


def _layer(model: str, layer: str, r: int, k: int, *, short: bool = True, energy: bool = False) -> Case:
    linear = next(linear for linear in MODELS[model] if linear.name == layer)
    size = Size(linear.out, linear.in_, r, k, energy)
    return Case(f"{model} {layer} {size}", (size,), short)


LAYER_CASES = (
    _layer("tiny LLaMA", "q", 8, 8),
    _layer("MiniLM-L6", "q", 8, 8),
    _layer("MiniLM-L6", "intermediate", 8, 64, short=False),
    _layer("T5-large", "q", 8, 8),
    _layer("T5-large", "q", 8, 64),
    _layer("LLaMA-3.2-1B", "q", 8, 8),
    _layer("LLaMA-3.2-1B", "v", 16, 16),
    _layer("LLaMA-3.1-8B", "q", 8, 0, energy=True),
    _layer("LLaMA-3.1-8B", "q", 4, 4, short=False),
    _layer("LLaMA-3.1-8B", "q", 8, 8),
    _layer("LLaMA-3.1-8B", "q", 8, 16),
    _layer("LLaMA-3.1-8B", "q", 8, 16, short=False, energy=True),
    _layer("LLaMA-3.1-8B", "q", 16, 32, short=False),
    _layer("LLaMA-3.1-8B", "q", 8, 120),
    _layer("LLaMA-3.1-8B", "q", 16, 128, short=False),
    _layer("LLaMA-3.1-8B", "q", 32, 64, short=False),
    _layer("LLaMA-3.1-8B", "q", 64, 512),
    _layer("LLaMA-3.1-8B", "v", 8, 8, short=False),
    _layer("LLaMA-3.1-8B", "gate", 16, 16, short=False),
    _layer("LLaMA-3.1-8B", "down", 16, 16),
    _layer("LLaMA-3.1-70B", "q", 8, 8, short=False),
    _layer("LLaMA-3.1-70B", "down", 16, 64, short=False),
    _layer("Qwen3-30B-A3B", "expert gate", 8, 8),
    _layer("Qwen3-30B-A3B", "expert down", 16, 64, short=False),
)

MODEL_CASES = (
    model_case("MiniLM-L6", "qv", 8, 8),
    model_case("MiniLM-L6", "all", 8, 16),
    model_case("MiniLM-L6", "qv", 8, 120),
    model_case("tiny LLaMA", "all", 8, 8),
    model_case("T5-small", "qv", 8, 8),
    model_case("T5-large", "qv", 8, 8),
    model_case("T5-large", "attention", 8, 8, short=False),
    model_case("T5-large", "all", 8, 8, short=False),
    model_case("T5-large", "qv", 8, 64, short=False),
    model_case("LLaMA-3.2-1B", "qv", 8, 8),
    model_case("LLaMA-3.2-1B", "all", 16, 16, short=False),
    model_case("LLaMA-3.1-8B", "qv", 8, 8),
    model_case("LLaMA-3.1-8B", "all", 16, 16, short=False),
    model_case("LLaMA-3.1-70B", "qv", 8, 8),
    model_case("LLaMA-3.1-70B", "all", 16, 16, short=False),
    model_case("Qwen3-30B-A3B, 1 of 48 blocks", "all", 8, 8),
    model_case("Qwen3-30B-A3B", "all", 8, 8, short=False),
)
