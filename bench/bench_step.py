"""A training step end to end: a real PEFT model, with and without the penalty, by every way to compute it.

The model's weights are random; a step costs the same. AdamW runs with a learning rate of zero, so that every way sees
the same parameters in every round.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from ella import EllaConfig, EllaRegularizer

from .measure import GATE, Samples, exact, interleave, relative_error
from .providers import BASELINE, compiled, dense_form, factor_bytes, published
from .rows import Limits, Row, measure_calls
from .shapes import Size

WITHOUT = "no penalty"
CONFIG = EllaConfig(ella_lambda=1e2, past_rank=128)
RANK = 8


class StepCase(NamedTuple):
    """A model from its configuration and what it trains on: ``batch`` sequences of ``tokens`` after ``tasks`` tasks."""

    name: str
    hidden: int
    ffn: int
    blocks: int
    heads: int
    vocabulary: int
    batch: int
    tokens: int
    tasks: int
    short: bool = True


_TINY = StepCase("tiny (2 blocks of 64)", 64, 128, 2, 4, 256, 8, 32, 1)
_BASE = StepCase("100M-class (12 blocks of 768)", 768, 2048, 12, 12, 20000, 4, 64, 1)

CASES = [_TINY, _BASE, _BASE._replace(tasks=15), _BASE._replace(tasks=16 + 15, short=False)]


class Way(NamedTuple):
    """One way to have the penalty: a loss term, or gradients added in place after backward; what it keeps."""

    held_bytes: int
    term: Callable[[], Tensor] | None = None
    add_: Callable[[], Tensor] | None = None
    penalty: str = "hadamard"


def base_model(case: StepCase) -> LlamaForCausalLM:
    """A LLaMA of the case's sizes with random weights."""
    config = LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.ffn,
        num_hidden_layers=case.blocks,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        vocab_size=case.vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


class Trained:
    """A PEFT model with ``case.tasks`` finished random tasks in its past, and a step for every way."""

    def __init__(self, case: StepCase, device: str):
        torch.manual_seed(0)
        base = base_model(case).to(device)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=["q_proj", "v_proj"])
        self.size = sum(p.numel() for p in base.parameters())
        self.model = get_peft_model(base, lora).train()
        self.reg = EllaRegularizer(self.model, CONFIG)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        for task in range(case.tasks):
            self._fill()
            self.reg.end_task(f"task {task}")
        self._fill()
        self.spectral = EllaRegularizer(self.model, replace(CONFIG, penalty="spectral"))
        self.tokens = torch.randint(case.vocabulary, (case.batch, case.tokens), device=device)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self.layers = [(*layer.parameters(), layer.scaling()) for layer in self.reg.layers]
        stored = self.reg.state().layers
        self.pasts = [stored[layer.name].parts[0] for layer in self.reg.layers]
        self.dense = [dense_form(past) for past in self.pasts]

    def _fill(self) -> None:
        """A as initialised, B of the size that training leaves: a fresh B is zero and so is its penalty."""
        for layer in self.reg.layers:
            torch.nn.init.normal_(layer.parameters()[1], std=0.02)

    def ways(self) -> dict[str, Way]:
        sizes = [
            Size(b.shape[0], a.shape[1], *past.right.shape[:1], past.right.shape[0]) for (a, b, _), past in self._all()
        ]
        dense = sum(4 * size.weight for size in sizes)
        factors = sum(factor_bytes(size) for size in sizes)
        return {
            WITHOUT: Way(0),
            BASELINE: Way(dense, term=lambda: self._dense_term(lambda: published)),
            "dense compiled": Way(dense, term=lambda: self._dense_term(compiled)),
            "dense rebuilt": Way(factors, term=self._rebuilt_term),
            "ours loss term": Way(factors, term=self.reg.penalty),
            "ours added to .grad": Way(factors, add_=self.reg.add_gradient_),
            "ours spectral, added to .grad": Way(factors, add_=self.spectral.add_gradient_, penalty="spectral"),
        }

    def _all(self):
        return zip(self.layers, self.pasts, strict=True)

    def _dense_term(self, function) -> Tensor:
        form = function()
        terms = [form(a, b, past, s) for (a, b, s), past in zip(self.layers, self.dense, strict=True)]
        return CONFIG.ella_lambda * torch.stack(terms).sum()

    def _rebuilt_term(self) -> Tensor:
        terms = [published(a, b, dense_form(past), s) for (a, b, s), past in self._all()]
        return CONFIG.ella_lambda * torch.stack(terms).sum()

    def step(self, way: Way) -> None:
        """Forward, backward, penalty, optimizer: everything a training step does."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        if way.term is not None:
            loss = loss + way.term()
        loss.backward()
        if way.add_ is not None:
            way.add_()
        self.optimizer.step()

    def alone(self, way: Way) -> Tensor:
        """The penalty's part of a step: value, and gradients into existing ``.grad``."""
        if way.add_ is not None:
            return way.add_()
        value = way.term()
        value.backward()
        return value.detach()

    def error(self, way: Way) -> float:
        """Relative error of λΣP and of every layer's gradients against float64."""
        for p in self.parameters:
            p.grad = torch.zeros_like(p)
        value = self.alone(way)
        references = [exact(a, b, past, s, way.penalty) for (a, b, s), past in self._all()]
        total = CONFIG.ella_lambda * torch.stack([reference[0] for reference in references]).sum()
        errors = [relative_error(value, total)]
        for (a, b, _), (_, grad_a, grad_b) in zip(self.layers, references, strict=True):
            errors.append(relative_error(a.grad / CONFIG.ella_lambda, grad_a))
            errors.append(relative_error(b.grad / CONFIG.ella_lambda, grad_b))
        return max(errors)


