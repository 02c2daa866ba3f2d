"""The continual run: task after task into one model, with a matrix of what is still known.

The methods (:mod:`ella.continual.arms`) differ in nothing but what they do before a task, in a step and after it. Every
task starts from a seed made of (seed, task index), so a run resumed after task i continues as if it had never stopped,
and methods with the same seed see the same batches.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ella.config import EllaConfig
from ella.knowledge import past_of
from ella.regularizer import EllaRegularizer

from .arms import OLD_NAMES, Arm, FoldingArm, arm_class, arm_settings, task_seed
from .checks import check_count, check_number
from .classifier import EncodedTask, TextClassifier
from .environment import source_commit
from .first import FirstTask
from .general import General, check_general
from .metrics import NAN, AccuracyMatrix
from .state import StreamState, adapter_parameters
from .tasks import AnyTask, TextTask
from .texts import cuts_together
from .tracking import Tracker

__all__ = ["StreamConfig", "StreamResult", "run_stream"]

#: Those of transformers that need no setting of their own.
SCHEDULES = ("constant", "linear", "cosine")
# Settings of a run that section ``training`` of a stream file does not set for all methods: what it is, and what has
# a section of its own.
_OF_A_RUN = ("arm", "settings", "label", "order", "seed", "ella", "general")


@dataclass(frozen=True)
class StreamConfig:
    """Settings of a run; the optimiser is AdamW, new for every task.

    ``arm`` names a method of :data:`ella.continual.arms.ARMS`, ``settings`` what is set of it: fields of its
    ``Settings``, and of ``ella`` for this method alone. ``label`` is what the run is called where one method stands
    with several settings, ``order`` what the order of its tasks is called. ``evaluate`` is "seen" (tasks so far and
    the next one, which zero-shot forward transfer needs) or "all". ``lr_scheduler_type`` is "constant", "linear" or
    "cosine": the rate over the steps of each task, as in transformers. ``dropout`` False trains in eval mode: no
    dropout anywhere. ``ella`` holds the penalty of ELLA; methods that fold take how the past is kept from it.
    ``general`` is what generators are asked before the first task and after the last.
    """

    arm: str = "ella"
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""
    order: str = ""
    seed: int = 0
    learning_rate: float = 2e-3
    lr_scheduler_type: str = "constant"
    weight_decay: float = 0.0
    epochs: int = 1
    batch_size: int = 16
    eval_batch_size: int = 64
    max_grad_norm: float | None = 1.0
    dropout: bool = False
    evaluate: str = "seen"
    ella: EllaConfig = field(default_factory=EllaConfig)
    general: General | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arm", OLD_NAMES.get(self.arm, self.arm))
        arm_settings(self.arm, self.settings, self.ella)
        if self.evaluate not in ("seen", "all"):
            raise ValueError(f"evaluate is {self.evaluate!r}; expected 'seen' or 'all'")
        for name in ("epochs", "batch_size", "eval_batch_size"):
            check_count(name, getattr(self, name))
        check_number("learning_rate", self.learning_rate, above=0)
        check_number("weight_decay", self.weight_decay, least=0)
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type is {self.lr_scheduler_type!r}; expected one of {list(SCHEDULES)}")
        if not isinstance(self.dropout, bool):
            raise ValueError(f"dropout is {self.dropout!r}; expected True or False")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"seed is {self.seed!r}; expected an integer")
        norm = self.max_grad_norm
        if norm is not None and (not isinstance(norm, (int, float)) or isinstance(norm, bool) or not norm > 0):
            raise ValueError(f"max_grad_norm is {norm!r}; expected a number above 0, or None")

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.label or self.arm

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain json."""
        return asdict(self)

    def shared(self) -> dict[str, Any]:
        """The settings of all methods."""
        return training_settings(self.to_dict()) | {"seed": self.seed}

    def identity(self) -> dict[str, Any]:
        """The settings that this run's numbers depend on."""
        return (
            self.shared()
            | {"arm": self.arm, "general": asdict(self.general) if self.general else None}
            | arm_class(self.arm).identity(*arm_settings(self.arm, self.settings, self.ella))
        )

    def make_arm(self, classifier: TextClassifier, train: Callable[[int], EncodedTask]) -> Arm:
        """The method, around a freshly built classifier."""
        settings, ella = arm_settings(self.arm, self.settings, self.ella)
        return arm_class(self.arm)(classifier, self.seed, settings, ella, train)


