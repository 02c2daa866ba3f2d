"""The continual run: task after task into one model, with a matrix of what is still known.

Four arms differ in nothing but what happens to the adapter:

========  =========================================================================================
"one"     one LoRA adapter trained on through all tasks; no fold, no penalty
"fresh"   a fresh adapter per task, folded into the past at its end; no penalty
"ella"    the same with the ELLA penalty against the past
"alone"   a fresh adapter per task, the earlier ones forgotten: the reference of forward transfer
========  =========================================================================================

Every task starts from a seed made of (seed, task index), so a run resumed after task i continues as if it had never
stopped, and arms with the same seed see the same batches.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ella.config import EllaConfig
from ella.knowledge import parameters_of, past_of, trained_adapter
from ella.lora import adapted_layers
from ella.regularizer import EllaRegularizer

from .checks import check_count, check_number
from .metrics import NAN, AccuracyMatrix
from .models import EncodedTask, TextClassifier
from .state import StreamState
from .tasks import Task

__all__ = ["ARMS", "StreamConfig", "StreamResult", "run_stream"]

ARMS = ("one", "fresh", "ella", "alone")


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a run; the optimiser is AdamW at a constant rate, new for every task.

    ``evaluate`` is "seen" (tasks so far and the next one, which zero-shot forward transfer needs) or "all".
    ``dropout`` False trains in eval mode: no dropout anywhere. ``ella`` holds the penalty of the "ella" arm; the
    "fresh" arm takes only how the past is kept from it.
    """

    arm: str = "ella"
    seed: int = 0
    learning_rate: float = 2e-3
    weight_decay: float = 0.0
    epochs: int = 1
    batch_size: int = 16
    eval_batch_size: int = 64
    max_grad_norm: float | None = 1.0
    dropout: bool = False
    evaluate: str = "seen"
    ella: EllaConfig = field(default_factory=EllaConfig)

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise ValueError(f"arm is {self.arm!r}; expected one of {ARMS}")
        if self.evaluate not in ("seen", "all"):
            raise ValueError(f"evaluate is {self.evaluate!r}; expected 'seen' or 'all'")
        for name in ("epochs", "batch_size", "eval_batch_size"):
            check_count(name, getattr(self, name))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        if not isinstance(self.dropout, bool):
            raise ValueError(f"dropout is {self.dropout!r}; expected True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed is {self.seed!r}; expected an integer")
        norm = self.max_grad_norm
        if norm is not None and (not isinstance(norm, (int, float)) or isinstance(norm, bool) or not norm > 0):
            raise ValueError(f"max_grad_norm is {norm!r}; expected a number above 0, or None")

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain json."""
        return asdict(self)

    def identity(self) -> dict[str, Any]:
        """The settings that this arm's numbers depend on: a run continues under another λ if its arm has none."""
        settings = self.to_dict()
        used = {"ella": None, "fresh": ("past_rank", "keep_past")}.get(self.arm, ())
        if used is not None:
            settings["ella"] = {name: settings["ella"][name] for name in used}
        return settings