def measure_step(case: StepCase, limits: Limits, device: str = "cpu") -> dict[str, tuple[Row, Samples | None]]:
    """Rows of every way to have the penalty in a step of ``case``; "no penalty" is one of them."""
    trained = Trained(case, device)
    ways = trained.ways()
    k = trained.pasts[0].right.shape[0]
    name = f"{case.name}, {case.batch}x{case.tokens} tokens, r{RANK} k{k}"
    rows, calls = {}, {}
    for label, way in ways.items():
        row = rows[label] = Row("step", name, "", label, len(trained.layers), baseline=label == BASELINE)
        row.gate, row.held_bytes, row.checked = GATE["ieee"], way.held_bytes, len(trained.layers)
        # Without a penalty there is nothing to be wrong about.
        row.error = 0.0 if label == WITHOUT else trained.error(way)
        row.extra = {"parameters": trained.size}
        calls[label] = lambda way=way: trained.step(way)
    found = measure_calls(rows, calls, limits, device, baseline=BASELINE)
    _shares(trained, ways, found, limits, device)
    return found


def _shares(trained: Trained, ways: dict[str, Way], found: dict, limits: Limits, device: str) -> None:
    """Penalty alone and its share of a step, both ways: timed alone over the step, and step with minus step without."""
    timed = {label: way for label, way in ways.items() if label != WITHOUT and found[label][1] is not None}
    trained.step(ways[WITHOUT])
    alone = interleave(
        {label: [lambda way=way: trained.alone(way)] for label, way in timed.items()},
        device=device,
        budget=limits.budget / 2,
    )
    without_row, without = found[WITHOUT]
    for label in timed:
        row, samples = found[label]
        difference = Samples([1 - w / s for w, s in zip(without.seconds, samples.seconds, strict=True)])
        row.extra |= {
            "penalty_seconds": alone[label].median,
            "share": alone[label].median / row.median,
            "share_by_difference": difference.median,
            "share_by_difference_p20": difference.quantile(0.2),
            "share_by_difference_p80": difference.quantile(0.8),
            "extra_peak_bytes": row.peak_bytes - without_row.peak_bytes,
        }


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.name}, {case.tasks} tasks") for case in CASES])
def bench_step(case, limits, device, report_all):
    report_all(measure_step(case, limits._replace(budget=4 * limits.budget), device))
