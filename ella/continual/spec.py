"""A continual run as a yaml file: read, checked, turned into the objects it names.

Sections and their keys are checked against the dataclasses they build, so an unknown key is an error that lists the
known ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from ella.config import EllaConfig

from .arms import arm_class
from .checks import MIN_LENGTH, check_count, check_kind, check_temperature, check_template, float_dtype
from .docstrings import docstring_tasks
from .models import LoraSettings, TextClassifier, build_classifier
from .questions import question_tasks
from .stream import StreamConfig
from .tasks import ORDERS, Task, load_benchmark, read_task

__all__ = ["ModelSettings", "SpecError", "StreamSpec", "TaskSettings", "load_spec", "parse_spec"]


# Fields of a StreamConfig that a file sets elsewhere.
_NOT_SHARED = ("arm", "settings", "label", "order", "seed", "ella")


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
class TaskSettings:
    """Section ``tasks``: one of ``benchmark`` (with ``order``), ``folders``, ``docstrings`` or
    ``questions``, and sizes.

    ``order`` is a list of names or the name of an order of the literature, e.g. "standard-1".
    """

    benchmark: str | None = None
    order: list | str | None = None
    folders: list | None = None
    docstrings: list | None = None
    questions: list | None = None
    train_examples: int | None = None
    test_examples: int | None = None

    def load(self, base: Path) -> list[Task]:
        """The tasks in order; relative paths start at ``base``."""
        if self.benchmark is not None:
            order = ORDERS[self.order] if isinstance(self.order, str) else self.order or ()
            return load_benchmark(base / self.benchmark, order)
        if self.folders is not None:
            return [read_task(base / folder) for folder in self.folders]
        sizes = {"train_per_task": self.train_examples, "test_per_task": self.test_examples}
        given = {name: size for name, size in sizes.items() if size is not None}
        if self.questions is not None:
            return question_tasks(self.questions, **given)
        return docstring_tasks(self.docstrings or (), **given)


@dataclass(frozen=True)
class StreamSpec:
    """A checked stream file. ``config`` holds the settings all arms share; ``base`` is the file's folder."""

    model: ModelSettings
    lora: LoraSettings
    tasks: TaskSettings
    config: StreamConfig
    arms: tuple[str, ...] = ("ella",)
    seeds: tuple[int, ...] = (0,)
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

    def tasks_of_seed(self) -> Callable[[int], list[Task]]:
        """The tasks are read once; the returned function draws a seed's examples from them."""
        tasks = self.tasks.load(self.base)
        return lambda seed: [t.subset(self.tasks.train_examples, self.tasks.test_examples, seed) for t in tasks]


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
    known = ("title", "model", "lora", "tasks", "arms", "seeds", "ella", "training", "out")
    data = _mapping(data, "the file")
    _known_keys(data, known, "the file")
    if "tasks" not in data:
        raise SpecError("section 'tasks' is missing; expected benchmark, folders, docstrings or questions")

    lora_data = _mapping(data.get("lora"), "lora")
    if lora_data.get("target_modules") is not None and not isinstance(lora_data["target_modules"], str):
        lora_data["target_modules"] = tuple(_list(lora_data["target_modules"], str, "lora.target_modules"))
    tasks = _build(TaskSettings, data["tasks"], "tasks")
    _check_tasks(tasks)
    arms = _list(data.get("arms", ["ella"]), str, "arms")
    for arm in arms:
        try:
            arm_class(arm)
        except ValueError as error:
            raise SpecError(f"arms: {error}") from None
    training = _mapping(data.get("training"), "training")
    _known_keys(training, [f.name for f in fields(StreamConfig) if f.name not in _NOT_SHARED], "training")
    config = _build(StreamConfig, training | {"ella": _build(EllaConfig, data.get("ella"), "ella")}, "training")
    seeds = _list(data.get("seeds", [0]), int, "seeds")
    for name, values in (("arms", arms), ("seeds", seeds)):
        repeated = [value for value in dict.fromkeys(values) if values.count(value) > 1]
        if repeated:
            raise SpecError(f"{name}: {repeated} stand more than once")
    return StreamSpec(
        model=_build(ModelSettings, data.get("model"), "model"),
        lora=_build(LoraSettings, lora_data, "lora"),
        tasks=tasks,
        config=config,
        arms=tuple(arms),
        seeds=tuple(seeds),
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
    if (tasks.order is not None) != (tasks.benchmark is not None):
        raise SpecError("tasks: 'order' belongs to 'benchmark', and 'benchmark' needs it")
    if isinstance(tasks.order, str) and tasks.order not in ORDERS:
        raise SpecError(
            f"tasks.order: unknown order {tasks.order!r}; expected a list of names or one of {sorted(ORDERS)}"
        )
    for name in ("order", "folders", "docstrings", "questions"):
        value = getattr(tasks, name)
        if value is not None and not (name == "order" and isinstance(value, str)):
            _list(value, str, f"tasks.{name}")
    for name in ("train_examples", "test_examples"):
        value = getattr(tasks, name)
        if value is not None and value < 1:
            raise SpecError(f"tasks.{name}: expected at least 1, found {value}")


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
