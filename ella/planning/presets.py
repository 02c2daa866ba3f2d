"""Architectures that ``ella plan`` knows by name: the numbers of their published ``config.json`` files."""

from __future__ import annotations

from typing import Any

__all__ = ["PRESETS"]


def _llama(hidden: int, ffn: int, blocks: int, heads: int) -> dict[str, Any]:
    # Meta, "The Llama 3 Herd of Models" (arXiv 2407.21783), table 3, and the repositories' config.json.
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": blocks,
        "num_attention_heads": heads, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    }  # fmt: skip


PRESETS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64),
    "llama-3.1-405b": _llama(16384, 53248, 126, 128),
    # Raffel et al., JMLR 2020 (arXiv 1910.10683), section 3.7, and t5-large's config.json.
    "t5-large": {
        "model_type": "t5", "d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_layers": 24, "num_heads": 16,
        "vocab_size": 32128,
    },
    # Qwen3 technical report (arXiv 2505.09388), table 2, and the repository's config.json.
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    },
}  # fmt: skip
