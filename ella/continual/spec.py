"""A continual run as a yaml file: read, checked, turned into the objects it names.

Sections and their keys are checked against the dataclasses they build, so an unknown key is an error that lists the
known ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ella.config import EllaConfig

from .arms import ARMS, OLD_NAMES, arm_class, arm_settings
from .checks import MIN_LENGTH, check_count, check_kind, check_temperature, check_template, float_dtype
from .classifier import TextClassifier
from .compare import Cell
from .docstrings import docstring_tasks
from .general import General
from .models import LoraSettings, build_classifier
from .questions import question_tasks
from .stream import StreamConfig, training_settings
from .tasks import ORDERS, AnyTask, TaskError, TextTask, find_tasks, load_benchmark, read_task

__all__ = ["ModelSettings", "SpecError", "StreamSpec", "TaskSettings", "load_spec", "parse_spec"]


# What section ``training`` sets, or an arm for itself.
_SHARED = list(training_settings(StreamConfig().to_dict()))


class SpecError(ValueError):
    """A stream file that cannot be used: names the section and key, what was found and what was expected."""


@dataclass(frozen=True)
class ModelSettings:
    """Section ``model``; see :func:`ella.continual.models.build_classifier`."""

    path: str | None = None
    kind: str = "auto"
    max_length: int = 128
    temperature: float = 20.0
    template: str | None = None
    dtype: str = "float32"
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Raises ValueError for what is wrong with any model: nothing need be loaded or read to say it."""
        check_kind(self.kind)
        check_count("max_length", self.max_length, MIN_LENGTH)
        check_temperature(self.temperature)
        check_template(self.template)
        float_dtype(self.dtype)


@dataclass(frozen=True)
class LoadedTasks:
    """The tasks of a file by name, the names of each order, and what each order names that is not there."""

    tasks: dict[str, AnyTask]
    orders: dict[str, tuple[str, ...]]
    left_out: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for order, names in self.orders.items():
            _distinct(names, f"tasks of order {order!r}" if order else "tasks", "; expected tasks of different names")


@dataclass(frozen=True)
class TaskSettings:
    """Section ``tasks``: ``benchmark`` (with ``order`` or ``orders``), ``folders``, ``docstrings`` or ``questions``.

    ``order`` is a list of names or the name of an order of the literature, e.g. "standard-1"; ``orders`` lists several,
    each the name of one or ``{name: text, tasks: [...]}``. ``missing`` says what becomes of a task that is not below
    ``benchmark``: "error", or "leave_out"; None leaves out of the literature's orders only. ``answer_tokens`` bounds
    what is learned and written of an answer where answers are free texts.
    """

    benchmark: str | None = None
    order: list | str | None = None
    orders: list | None = None
    missing: str | None = None
    folders: list | None = None
    docstrings: list | None = None
    questions: list | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    answer_tokens: int | None = None

    def load(self, base: Path) -> LoadedTasks:
        """All tasks; relative paths start at ``base``. Raises TaskError, and SpecError for two of one name."""
        loaded = self._load(base)
        if self.answer_tokens is None:
            return loaded
        tasks = {
            name: replace(task, answer_tokens=self.answer_tokens) if isinstance(task, TextTask) else task
            for name, task in loaded.tasks.items()
        }
        return replace(loaded, tasks=tasks)

    def _load(self, base: Path) -> LoadedTasks:
        tasks: Sequence[AnyTask]
        if self.benchmark is not None:
            return self._load_benchmark(base / self.benchmark)
        if self.folders is not None:
            tasks = [read_task(base / folder) for folder in self.folders]
        else:
            sizes = {"train_per_task": self.train_examples, "test_per_task": self.test_examples}
            given = {name: size for name, size in sizes.items() if size is not None}
            asked = self.questions is not None
            tasks = (
                question_tasks(self.questions or (), **given)
                if asked
                else docstring_tasks(self.docstrings or (), **given)
            )
        return LoadedTasks({task.name: task for task in tasks}, {"": tuple(task.name for task in tasks)})

    def _load_benchmark(self, root: Path) -> LoadedTasks:
        found = find_tasks(root)
        read: dict[str, AnyTask] = {}
        orders, left_out = {}, {}
        for order, names in self.named_orders().items():
            may_miss = self.missing == "leave_out" or (self.missing is None and order in ORDERS)
            there = [name for name in names if name.lower() in found or not may_miss]
            if not there:
                raise TaskError(
                    f"no task of order {order!r} below {root}: expected some of {list(names)}, "
                    f"found {sorted(found) or 'no task folders'}"
                )
            for name in there:
                if name.lower() not in read:
                    (read[name.lower()],) = load_benchmark(root, [name])
            orders[order] = tuple(read[name.lower()].name for name in there)
            left_out[order] = tuple(name for name in names if name not in there)
        return LoadedTasks({task.name: task for task in read.values()}, orders, left_out)

    def named_orders(self) -> dict[str, Sequence[str]]:
        """The orders of a benchmark by name; a single list has none: ""."""
        if self.orders is None:
            return {self.order: ORDERS[self.order]} if isinstance(self.order, str) else {"": self.order or ()}
        pairs = ((e, ORDERS[e]) if isinstance(e, str) else (e["name"], e["tasks"]) for e in self.orders)
        return dict(pairs)


