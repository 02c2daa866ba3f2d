"""Small real PEFT models with every kind of layer the package supports."""

from __future__ import annotations

import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from ella.acting import TASK


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


def randomise(model, seed, adapter=None):
    """Fill the trained adapter (or another) as training would: every factor non-zero."""
    adapter = adapter or trained(model)
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and f".{adapter}" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=gen))


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
