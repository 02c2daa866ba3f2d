"""What finished tasks cost a step: plain LoRA against ELLA, forward, backward, penalty and everything.

Beside them stand the matrix products that a knowledge of rank k adds to every adapted layer, timed bare: what a step
with ELLA costs beyond plain LoRA and those is overhead. Random weights; no optimizer, which is the same for all.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from ella import EllaConfig, EllaRegularizer

from .bench_step import RANK, StepCase, base_model
from .measure import GATE, Samples, exact, relative_error
from .rows import Limits, Row, measure_calls, timing

PLAIN, ADDED = "plain LoRA", "added operations alone"
KEEPS = ("adapter", "merge", "external")
FORWARD, BOTH, PENALTY, EVERYTHING = "forward", "forward and backward", "penalty", "everything"
LAMBDA = 1e2
SCALING = 2.0
TARGETS = {"q,v": ["q_proj", "v_proj"], "all-linear": "all-linear"}
PRECISION = {torch.float32: "fp32", torch.bfloat16: "bf16 autocast, base bf16, adapters fp32"}


class PastCase(NamedTuple):
    """A model and its batch after ``model.tasks`` tasks; ``dtype`` bfloat16: base in bf16, adapters in fp32, autocast.

    ``targets`` is a key of :data:`TARGETS`.
    """

    model: StepCase
    targets: str
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        model, k = self.model, RANK * self.model.tasks
        tokens = f"{model.batch}x{model.tokens} tokens"
        return f"{model.name}, {tokens}, {self.targets}, {PRECISION[self.dtype]}, r{RANK} k{k}"

    @property
    def short(self) -> bool:
        return self.model.short


_BLOCKS = StepCase("4 blocks of 768", 768, 2048, 4, 12, 1000, 1, 256, 15)

CASES = [
    PastCase(_BLOCKS._replace(tasks=tasks), targets, dtype)
    for dtype in PRECISION
    for targets in TARGETS
    for tasks in (1, 5, 15)
]


class Trained:
    """A PEFT model in the middle of a task, after the ``tasks`` finished ones that ``keep`` keeps; None: plain LoRA.

    The adapter of every task, the running one too, depends on its number alone.
    """

    def __init__(self, base: torch.nn.Module, case: PastCase, keep: str | None, device: str):
        self.case, self.device = case, device
        lora = LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=TARGETS[case.targets])
        self.model = get_peft_model(copy.deepcopy(base), lora).train()
        config = EllaConfig(ella_lambda=LAMBDA, keep_past=keep or "adapter")
        self.reg = EllaRegularizer(self.model, config)
        self.merge_error = 0.0
        for task in range(case.model.tasks if keep else 0):
            self._fill(task)
            self.merge_error = max([0.0, *self.reg.end_task(f"task {task}").merge_error.values()])
        self._fill(case.model.tasks)
        gen = torch.Generator().manual_seed(0)
        size = (case.model.batch, case.model.tokens)
        self.tokens = torch.randint(case.model.vocabulary, size, generator=gen).to(device)
        stored = self.reg.state().layers
        self.pasts = [stored[layer.name].parts[0] for layer in self.reg.layers] if keep else []

    def _fill(self, task: int) -> None:
        """A of the size in which PEFT initialises it, B of the size that training leaves."""
        gen = torch.Generator().manual_seed(task)
        for layer in self.reg.layers:
            a, b = layer.parameters()
            a.data.copy_(torch.randn(a.shape, generator=gen).mul_((3 * a.shape[1]) ** -0.5))
            b.data.copy_(torch.randn(b.shape, generator=gen).mul_(0.02))

    def run(self) -> tuple[Tensor, Tensor]:
        """Loss and logits of the training forward."""
        half = self.case.dtype != torch.float32
        with torch.autocast(self.device, dtype=self.case.dtype if half else None, enabled=half):
            found = self.model(input_ids=self.tokens, labels=self.tokens)
        return found.loss, found.logits

    def step(self, penalty: bool = False) -> None:
        self.model.zero_grad(set_to_none=True)
        self.run()[0].backward()
        if penalty:
            self.reg.add_gradient_()

    def calls(self) -> dict[str, Callable[[], object]]:
        return {
            FORWARD: self.run,
            BOTH: self.step,
            EVERYTHING: lambda: self.step(penalty=True),
            PENALTY: self.reg.add_gradient_,
        }

    def held_bytes(self) -> int:
        """Of the past between steps: its factors, and where they are merged the base weights without them."""
        held = sum(t.numel() * t.element_size() for past in self.pasts for t in past if t is not None)
        if self.reg.config.keep_past == "merge":
            weights = [layer.module.get_base_layer().weight for layer in self.reg.layers]
            held += sum(w.numel() * w.element_size() for w in weights)
        return held


# --- what is right ---------------------------------------------------------------------------------------------------


class Expected(NamedTuple):
    """In float64: logits, loss, and the gradients of every layer's ``A`` and ``B`` without the penalty."""

    logits: Tensor
    loss: Tensor
    grads: list[tuple[Tensor, Tensor]]