@dataclass(frozen=True)
class StreamSpec:
    """A checked stream file. ``config`` holds the settings all arms share, ``arms`` those of each.

    ``base`` is the file's folder. A :class:`~ella.continual.compare.Source`: it can be pickled.
    """

    model: ModelSettings
    lora: LoraSettings
    tasks: TaskSettings
    config: StreamConfig
    arms: tuple[StreamConfig, ...] = (StreamConfig(),)
    seeds: tuple[int, ...] = (0,)
    report_to: tuple[str, ...] = ()
    out: str = "stream_out"
    title: str = "A continual run"
    base: Path = field(default=Path())

    def build(self) -> TextClassifier:
        """A fresh classifier."""
        path = self.model.path
        # A name that is no folder beside the file is a hub name.
        if path is not None and (self.base / path).is_dir():
            path = str(self.base / path)
        return build_classifier(**{**vars(self.model), "path": path}, lora=self.lora)

    @cached_property
    def loaded(self) -> LoadedTasks:
        """The tasks, read when first asked for. Raises what :meth:`TaskSettings.load` does."""
        return self.tasks.load(self.base)

    def cells(self) -> list[Cell]:
        """Orders, in each the seeds, in each the arms."""
        return [
            Cell(replace(arm, order=order, seed=seed), names)
            for order, names in self.loaded.orders.items()
            for seed in self.seeds
            for arm in self.arms
        ]

    def tasks_of(self, cell: Cell) -> list[AnyTask]:
        """The tasks of a cell, each with the examples that the seed draws."""
        return self._sized(cell.tasks, cell.config.seed)

    def _sized(self, names: Iterable[str], seed: int) -> list[AnyTask]:
        sizes = self.tasks.train_examples, self.tasks.test_examples
        return [self.loaded.tasks[name].subset(*sizes, seed) for name in names]

    def chosen(
        self,
        labels: Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        data: str | None = None,
        orders: Sequence[str] | None = None,
    ) -> StreamSpec:
        """With these arms, seeds and orders only, and the benchmark folder ``data``; None: what the file says.

        Raises ValueError for a label or an order there is not, and for ``data`` where the tasks are not a benchmark's.
        """
        if data is not None and self.tasks.benchmark is None:
            raise ValueError("--data is a benchmark folder, and this stream's tasks are none of a benchmark's")
        # Where the command was given, not beside the file.
        tasks = self.tasks if data is None else replace(self.tasks, benchmark=str(Path(data).resolve()))
        if orders is not None:
            known = list(self.tasks.named_orders())
            unknown = [name for name in orders if name not in known]
            if unknown:
                raise ValueError(f"no orders {unknown} in this stream; it has {known}")
            kept = [e for e in tasks.orders or () if (e if isinstance(e, str) else e["name"]) in orders]
            tasks = replace(tasks, orders=kept or None)
        names = [arm.name for arm in self.arms]
        labels = names if labels is None else [OLD_NAMES.get(label, label) for label in labels]
        unknown = [label for label in labels if label not in names]
        if unknown:
            raise ValueError(f"no arms {unknown} in this stream; it has {names}")
        seeds = self.seeds if seeds is None else tuple(dict.fromkeys(seeds))
        return replace(self, arms=tuple(arm for arm in self.arms if arm.name in labels), seeds=seeds, tasks=tasks)

    def notes(self) -> dict[str, str]:
        """What a report says of the model, of the adapter and of the tasks that ran."""
        targets, model = self.lora.target_modules, self.model
        where = ", ".join([targets] if isinstance(targets, str) else targets) if targets else "its default modules"
        longest = f"at most {model.max_length} tokens a text, {model.dtype}"
        notes = {
            "model": f"{model.path or 'the packaged MiniLM'}, kind {model.kind}, {longest}",
            "adapter": f"LoRA r = {self.lora.r}, α = {self.lora.alpha:g}, dropout {self.lora.dropout:g}, on {where}",
            "examples (train/test)": "; ".join(
                f"{task.name} {len(task.train)}/{len(task.test)}" for task in self._sized(self.loaded.tasks, 0)
            ),
        }
        for order, names in self.loaded.orders.items():
            missing = self.loaded.left_out.get(order)
            without = f"; without {', '.join(missing)}, not there" if missing else ""
            told = (_with_metric(self.loaded.tasks[name]) for name in names)
            notes[f"tasks of {order}" if order else "tasks"] = ", ".join(told) + without
        return notes


