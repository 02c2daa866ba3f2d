"""What keeping p components of the past costs in accuracy, with and without the energies of what was dropped.

On pasts of a real continual run (a small text encoder trained task after task) and on random ones. No clock here.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import ella_kernels as ek
from ella import EllaConfig, EllaRegularizer

from .measure import GATE, relative_error
from .rows import Row

RANKS = (0, 4, 8, 16, 32, 64)


class Layer(NamedTuple):
    """The current update and the whole past of one layer, float32."""

    lora_A: Tensor
    lora_B: Tensor
    past: ek.LowRank
    scaling: float


def random_layers(tasks: int = 15, rank: int = 8, width: int = 512, outliers: bool = False) -> list[Layer]:
    """``tasks`` independent random updates of one square layer; with a few input channels ten times as large or not."""
    gen = torch.Generator().manual_seed(0)
    channels = torch.ones(width)
    if outliers:
        channels[torch.randperm(width, generator=gen)[: width // 64]] = 10.0

    def update(m: int) -> tuple[Tensor, Tensor]:
        left = torch.randn(width, m, generator=gen) * 0.02
        return left, torch.randn(m, width, generator=gen) * width**-0.5 * channels

    left, right = update(tasks * rank)
    b, a = update(rank)
    return [Layer(a, b, ek.truncate(left, right, tasks * rank), 2.0)]


@cache
def trained_layers(penalised: bool, *, tasks: int = 8, examples: int = 64, epochs: int = 2) -> tuple[Layer, ...]:
    """Pasts of a real run: MiniLM learns ``tasks`` docstring tasks, r = 8 on query and value; the last one is current.

    Args:
        penalised: train with the ELLA penalty, which moves the update away from the past, or without.
    """
    from ella.continual.demo import DEMO_LORA, MAX_LENGTH
    from ella.continual.models import build_classifier

    torch.manual_seed(0)
    classifier = build_classifier(lora=DEMO_LORA, max_length=MAX_LENGTH)
    reg = EllaRegularizer(classifier.model, EllaConfig())
    parameters = [p for p in classifier.model.parameters() if p.requires_grad]
    chosen = _tasks(tasks, examples)
    for index, task in enumerate(chosen):
        encoded = classifier.encode(task.train, task.labels)
        optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
        for epoch in range(epochs):
            for rows in encoded.batches(16, seed=epoch):
                optimizer.zero_grad()
                classifier.loss(encoded, rows).backward()
                if penalised and index:
                    reg.add_gradient_()
                optimizer.step()
        if index < len(chosen) - 1:
            reg.end_task(task.name)
    stored = reg.state().layers
    return tuple(
        Layer(*(p.detach().clone() for p in layer.parameters()), stored[layer.name].parts[0], layer.scaling())
        for layer in reg.layers
    )


@cache
def _tasks(count: int, examples: int):
    """Docstring tasks, each library's classes dealt out so that there are ``count`` tasks with labels of their own."""
    from ella.continual.docstrings import docstring_tasks
    from ella.continual.tasks import Task

    whole = docstring_tasks(train_per_task=4 * examples, test_per_task=16)
    parts = -(-count // len(whole))
    tasks = []
    for task in whole:
        for part in range(parts):
            labels = task.labels[part::parts]
            split = ([r for r in records if r["label"] in labels] for records in (task.train, task.test))
            tasks.append(Task.from_records(f"{task.name} {part}", *split, labels=labels).subset(examples, 1))
    return tasks[:count]


def quality(layers: list[Layer], p: int, energies: bool) -> tuple[dict, float]:
    """Value and gradients with ``p`` components against all, over all layers, and the float32 error of ours.

    Returns:
        ``value_over_exact``, ``value_error``, ``gradient_error`` (relative, RMS), ``gradient_cosine``, ``bytes`` kept;
        and the largest relative error of the float32 gradients against float64 with the same truncated past.
    """
    exact_values, values, exact_grads, grads, worst, kept_bytes = 0.0, 0.0, [], [], 0.0, 0
    for layer in layers:
        past = ek.truncate(layer.past.left, layer.past.right, p)
        if not energies:
            past = ek.LowRank(past.left, past.right)
        kept_bytes += sum(4 * t.numel() for t in past if t is not None)
        a, b, s = layer.lora_A.double(), layer.lora_B.double(), layer.scaling
        whole, part = (ek.LowRank(*(None if t is None else t.double() for t in x)) for x in (layer.past, past))
        exact_values += ek.reference.hadamard_penalty(a, b, whole, s).item()
        values += ek.reference.hadamard_penalty(a, b, part, s).item()
        exact_grads += [g.flatten() for g in ek.reference.hadamard_grad(a, b, whole, s)]
        expected = ek.reference.hadamard_grad(a, b, part, s)
        grads += [g.flatten() for g in expected]
        if p or energies:
            worst = max(worst, _ours_error(layer, past, expected))
    exact_grad, grad = torch.cat(exact_grads), torch.cat(grads)
    norm = exact_grad.norm()
    return {
        "value_over_exact": values / exact_values,
        "value_error": abs(values / exact_values - 1),
        "gradient_error": ((grad - exact_grad).norm() / norm).item(),
        "gradient_cosine": (grad @ exact_grad / (norm * grad.norm())).item() if grad.norm() > 0 else 0.0,
        "bytes": kept_bytes,
    }, worst


def _ours_error(layer: Layer, past: ek.LowRank, expected: tuple[Tensor, Tensor]) -> float:
    grads = [torch.zeros_like(layer.lora_A)], [torch.zeros_like(layer.lora_B)]
    ek.add_hadamard_grad_([layer.lora_A], [layer.lora_B], [past], [layer.scaling], *grads, weight=1.0)
    return max(relative_error(found[0], want) for found, want in zip(grads, expected, strict=True) if want.norm() > 0)


_SOURCES = {
    "15 random tasks of rank 8, 512x512": random_layers,
    "15 random tasks of rank 8, 512x512, outlier channels": lambda: random_layers(outliers=True),
    "MiniLM q and v after 7 text tasks, no penalty": lambda: list(trained_layers(False)),
    "MiniLM q and v after 7 text tasks, ELLA": lambda: list(trained_layers(True)),
}


@pytest.mark.parametrize("source", _SOURCES)
def bench_truncation(source, report_all):
    layers = _SOURCES[source]()
    k = layers[0].past.right.shape[0]
    found = {}
    for p in (*(p for p in RANKS if p < k), k):
        for energies in (False, True) if p < k else (False,):
            if p == 0 and not energies:
                continue
            name = f"p = {p} of {k}" + (", energies" if energies else "")
            extra, error = quality(layers, p, energies)
            row = Row("truncation", source, "", name, len(layers), len(layers), error=error, gate=GATE["ieee"])
            row.extra, row.held_bytes = extra | {"p": p, "k": k, "energies": energies}, extra.pop("bytes")
            if not row.green:
                row.reason = f"failed: float32 against float64 with the same past: relative error {error:.1e}"
            found[name] = (row, None)
    report_all(found)