def training_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a run of ``config``, a :meth:`StreamConfig.to_dict`, trains: what section ``training`` of a file sets."""
    return {name: value for name, value in config.items() if name not in _OF_A_RUN}


@dataclass
class StreamResult:
    """What a run leaves: the matrix, one dict per task of costs and losses, and the sizes of the past.

    ``tasks[i]`` holds ``name``, ``steps``, ``seconds`` (training), ``penalty_seconds``, ``loss`` and ``penalty``
    (means over the last fifth of the steps), ``method_seconds`` (what the method does before and after the task),
    ``evaluation_seconds``, ``state_bytes`` (what is carried on after it), ``peak_bytes`` (of the GPU, else of the
    process), and for methods with a past ``interference``, ``‖ΔW ⊙ W_past‖_F²`` of its update by layer, normalised as
    ``ella`` says. ``state_bytes`` are those after the last task, ``dense_bytes`` what a float32 (out, in) past of the
    same layers would take. ``general`` holds the scores "before" the first task and "after" the last, by task of
    lm-eval, where they were asked for. ``commits`` are those of the source checkout that trained it, several where it
    was resumed at another; empty for an installed package.
    """

    config: dict[str, Any]
    matrix: AccuracyMatrix
    tasks: list[dict[str, Any]] = field(default_factory=list)
    state_bytes: int = 0
    dense_bytes: int = 0
    layers: int = 0
    general: dict[str, dict[str, float]] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def arm(self) -> str:
        """What the run is called: its label, or its method's name."""
        return self.config["label"] or self.config["arm"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def seconds(self) -> float:
        """Of training, evaluation and what the method does between tasks, which runs saved before lack."""
        return math.fsum(t["seconds"] + t["evaluation_seconds"] + t.get("method_seconds", 0.0) for t in self.tasks)

    def penalty_share(self) -> float:
        """Penalty time over step time, over the tasks that had a past; NaN when there were none."""
        later = [t for t in self.tasks[1:] if t["penalty_seconds"] > 0]
        return sum(t["penalty_seconds"] for t in later) / sum(t["seconds"] for t in later) if later else NAN

    def to_dict(self) -> dict[str, Any]:
        """Plain json; the inverse is :meth:`from_dict`."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return own | {"matrix": self.matrix.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StreamResult:
        return cls(**{**data, "matrix": AccuracyMatrix.from_dict(data["matrix"])})


def run_stream(
    classifier: TextClassifier,
    tasks: Sequence[AnyTask],
    config: StreamConfig | None = None,
    out_dir: str | Path | None = None,
    *,
    untrained: Sequence[float] | None = None,
    general_before: Mapping[str, float] | None = None,
    first_dir: str | Path | None = None,
    progress: bool = True,
    tracker: Tracker | None = None,
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
        general_before: what ``config.general`` asks, of the model before training, likewise.
        first_dir: where the adapter after the first task is kept for other methods: what begins as plain LoRA, with the
            same seed, settings, model and examples, takes it from there instead of training it again.
        progress: show tqdm bars.
        tracker: told losses and scores as they come; closed by the caller.
        on_task_end: called with (task index, result so far) once a task is evaluated and saved.

    Raises ValueError for no tasks or repeated names, and when ``out_dir`` holds another run (the message lists what
    differs), the classifier already carries a past, labels or a record are lost in the tokenizer, an encoder is to
    write texts, or losses, weights or scores stop being finite; ImportError where a metric's package or lm-eval is
    missing; OSError when another process is running in ``out_dir``, or nothing can be written there.
    """
    config = config or StreamConfig()
    check_general(config.general, classifier.kind)
    names = [task.name for task in tasks]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"expected at least one task and distinct names, found {names}")
    if past_of(classifier.model, classifier.adapter_name) is not None:
        raise ValueError("the classifier already carries a past; build a fresh one for every run")

    others = _trained_beside(classifier)
    if others:
        raise ValueError(
            f"the model trains {others[:4]} ({len(others)} in all) beside the adapter {classifier.adapter_name!r}; a "
            "stream saves and resets the adapter's factors only: leave out modules_to_save and bias, freeze the rest"
        )

    run: dict[str, Any] = {
        "config": config.identity(),
        "model": classifier.describe(),
        "tasks": {task.name: task.fingerprint() for task in tasks},
        "order": names,
    }
    if tracker:
        called = {"label": config.name, "order": config.order, "tasks": names}
        tracker.describe(run["config"] | called | {"model": run["model"]})
    first = None
    if first_dir is not None and arm_class(config.arm).begins_plain:
        begun = {"config": config.shared(), "model": run["model"], "first": tasks[0].fingerprint()}
        first = FirstTask(first_dir, json.loads(json.dumps(begun)))
    known = untrained, general_before
    if out_dir is None:
        return _run_tasks(classifier, tasks, config, None, first, known, progress, tracker, on_task_end)
    state = StreamState(out_dir, run, {"config": StreamConfig(arm=config.arm).identity(), "model": {"lora": {}}})
    with state.running():
        return _run_tasks(classifier, tasks, config, state, first, known, progress, tracker, on_task_end)