def _with_metric(task: AnyTask) -> str:
    return f"{task.name} ({task.metric})" if isinstance(task, TextTask) else task.name


def load_spec(path: str | Path) -> StreamSpec:
    """Read and check a stream file. Raises :class:`SpecError`."""
    import yaml

    path = Path(path)
    try:
        return parse_spec(_read_yaml(path.read_text(encoding="utf-8")), path.resolve().parent)
    except FileNotFoundError:
        raise SpecError(f"no stream file at {path}") from None
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: bytes that are no text, a date that is none
        raise SpecError(f"{path} is not yaml: {error}") from error


def _read_yaml(text: str) -> Any:
    """``yaml.safe_load``, but a key that stands twice is refused instead of the first being forgotten."""
    import yaml

    class Loader(yaml.SafeLoader):
        # As the file is read: later a mapping also holds what was merged into it (<<), which its own keys override.
        def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            lines: dict[Any, int] = {}
            for key_node, _ in node.value:
                if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                    continue
                key, line = self.construct_object(key_node), key_node.start_mark.line + 1
                if key in lines:
                    raise SpecError(f"line {line}: key {key!r} stands on line {lines[key]} already; keep one of them")
                lines[key] = line
            return node

    return yaml.load(text, Loader)


def parse_spec(data: Any, base: Path = Path()) -> StreamSpec:
    """Check a stream's mapping; see ``examples/stream.yaml`` for one with every key."""
    known = ("title", "model", "lora", "tasks", "arms", "seeds", "ella", "training", "general", "out")
    data = _mapping(data, "the file")
    _known_keys(data, known, "the file")
    if "tasks" not in data:
        raise SpecError("section 'tasks' is missing; expected benchmark, folders, docstrings or questions")

    lora_data = _mapping(data.get("lora"), "lora")
    if lora_data.get("target_modules") is not None and not isinstance(lora_data["target_modules"], str):
        lora_data["target_modules"] = tuple(_list(lora_data["target_modules"], str, "lora.target_modules"))
    tasks = _build(TaskSettings, data["tasks"], "tasks")
    _check_tasks(tasks)
    training = _mapping(data.get("training"), "training")
    _known_keys(training, [*_SHARED, "report_to"], "training")
    report_to = _report_to(training.pop("report_to", None))
    own = {"ella": _build(EllaConfig, data.get("ella"), "ella"), "general": _general(data.get("general"))}
    config = _build(StreamConfig, training | own, "training")
    arms = _arms(data.get("arms", ["ella"]), config)
    lora = _build(LoraSettings, lora_data, "lora")
    if lora.dropout and not any(arm.dropout for arm in arms):
        raise SpecError(
            f"lora.dropout is {lora.dropout}, but training.dropout is false: nothing would be dropped; set "
            "training.dropout: true, or leave lora.dropout out"
        )
    seeds = _list(data.get("seeds", [0]), int, "seeds")
    _distinct(seeds, "seeds")
    return StreamSpec(
        model=_build(ModelSettings, data.get("model"), "model"),
        lora=lora,
        tasks=tasks,
        config=config,
        arms=tuple(arms),
        seeds=tuple(seeds),
        report_to=report_to,
        out=_text(data.get("out", "stream_out"), "out"),
        title=_text(data.get("title", "A continual run"), "title"),
        base=base,
    )