@dataclass
class StreamResult:
    """What a run leaves: the matrix, one dict per task of costs and losses, and the sizes of the past.

    ``tasks[i]`` holds ``name``, ``steps``, ``seconds`` (training), ``penalty_seconds``, ``loss`` and ``penalty``
    (means over the last fifth of the steps) and ``evaluation_seconds``. ``state_bytes`` are those of the stored past
    factors, ``dense_bytes`` what a float32 (out, in) past of the same layers would take.
    """

    config: dict[str, Any]
    matrix: AccuracyMatrix
    tasks: list[dict[str, Any]] = field(default_factory=list)
    state_bytes: int = 0
    dense_bytes: int = 0
    layers: int = 0

    @property
    def arm(self) -> str:
        return self.config["arm"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    def penalty_share(self) -> float:
        """Penalty time over step time, over the tasks that had a past; NaN when there were none."""
        later = [t for t in self.tasks[1:] if t["penalty_seconds"] > 0]
        return sum(t["penalty_seconds"] for t in later) / sum(t["seconds"] for t in later) if later else NAN

    def to_dict(self) -> dict[str, Any]:
        """Plain json; the inverse is :meth:`from_dict`."""
        data = {k: getattr(self, k) for k in ("config", "tasks", "state_bytes", "dense_bytes", "layers")}
        return data | {"matrix": self.matrix.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StreamResult:
        return cls(**{**data, "matrix": AccuracyMatrix.from_dict(data["matrix"])})


def run_stream(
    classifier: TextClassifier,
    tasks: Sequence[Task],
    config: StreamConfig | None = None,
    out_dir: str | Path | None = None,
    *,
    untrained: Sequence[float] | None = None,
    progress: bool = True,
    on_task_end: Callable[[int, StreamResult], None] | None = None,
) -> StreamResult:
    """Train ``classifier`` on ``tasks`` one after another and measure what remains.

    Args:
        classifier: freshly built; its adapter is initialised from the seed here, whatever it holds.
        tasks: in stream order, with distinct names.
        config: see :class:`StreamConfig`.
        out_dir: where finished tasks are saved. If it holds the state of the same run, the run continues after its
            last finished task and ends with the same matrix as an unbroken one (with ``keep_past="merge"`` up to
            the rounding of merging the tasks at once).
        untrained: scores of the model before training, where they are known; measured here if None.
        progress: show tqdm bars.
        on_task_end: called with (task index, result so far) once a task is evaluated and saved.

    Raises ValueError for no tasks or repeated names, and when ``out_dir`` holds another run (the message lists what
    differs), the classifier already carries a past, labels or a record are lost in the tokenizer, or losses, weights or
    scores stop being finite; OSError when another process is running in ``out_dir``, or nothing can be written there.
    """
    config = config or StreamConfig()
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one task and distinct names, found {names}")
    if past_of(classifier.model, classifier.adapter_name) is not None:
        raise ValueError("the classifier already carries a past; build a fresh one for every run")

    run = {
        "config": config.identity(),
        "model": classifier.describe(),
        "tasks": {task.name: task.fingerprint() for task in tasks},
        "order": names,
    }
    if out_dir is None:
        return _run_tasks(classifier, tasks, config, None, untrained, progress, on_task_end)
    state = StreamState(out_dir, run)
    with state.running():
        return _run_tasks(classifier, tasks, config, state, untrained, progress, on_task_end)


def _run_tasks(
    classifier: TextClassifier,
    tasks: Sequence[Task],
    config: StreamConfig,
    state: StreamState | None,
    untrained: Sequence[float] | None,
    progress: bool,
    on_task_end: Callable[[int, StreamResult], None] | None,
) -> StreamResult:
    names = [task.name for task in tasks]
    test = [_encode(classifier, task, "test") for task in tasks]
    saved = state.load() if state else None

    if state is None or saved is None:
        _seed_adapter(classifier, config.seed, 0)
        regularizer = _new_regularizer(classifier, config)
        result = StreamResult(config.to_dict(), AccuracyMatrix(names))
        result.dense_bytes, result.layers = _dense_bytes(classifier)
        if untrained is None:
            untrained = [
                _accuracy(classifier, name, t, config)
                for name, t in zip(names, tqdm(test, "untrained", disable=not progress, leave=False), strict=True)
            ]
        result.matrix = AccuracyMatrix(names, untrained=list(untrained))
    else:
        result = _saved_result(saved, state)
        regularizer = _saved_regularizer(classifier, config, state, names[: len(result.tasks)])
        state.load_adapter(classifier.model, _trained(classifier))

    for index in range(len(result.tasks), len(tasks)):
        task = tasks[index]
        # The adapter a task starts from depends on nothing but the seed and the index: that is what resumes exactly.
        if index > 0 and config.arm != "one":
            _seed_adapter(classifier, config.seed, index)
        train = _encode(classifier, task, "train")
        label = f"{config.arm}/{config.seed} {index + 1}/{len(tasks)} {task.name}"
        record = {"name": task.name} | _train(classifier, train, regularizer, config, index, label, progress)
        if regularizer is not None:
            regularizer.end_task(task.name)
        start = time.perf_counter()
        result.matrix.add_row(_evaluate(classifier, names, test, config, index))
        record["evaluation_seconds"] = time.perf_counter() - start
        result.tasks.append(record)
        result.state_bytes = _past_bytes(classifier)
        if state:
            state.save(index, task.name, result.to_dict(), classifier.model, _trained(classifier), regularizer)
        if on_task_end:
            on_task_end(index, result)
    return result


def _train(
    classifier: TextClassifier,
    train: EncodedTask,
    regularizer: EllaRegularizer | None,
    config: StreamConfig,
    index: int,
    label: str,
    progress: bool,
) -> dict[str, Any]:
    model = classifier.model
    seed = task_seed(config.seed, index)
    torch.manual_seed(seed)
    model.train(config.dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = [b for epoch in range(config.epochs) for b in train.batches(config.batch_size, seed + epoch)]
    penalised = regularizer if config.arm == "ella" and index > 0 else None
    losses: list[torch.Tensor] = []
    penalties: list[torch.Tensor] = []
    penalty_seconds = 0.0
    start = time.perf_counter()
    with tqdm(batches, label, disable=not progress, leave=False) as bar:
        for step, rows in enumerate(bar):
            optimizer.zero_grad(set_to_none=True)
            loss = classifier.loss(train, rows)
            loss.backward()
            if penalised is not None:
                before = time.perf_counter()
                penalty = penalised.add_gradient_()
                penalties.append(penalty.detach())
                penalty_seconds += time.perf_counter() - before
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            losses.append(loss.detach())
            # Reading a value waits for the device, so not on every step.
            if progress and step % 10 == 0:
                shown = f"{float(penalties[-1]):.2e}" if penalties else "0"
                bar.set_postfix(loss=f"{float(losses[-1]):.3f}", penalty=shown)
    seconds = time.perf_counter() - start
    model.eval()
    _check_training(model, torch.stack(losses), label)
    tail = max(1, len(batches) // 5)
    return {
        "steps": len(batches),
        "seconds": seconds,
        "penalty_seconds": penalty_seconds,
        "loss": math.fsum(map(float, losses[-tail:])) / tail,
        "penalty": math.fsum(map(float, penalties[-tail:])) / tail if penalties else 0.0,
    }


def _check_training(model: torch.nn.Module, losses: torch.Tensor, label: str) -> None:
    """One loss that is no number has made all weights so; the last update shows in no loss, only in the weights."""
    sound = losses.isfinite()
    found: str | None
    if not sound.all():
        step = int((~sound).nonzero()[0])
        found = f"the loss is {float(losses[step])} in step {step + 1} of {len(losses)}"
    else:
        broken = (n for n, p in model.named_parameters() if p.requires_grad and not p.isfinite().all())
        found = next((f"{name} is not finite after the last step" for name in broken), None)
    if found:
        raise ValueError(f"training diverged in {label}: {found}; try a lower learning_rate")


def _encode(classifier: TextClassifier, task: Task, split: str) -> EncodedTask:
    with _naming(task.name, split):
        return classifier.encode(getattr(task, split), task.labels)


def _accuracy(classifier: TextClassifier, name: str, test: EncodedTask, config: StreamConfig) -> float:
    with _naming(name, "test"):
        return classifier.accuracy(test, config.eval_batch_size)


@contextmanager
def _naming(task: str, split: str) -> Iterator[None]:
    """Says of an error whose records it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"task {task!r}, {split}: {error}") from error


def _evaluate(
    classifier: TextClassifier, names: list[str], test: list[EncodedTask], config: StreamConfig, index: int
) -> list[float]:
    """Row ``index`` of the matrix: NaN for tasks that the arm and the setting leave out."""
    if config.arm == "alone":
        wanted = {index}
    elif config.evaluate == "all":
        wanted = set(range(len(test)))
    else:
        wanted = set(range(index + 2))
    return [_accuracy(classifier, names[j], t, config) if j in wanted else NAN for j, t in enumerate(test)]


def task_seed(seed: int, index: int) -> int:
    """The seed of task ``index``: a 63-bit hash of the pair, the same on every machine."""
    digest = hashlib.sha256(json.dumps([seed, index]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _seed_adapter(classifier: TextClassifier, seed: int, index: int) -> None:
    """Initialise the trainable adapter (A random, B zero) from (seed, index)."""
    torch.manual_seed(task_seed(seed, index))
    for layer in adapted_layers(classifier.model, _trained(classifier)):
        layer.reset(True)


def _new_regularizer(classifier: TextClassifier, config: StreamConfig) -> EllaRegularizer | None:
    return EllaRegularizer(classifier.model, config.ella) if config.arm in ("fresh", "ella") else None


def _saved_regularizer(
    classifier: TextClassifier, config: StreamConfig, state: StreamState, finished: list[str]
) -> EllaRegularizer | None:
    if config.arm not in ("fresh", "ella"):
        return None
    if state.past_dir is None:
        raise ValueError(f"{state.folder} has no saved past, which arm {config.arm!r} goes on from; restore its past/")
    regularizer = EllaRegularizer.from_pretrained(classifier.model, str(state.past_dir))
    if regularizer.tasks != finished:
        raise ValueError(f"{state.past_dir} holds the past of {regularizer.tasks}; expected that of {finished}")
    return regularizer


def _saved_result(saved: dict[str, Any], state: StreamState) -> StreamResult:
    try:
        return StreamResult.from_dict(saved["result"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{state.folder}: the saved result is damaged ({error}); delete it to start over") from error


def _dense_bytes(classifier: TextClassifier) -> tuple[int, int]:
    """(bytes, layers) of a float32 (out, in) past of every layer the adapter is on."""
    layers = adapted_layers(classifier.model, classifier.adapter_name)
    return sum(4 * layer.n_parts * math.prod(layer.shape) for layer in layers), len(layers)


def _past_bytes(classifier: TextClassifier) -> int:
    past = past_of(classifier.model, classifier.adapter_name)
    layers = adapted_layers(classifier.model, _trained(classifier)) if past else []
    return sum(p.numel() * p.element_size() for p in parameters_of(layers, classifier.adapter_name))


def _trained(classifier: TextClassifier) -> str:
    return trained_adapter(classifier.model, classifier.adapter_name)