def concatenated(trained: Trained, base: torch.nn.Module) -> Expected:
    """Of plain PEFT on ``base`` in float64, with past and task as one adapter ``[Aₖ; Aₜ]``, ``[Bₖ, s·Bₜ]``."""
    pasts = trained.pasts
    k = pasts[0].right.shape[0] if pasts else 0
    lora = LoraConfig(r=k + RANK, lora_alpha=k + RANK, target_modules=TARGETS[trained.case.targets])
    model = get_peft_model(copy.deepcopy(base), lora).double()
    modules = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for i, (module, layer) in enumerate(zip(modules, trained.reg.layers, strict=True)):
        a, b = (p.detach().double() for p in layer.parameters())
        parts_a, parts_b = [a], [layer.scaling() * b]
        if pasts:
            parts_a, parts_b = [pasts[i].right.double(), *parts_a], [pasts[i].left.double(), *parts_b]
        with torch.no_grad():
            module.lora_A["default"].weight.copy_(torch.cat(parts_a))
            module.lora_B["default"].weight.copy_(torch.cat(parts_b, 1))
    found = model(input_ids=trained.tokens, labels=trained.tokens)
    found.loss.backward()
    grads = [
        (module.lora_A["default"].weight.grad[k:], layer.scaling() * module.lora_B["default"].weight.grad[:, k:])
        for module, layer in zip(modules, trained.reg.layers, strict=True)
    ]
    return Expected(found.logits.detach().double(), found.loss.detach().double(), grads)


def errors(trained: Trained, expected: Expected) -> dict[str, float]:
    """Largest relative error by mode: of logits and loss, with gradients, of the penalty, of all gradients added."""
    loss, logits = trained.run()
    output = max(relative_error(logits, expected.logits), relative_error(loss, expected.loss))
    trained.step()
    found = {FORWARD: output, BOTH: max(output, _worst(trained, expected.grads))}
    if not trained.pasts:
        return found
    penalties = [
        exact(*layer.parameters(), past, layer.scaling())
        for layer, past in zip(trained.reg.layers, trained.pasts, strict=True)
    ]
    penalty = [(LAMBDA * a, LAMBDA * b) for _, a, b in penalties]
    trained.step(penalty=True)
    both = zip(expected.grads, penalty, strict=True)
    found[EVERYTHING] = max(output, _worst(trained, [(a + c, b + d) for (a, b), (c, d) in both]))
    trained.model.zero_grad(set_to_none=True)
    value = trained.reg.add_gradient_()
    total = LAMBDA * torch.stack([value for value, _, _ in penalties]).sum()
    found[PENALTY] = max(relative_error(value, total), _worst(trained, penalty))
    return found


def _worst(trained: Trained, grads: list[tuple[Tensor, Tensor]]) -> float:
    return max(
        relative_error(parameter.grad, grad)
        for layer, pair in zip(trained.reg.layers, grads, strict=True)
        for parameter, grad in zip(layer.parameters(), pair, strict=True)
    )


# --- the added operations --------------------------------------------------------------------------------------------


class Added:
    """The products that a knowledge of rank k adds to the layers of ``trained``, on operands of their own.

    ``x·Aₖᵀ`` and its product with ``Bₖᵀ`` added to the output; ``g·Bₖ`` and its product with ``Aₖ`` added to the
    gradient of ``x`` where ``x`` has one. In the dtype in which the model multiplies.
    """

    def __init__(self, trained: Trained):
        self.forwards, self.backwards = [], []
        with inputs_seen(trained.model) as seen:
            trained.run()
        for layer, past in zip(trained.reg.layers, trained.pasts, strict=True):
            rows, needs_grad = seen[id(layer.module)]
            a, b = (t.to(trained.device, trained.case.dtype) for t in (past.right, past.left))
            x, grad_x, output, grad = (torch.randn(rows, n).to(a) for n in (*2 * a.shape[1:], *2 * b.shape[:1]))
            self.forwards.append((output, x, a.T, b.T))
            if needs_grad:
                self.backwards.insert(0, (grad_x, grad, b, a))

    @torch.no_grad()
    def forward(self) -> None:
        for total, operand, down, up in self.forwards:
            total.addmm_(operand @ down, up)

    @torch.no_grad()
    def both(self) -> None:
        self.forward()
        for total, operand, down, up in self.backwards:
            total.addmm_(operand @ down, up)