def _check_tasks(tasks: TaskSettings) -> None:
    given = [name for name in ("benchmark", "folders", "docstrings", "questions") if getattr(tasks, name) is not None]
    if len(given) != 1:
        raise SpecError(
            f"tasks: expected exactly one of benchmark, folders, docstrings, questions; found {given or 'none'}"
        )
    ordered = [name for name in ("order", "orders") if getattr(tasks, name) is not None]
    if len(ordered) != (tasks.benchmark is not None):
        raise SpecError(
            f"tasks: 'order' belongs to 'benchmark', and 'benchmark' needs it or 'orders'; found {ordered or 'neither'}"
        )
    if isinstance(tasks.order, str):
        _check_order(tasks.order, "tasks.order")
    for name in ("order", "folders", "docstrings", "questions"):
        value = getattr(tasks, name)
        if value is not None and not (name == "order" and isinstance(value, str)):
            _distinct(_list(value, str, f"tasks.{name}"), f"tasks.{name}")
    if tasks.orders is not None:
        _check_orders(tasks.orders)
    if tasks.missing not in (None, "error", "leave_out") or (tasks.missing and tasks.benchmark is None):
        raise SpecError(f"tasks.missing: expected error or leave_out, of a benchmark; found {tasks.missing!r}")
    for name in ("train_examples", "test_examples", "answer_tokens"):
        value = getattr(tasks, name)
        if value is not None and value < 1:
            raise SpecError(f"tasks.{name}: expected at least 1, found {value}")


def _check_order(name: str, where: str) -> None:
    if name not in ORDERS:
        raise SpecError(f"{where}: unknown order {name!r}; expected a list of names or one of {sorted(ORDERS)}")


def _check_orders(orders: Any) -> None:
    if not isinstance(orders, list) or not orders:
        raise SpecError(f"tasks.orders: expected a list of names or {{name: ..., tasks: [...]}}, found {orders!r}")
    names = []
    for entry in orders:
        if isinstance(entry, str):
            _check_order(entry, "tasks.orders")
            names.append(entry)
            continue
        own = _mapping(entry, "tasks.orders")
        _known_keys(own, ("name", "tasks"), "tasks.orders")
        name = _text(own.get("name"), "tasks.orders, name")
        if name in ORDERS:
            raise SpecError(f"tasks.orders: {name!r} is an order of the literature; give these tasks another name")
        _distinct(_list(own.get("tasks"), str, f"tasks.orders, {name}"), f"tasks.orders, {name}")
        names.append(name)
    _distinct(names, "tasks.orders")


def _arms(entries: Any, shared: StreamConfig) -> list[StreamConfig]:
    if not isinstance(entries, list) or not entries or not all(isinstance(e, (str, Mapping)) for e in entries):
        raise SpecError(f"arms: expected a list of names or {{arm: name, ...}}, found {entries!r}")
    arms = [_arm({"arm": entry} if isinstance(entry, str) else dict(entry), shared) for entry in entries]
    _distinct([arm.name for arm in arms], "arms", "; tell them apart with 'as'")
    return arms


