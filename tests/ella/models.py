"""Small real PEFT models with every kind of layer the package supports."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

# Written out: a process that knows nothing of ella builds these models too.
TASK = "ella_task"


class Experts(nn.Module):
    """Three experts stored as one 3-D parameter ``(experts, out, in)``, as mixture-of-experts models do."""

    def __init__(self, n=3, out=12, in_=12):
        super().__init__()
        self.up = nn.Parameter(0.3 * torch.randn(n, out, in_))

    def forward(self, x):
        return torch.einsum("bsi,eoi->bso", x, self.up)


class Tiny(nn.Module):
    """Embedding, Linear, Conv1D (transposed weight), attention and convolutions of one, two and three dimensions."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 12)
        self.up = nn.Linear(12, 16)
        self.down = Conv1D(12, 16)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.experts = Experts()
        self.image = nn.Conv2d(1, 4, 3, padding=1)
        self.point = nn.Conv2d(4, 4, 1)
        self.line = nn.Conv1d(4, 5, 3, stride=2)
        self.volume = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, ids):
        h = self.down(torch.tanh(self.up(self.tokens(ids))))
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = h + self.experts(h)
        h = torch.tanh(self.point(self.image(h.unsqueeze(1))))
        h = self.line(h.flatten(2))
        return self.volume(h[:, None, None]).flatten(1)


TARGETS = ["tokens", "up", "down", "attention", "image", "point", "line", "volume"]
# PEFT refuses expert parameters beside a Conv1D, whose transposed weight it notes in the one configuration.
EXPERTS = {"targets": [t for t in TARGETS if t != "down"], "target_parameters": ["experts.up"]}


def tiny(seed=0, dtype=torch.float32, targets=None, **options):
    """A PEFT model on :class:`Tiny` with random, non-zero factors."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fan_in_fan_out is corrected by PEFT, with a warning
        model = get_peft_model(Tiny().to(dtype), LoraConfig(target_modules=targets or TARGETS, **options))
    randomise(model, seed)
    return model.eval()


def trained(model):
    """Name of the adapter in training."""
    return TASK if TASK in model.peft_config else "default"


def randomise(model, seed, adapter=None, size=1.0):
    """Fill the trained adapter (or another) as training would: every factor non-zero, updates of ``size``."""
    adapter = adapter or trained(model)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and f".{adapter}" in name:
                p.copy_(0.2 * size**0.5 * torch.randn(p.shape, generator=gen))


def ids(n=3, length=7, seed=0):
    return torch.randint(0, 20, (n, length), generator=torch.Generator().manual_seed(seed))


def deltas(reg):
    """``ΔW (out, in)`` of every layer part, by PEFT's own ``get_delta_weight``, in float64."""
    found = {}
    for layer in reg.layers:
        delta = layer.module.get_delta_weight(layer.adapter).detach().double()
        if layer.kind == "experts":
            parts = list(delta)
        elif layer.kind == "embedding" or getattr(layer.module, "fan_in_fan_out", False):
            parts = [delta.T]
        else:
            parts = [delta.flatten(1)]
        found[layer.name] = parts
    return found


def add_deltas(total, new):
    if not total:
        return new
    return {name: [a + b for a, b in zip(total[name], new[name], strict=True)] for name in new}


def llama(**options):
    """A two-block LLaMA with grouped attention, the same weights every time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def bert(num_labels=3):
    """A two-block sequence classifier without dropout, the same weights every time."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        num_labels=num_labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def lora(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]} | options)


TOKENS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def logits(model):
    """Of a language model or a classifier, in eval mode."""
    was = model.training
    model.eval()
    found = model(input_ids=TOKENS).logits.clone().float()
    model.train(was)
    return found


def train_rest(model, seed):
    """Move what is trained beside the factors: modules_to_save, for example."""
    gen = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" not in name:
                p.add_(0.1 * torch.randn(p.shape, generator=gen))