@contextlib.contextmanager
def inputs_seen(model: PeftModel) -> Iterator[dict[int, tuple[int, bool]]]:
    """Rows of every LoRA layer's input and whether it needs a gradient, by ``id(module)``."""
    seen: dict[int, tuple[int, bool]] = {}

    def note(module, args):
        seen[id(module)] = args[0].numel() // args[0].shape[-1], args[0].requires_grad

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, LoraLayer)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_past(
    case: PastCase, limits: Limits, device: str = "cpu"
) -> dict[tuple[str, str], tuple[Row, Samples | None]]:
    """Rows by ``(provider, mode)``: plain LoRA, ELLA with each ``keep_past``, and the added operations alone."""
    torch.manual_seed(0)
    base = base_model(case.model).to(device, case.dtype)
    plain = Trained(base, case, None, device)
    kept = {f"ours, {keep}": Trained(base, case, keep, device) for keep in KEEPS}
    alone, together = (concatenated(trained, base) for trained in (plain, kept["ours, adapter"]))
    rows, calls = {}, {}
    for provider, trained in {PLAIN: plain, **kept}.items():
        # Kept outside, the past is in nobody's forward.
        acts = provider != PLAIN and trained.reg.config.keep_past != "external"
        for mode, error in errors(trained, together if acts else alone).items():
            row = rows[provider, mode] = _row(case, trained, provider, mode)
            row.error = error
            row.gate = GATE["ieee" if mode == PENALTY or case.dtype == torch.float32 else "bf16"]
            calls[provider, mode] = trained.calls()[mode]
    added = Added(kept["ours, adapter"])
    for mode, call in ((FORWARD, added.forward), (BOTH, added.both)):
        row = rows[ADDED, mode] = _row(case, plain, ADDED, mode)
        # Nothing to be wrong about: products of random operands that nobody reads.
        row.error, row.gate, row.held_bytes = 0.0, GATE["ieee"], None
        calls[ADDED, mode] = call
    found = measure_calls(rows, calls, limits, device)
    _compare(found)
    return found


def _row(case: PastCase, trained: Trained, provider: str, mode: str) -> Row:
    layers = len(trained.reg.layers)
    row = Row("past", case.name, mode, provider, layers, layers, baseline=provider == PLAIN)
    row.held_bytes = trained.held_bytes()
    if trained.merge_error:
        row.extra["merge_error"] = trained.merge_error
    return row


def _compare(found: dict[tuple[str, str], tuple[Row, Samples | None]]) -> None:
    """Ratios inside rounds: over plain LoRA, over plain LoRA and the added operations; backward by difference."""
    for (provider, mode), (row, samples) in found.items():
        like = FORWARD if mode == FORWARD else BOTH
        plain, added = found[PLAIN, like][1], found[ADDED, like][1]
        if samples is None or plain is None or mode == PENALTY:
            continue
        if provider != ADDED:
            timing(row, samples, plain)
            _quantiles(row, "over_plain", plain.ratio(samples))
        if provider == "ours, adapter" and mode != EVERYTHING:
            bound = Samples([a + b for a, b in zip(plain.seconds, added.seconds, strict=True)])
            _quantiles(row, "over_plain_and_added", bound.ratio(samples))
        forward = found[provider, FORWARD][1]
        if mode == BOTH and forward is not None:
            pairs = zip(samples.seconds, forward.seconds, strict=True)
            _quantiles(row, "backward_seconds", Samples([both - one for both, one in pairs]))


def _quantiles(row: Row, name: str, samples: Samples) -> None:
    row.extra |= {name: samples.median, f"{name}_p20": samples.quantile(0.2), f"{name}_p80": samples.quantile(0.8)}


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in CASES])
def bench_past(case, limits, device, report_all):
    report_all(measure_past(case, limits._replace(budget=8 * limits.budget), device))