def _arm(entry: dict[str, Any], shared: StreamConfig) -> StreamConfig:
    """``arm``, ``as``, and settings: of the method, of ELLA's where it reads them, and of the training."""
    name = _text(entry.pop("arm", None), "arms, arm")
    try:
        kind = arm_class(name)
    except ValueError as error:
        raise SpecError(f"arms: {error}") from None
    where = f"arms, {name}"
    label = _text(entry.pop("as"), f"{where}, as") if "as" in entry else ""
    if (label in ARMS or label in OLD_NAMES) and arm_class(label) is not kind:
        raise SpecError(f"{where}, as: {label!r} is another method; call this one something else")
    known = {f.name: f for f in (*fields(EllaConfig), *fields(kind.Settings)) if f.name in entry}
    own: dict[str, Any] = {}
    training: dict[str, Any] = {}
    for key, value in entry.items():
        if key in _SHARED and key not in {f.name for f in fields(kind.Settings)}:
            training[key] = value
        elif key in known:
            default = known[key].default
            own[key] = _typed(value, None if default is MISSING else default, str(known[key].type), f"{where}.{key}")
        else:
            own[key] = value
    try:
        arm_settings(name, own, shared.ella)
    except (TypeError, ValueError) as error:
        raise SpecError(f"arms: {error}" if str(error).startswith("arm ") else f"{where}: {error}") from error
    base = {key: getattr(shared, key) for key in (*_SHARED, "ella", "general")}
    return _build(StreamConfig, base | training | {"arm": name, "label": label, "settings": own}, where)


def _general(data: Any) -> General | None:
    if data is None:
        return None
    own = _mapping(data, "general")
    if "tasks" not in own:
        raise SpecError("general: expected 'tasks', names of lm-eval's tasks; found none")
    return _build(General, own, "general")


def _report_to(names: Any) -> tuple[str, ...]:
    if names is None or names == []:
        return ()
    found = _list(names, str, "training.report_to")
    _distinct(found, "training.report_to")
    return tuple(found)


def _distinct(values: Sequence[Any], where: str, advice: str = "") -> None:
    repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
    if repeated:
        raise SpecError(f"{where}: {repeated} stand more than once{advice}")


def _build(kind: type, data: Any, where: str) -> Any:
    data = _mapping(data, where)
    _known_keys(data, [f.name for f in fields(kind)], where)
    for f in fields(kind):
        if f.name in data:
            default = f.default if f.default is not MISSING else None
            data[f.name] = _typed(data[f.name], default, str(f.type), f"{where}.{f.name}")
    try:
        return kind(**data)
    except (TypeError, ValueError) as error:
        # Settings that are used without a file too name their section themselves.
        raise SpecError(str(error) if str(error).startswith(f"{where}.") else f"{where}: {error}") from error


def _typed(value: Any, default: Any, annotation: str, where: str) -> Any:
    """A value of the field's kind. Yaml reads 1e-3 as text (it wants 1.0e-3), so numbers in text are accepted."""
    if value is None and ("None" in annotation or default is None):
        return value
    if annotation.startswith("float"):
        try:
            return float(str(value) if isinstance(value, bool) else value)
        except (OverflowError, TypeError, ValueError):
            if "str" in annotation and isinstance(value, str):
                return value
            raise SpecError(f"{where}: expected a number, found {value!r}") from None
    if annotation.startswith("int") and (not isinstance(value, int) or isinstance(value, bool)):
        raise SpecError(f"{where}: expected an integer, found {value!r}")
    if annotation.startswith("bool") and not isinstance(value, bool):
        raise SpecError(f"{where}: expected true or false, found {value!r}")
    if annotation.startswith("str") and not isinstance(value, str):
        raise SpecError(f"{where}: expected text, found {value!r}")
    return value


def _mapping(data: Any, where: str) -> dict[str, Any]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise SpecError(f"{where}: expected keys with values, found {type(data).__name__}")
    return dict(data)


def _known_keys(data: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise SpecError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")


def _list(data: Any, kind: type, where: str) -> list:
    if not isinstance(data, list) or not data or not all(type(item) is kind for item in data):
        raise SpecError(f"{where}: expected a list of {'texts' if kind is str else 'integers'}, found {data!r}")
    return data


def _text(data: Any, where: str) -> str:
    if not isinstance(data, str) or not data:
        raise SpecError(f"{where}: expected text, found {data!r}")
    return data
