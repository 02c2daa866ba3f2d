"""Small models with the layers that large ones have, and one training loop for every engine."""

from __future__ import annotations

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from ella import EllaConfig, EllaRegularizer
from ella.distributed import whole
from tests.ella.models import randomise

# Plain gradient descent: Adam divides by tiny gradients, and would show differences in their last bits.
LR, CLIP, STEPS, BATCH = 1.0, 0.5, 3, 8
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj", "lm_head"], "t5": ["q", "v", "wo", "lm_head"]}


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def base(kind, layers=2):
    torch.manual_seed(0)
    if kind == "llama":
        config = LlamaConfig(
            vocab_size=70, hidden_size=32, intermediate_size=52, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    config = T5Config(
        vocab_size=70, d_model=32, d_kv=8, d_ff=52, num_layers=layers, num_heads=4, dropout_rate=0.0, pad_token_id=0,
        decoder_start_token_id=0, initializer_factor=0.3, tie_word_embeddings=False, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def adapted(kind, r=4, layers=2, **options):
    lora = {"r": r, "lora_alpha": 8, "target_modules": TARGETS[kind]} | options
    return get_peft_model(base(kind, layers), LoraConfig(**lora)).train()


def blocks(model):
    inner = model.base_model.model
    if hasattr(inner, "encoder"):
        return [*inner.encoder.block, *inner.decoder.block]
    return list(inner.model.layers)


def regularized(model, strength=50.0, **options):
    return EllaRegularizer(model, EllaConfig(ella_lambda=strength, **({"normalize": "rms"} | options)))


def with_past(kind, strength=0.01, r=4, **options):
    """A model in its second task, every factor non-zero, and its regularizer."""
    model = adapted(kind, r)
    reg = regularized(model, strength, **options)
    randomise(model, 1)
    reg.end_task("before")
    randomise(model, 2)
    return model, reg


def batch(kind, step, micro=0):
    gen = torch.Generator().manual_seed(100 * step + micro)
    ids = torch.randint(3, 70, (BATCH, 9), generator=gen)
    return {"input_ids": ids, "labels": ids.clone() if kind == "llama" else ids.flip(1)}


def mine(batch):
    """This rank's rows of a batch."""
    size = BATCH // world()
    return {key: value[rank() * size : (rank() + 1) * size] for key, value in batch.items()}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def full(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(reg):
    """The adapter in training, whole, by name."""
    return {
        f"{layer.name}.{factor}": whole(p).clone()
        for layer in reg.layers
        for factor, p in zip("AB", layer.parameters(), strict=True)
    }


def difference(found, wanted):
    """Relative distance of two dictionaries of tensors."""
    assert found.keys() == wanted.keys()
    apart = sum((found[key] - wanted[key]).double().square().sum() for key in wanted)
    size = sum(wanted[key].double().square().sum() for key in wanted)
    assert size > 0
    return (apart / size).sqrt().item()