def _run_tasks(
    classifier: TextClassifier,
    tasks: Sequence[AnyTask],
    config: StreamConfig,
    state: StreamState | None,
    first: FirstTask | None,
    known: tuple[Sequence[float] | None, Mapping[str, float] | None],
    progress: bool,
    tracker: Tracker | None,
    on_task_end: Callable[[int, StreamResult], None] | None,
) -> StreamResult:
    names = [task.name for task in tasks]
    saved = state.load() if state else None
    loaded = _saved_result(saved, state) if state and saved else None
    # A finished run is read, not measured again.
    finished = loaded is not None and len(loaded.tasks) == len(tasks)
    train = _Encoded(classifier, tasks)
    # What a tokenizer loses of a later task is said now, not after hours of training.
    with cuts_together():
        test = [] if finished else [_encode(classifier, task, "test") for task in tasks]
        for index in range(len(loaded.tasks) if loaded else 0, len(tasks)):
            train(index)

    arm = config.make_arm(classifier, train)
    arm.n_tasks = len(tasks)
    if state is None or loaded is None:
        arm.begin()
        result = StreamResult(config.to_dict(), AccuracyMatrix(names))
        result.dense_bytes, result.layers = arm.dense_bytes()
        untrained, general_before = known
        if config.general:
            measured = general_before or config.general.measure(classifier, config.eval_batch_size)
            result.general["before"] = dict(measured)
        if untrained is None:
            untrained = [
                _accuracy(classifier, name, t, config)
                for name, t in zip(names, tqdm(test, "untrained", disable=not progress, leave=False), strict=True)
            ]
        result.matrix = AccuracyMatrix(names, untrained=list(untrained))
    else:
        result = loaded
        _resume(arm, state, names[: len(result.tasks)])

    if tracker and not finished:
        tracker.begin(classifier.model, sum(task["steps"] for task in result.tasks))
    if not finished and (commit := source_commit()) and commit not in result.commits:
        result.commits.append(commit)
    for index in range(len(result.tasks), len(tasks)):
        task = tasks[index]
        start = time.perf_counter()
        arm.before_task(index)
        method_seconds = time.perf_counter() - start
        label = f"{config.name}/{config.seed} {index + 1}/{len(tasks)} {task.name}"
        record = {"name": task.name} | _trained(
            arm, first if index == 0 else None, config, index, label, progress, tracker
        )
        if tracker:
            tracker.end_task(record["steps"])
        interference = arm.interference(index)
        if interference is not None:
            record["interference"] = interference
        start = time.perf_counter()
        arm.after_task(index, task.name)
        record["method_seconds"] = method_seconds + time.perf_counter() - start
        start = time.perf_counter()
        result.matrix.add_row(_evaluate(arm, result.matrix, test, config, index))
        record |= {
            "evaluation_seconds": time.perf_counter() - start,
            "state_bytes": arm.state_bytes(),
            "peak_bytes": _peak_bytes(classifier),
        }
        result.tasks.append(record)
        result.state_bytes = record["state_bytes"]
        if state:
            state.save(index, task.name, result.to_dict(), arm)
        if tracker:
            tracker.scores(names, result.matrix.rows[-1][: index + 1])
        if on_task_end:
            on_task_end(index, result)
    if config.general and "after" not in result.general:
        # The last task is saved by now: what is asked may take long, and may fail.
        result.general["after"] = config.general.measure(classifier, config.eval_batch_size)
        if state:
            state.save(len(tasks) - 1, names[-1], result.to_dict(), arm)
    return result


def _trained_beside(classifier: TextClassifier) -> list[str]:
    """Names of what is trained and is not the adapter's."""
    own = adapter_parameters(classifier.model, classifier.adapter_name)
    return [name for name, p in classifier.model.named_parameters() if p.requires_grad and name not in own]


class _Encoded:
    """Training records by task, tokenised once; all are kept, as a method may mix them."""

    def __init__(self, classifier: TextClassifier, tasks: Sequence[AnyTask]) -> None:
        self._classifier, self._tasks = classifier, tasks
        self._made: dict[int, EncodedTask] = {}

    def __call__(self, index: int) -> EncodedTask:
        if index not in self._made:
            self._made[index] = _encode(self._classifier, self._tasks[index], "train")
        return self._made[index]


def _trained(
    arm: Arm,
    first: FirstTask | None,
    config: StreamConfig,
    index: int,
    label: str,
    progress: bool,
    tracker: Tracker | None,
) -> dict[str, Any]:
    """Train a task, or take what another method has trained; what it cost."""
    record = None if first is None else first.load(arm)
    if record is None:
        record = _train(arm, config, index, label, progress, tracker)
        if first is not None:
            first.save(arm, record)
    return record


def _train(
    arm: Arm, config: StreamConfig, index: int, label: str, progress: bool, tracker: Tracker | None
) -> dict[str, Any]:
    from transformers import get_scheduler

    model = arm.model
    seed = task_seed(config.seed, index)
    torch.manual_seed(seed)
    model.train(config.dropout)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    batches = [b for epoch in range(config.epochs) for b in arm.batches(index, config.batch_size, seed + epoch)]
    schedule = get_scheduler(config.lr_scheduler_type, optimizer, 0, len(batches))
    losses: list[torch.Tensor] = []
    penalties: list[torch.Tensor] = []
    penalty_seconds = 0.0
    start = time.perf_counter()
    with tqdm(batches, label, disable=not progress, leave=False) as bar:
        for step, (task, rows) in enumerate(bar):
            optimizer.zero_grad(set_to_none=True)
            loss = arm.classifier.loss(task, rows)
            loss.backward()
            before = time.perf_counter()
            penalty = arm.extra_gradient(index)
            if penalty is not None:
                penalties.append(penalty.detach())
                penalty_seconds += time.perf_counter() - before
            if config.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            # Reading a value waits for the device, so not on every step.
            if (progress or tracker) and step % 10 == 0:
                now, added = float(losses[-1]), float(penalties[-1]) if penalties else 0.0
                bar.set_postfix(loss=f"{now:.3f}", penalty=f"{added:.2e}")
                if tracker:
                    tracker.step(step, now, added)
    seconds = time.perf_counter() - start
    model.eval()
    if losses:
        _check_training(model, torch.stack(losses), label)
    tail = max(1, len(losses) // 5)
    return {
        "steps": len(batches),
        "seconds": seconds,
        "penalty_seconds": penalty_seconds,
        "loss": math.fsum(map(float, losses[-tail:])) / tail if losses else NAN,
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


def _encode(classifier: TextClassifier, task: AnyTask, split: str) -> EncodedTask:
    with _naming(task.name, split):
        if isinstance(task, TextTask):
            return classifier.encode_texts(task, split)
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
    arm: Arm, matrix: AccuracyMatrix, test: list[EncodedTask], config: StreamConfig, index: int
) -> list[float]:
    """Row ``index`` of the matrix: NaN for tasks that the method and the setting leave out."""
    wanted = arm.evaluated(index, len(test), config.evaluate == "all")
    row = [_accuracy(arm.classifier, matrix.tasks[j], t, config) if j in wanted else NAN for j, t in enumerate(test)]
    return [*matrix.rows[-1][:index], *row[index:]] if arm.keeps_scores() and index > 0 else row


def _peak_bytes(classifier: TextClassifier) -> int:
    """The most memory taken so far: of the GPU's allocator, else of this process."""
    if classifier.device.type == "cuda":
        return torch.cuda.max_memory_allocated(classifier.device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    # Linux counts KiB, macOS bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _resume(arm: Arm, state: StreamState, finished: list[str]) -> None:
    regularizer = None
    if isinstance(arm, FoldingArm):
        if state.past_dir is None:
            raise ValueError(f"{state.folder} has no saved past, which its method goes on from; restore its past/")
        regularizer = EllaRegularizer.from_pretrained(arm.model, str(state.past_dir))
        if regularizer.tasks != finished:
            raise ValueError(f"{state.past_dir} holds the past of {regularizer.tasks}; expected that of {finished}")
    arm.resume(finished, regularizer, state.tensors())
    state.load_adapter(arm.model, arm.adapter)


def _saved_result(saved: dict[str, Any], state: StreamState) -> StreamResult:
    try:
        return StreamResult.from_dict(saved["result"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{state.folder}: the saved result is damaged ({error}); delete it to start over") from error
