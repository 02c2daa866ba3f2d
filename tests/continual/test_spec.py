"""Stream files: the example loads, every mistake is named with its section and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ella.continual import TaskError
from ella.continual.spec import SpecError, load_spec, parse_spec
from ella.continual.tasks import ORDERS

from .test_tasks import write_task

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stream.yaml"


def test_the_example_loads():
    spec = load_spec(EXAMPLE)
    assert spec.arms == ("inclora", "ella") and spec.seeds == (0,) and spec.out == "stream_out"
    assert spec.tasks.docstrings == ["python", "transformers", "torch"]
    assert spec.config.ella.normalize is None and spec.config.ella.ella_lambda == "auto"
    assert spec.config.learning_rate == 2e-3 and spec.config.dropout is False
    assert spec.model.max_length == 64 and spec.lora.target_modules == ("query", "value")
    assert spec.base == EXAMPLE.parent


def test_the_example_names_every_key():
    """Each key of the checked sections stands in the example, commented or not."""
    from dataclasses import fields

    from ella.continual.models import LoraSettings
    from ella.continual.spec import ModelSettings, TaskSettings
    from ella.continual.stream import StreamConfig

    text = EXAMPLE.read_text(encoding="utf-8")
    for kind in (ModelSettings, LoraSettings, TaskSettings, StreamConfig):
        for f in fields(kind):
            if kind is StreamConfig and f.name in ("arm", "settings", "label", "order", "seed"):
                continue
            assert f"{f.name}:" in text, (kind.__name__, f.name)


def test_what_the_example_builds():
    spec = load_spec(EXAMPLE)
    classifier = spec.build()
    assert classifier.kind == "encoder" and classifier.max_length == 64
    told = classifier.describe()
    assert (told["r"], told["alpha"], told["target_modules"]) == (8, 16, ["query", "value"])


def test_defaults():
    spec = parse_spec({"tasks": {"docstrings": ["numpy"]}})
    assert spec.arms == ("ella",) and spec.seeds == (0,) and spec.model.path is None
    assert spec.config.ella == type(spec.config.ella)()


def test_numbers_that_yaml_reads_as_text():
    data = yaml.safe_load("{tasks: {docstrings: [numpy]}, training: {learning_rate: 1e-3}, ella: {ella_lambda: 3e4}}")
    assert isinstance(data["training"]["learning_rate"], str)
    spec = parse_spec(data)
    assert spec.config.learning_rate == 1e-3 and spec.config.ella.ella_lambda == 3e4
    whole = parse_spec({"tasks": {"docstrings": ["numpy"]}, "training": {"max_grad_norm": None, "weight_decay": 0}})
    assert whole.config.max_grad_norm is None and whole.config.weight_decay == 0.0


def test_target_modules_as_text_or_list():
    def targets(value):
        return parse_spec({"tasks": {"docstrings": ["numpy"]}, "lora": {"target_modules": value}}).lora.target_modules

    assert targets("all-linear") == "all-linear"
    assert targets(["q", "v"]) == ("q", "v")
    assert targets(None) is None


GOOD = {"tasks": {"docstrings": ["numpy"]}}


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "the file: expected keys with values, found list"),
        (None, "section 'tasks' is missing"),
        ({"tasks": None}, "tasks: expected exactly one of benchmark, folders, docstrings, questions; found none"),
        ({**GOOD, "task": 1, 7: 2}, r"the file: unknown keys \['7', 'task'\]; known are \['arms', 'ella'"),
        ({**GOOD, "model": {"paths": "x"}}, r"model: unknown keys \['paths'\]; known are"),
        ({**GOOD, "lora": {"rank": 8}}, r"lora: unknown keys \['rank'\]"),
        ({**GOOD, "ella": {"lambda": 8}}, r"ella: unknown keys \['lambda'\]"),
        ({**GOOD, "training": {"seed": 8}}, r"training: unknown keys \['seed'\]"),
        ({**GOOD, "training": {"ella": {}}}, r"training: unknown keys \['ella'\]"),
        ({"tasks": {"docstring": ["numpy"]}}, r"tasks: unknown keys \['docstring'\]"),
        ({"tasks": ["numpy"]}, "tasks: expected keys with values, found list"),
        ({**GOOD, "model": "minilm"}, "model: expected keys with values, found str"),
        ({"tasks": {"docstrings": ["numpy"], "folders": ["a"]}}, r"found \['folders', 'docstrings'\]"),
        ({"tasks": {"benchmark": "x"}}, "'benchmark' needs it"),
        ({"tasks": {"docstrings": ["numpy"], "order": ["a"]}}, "'order' belongs to 'benchmark'"),
        ({"tasks": {"benchmark": "x", "order": "standard-9"}}, r"unknown order 'standard-9'.*long-4"),
        ({"tasks": {"benchmark": "x", "order": []}}, r"tasks.order: expected a list of texts, found \[\]"),
        ({"tasks": {"benchmark": 3, "order": ["a"]}}, "tasks.benchmark: expected text, found 3"),
        ({"tasks": {"folders": "a"}}, "tasks.folders: expected a list of texts, found 'a'"),
        ({"tasks": {"docstrings": "numpy"}}, "tasks.docstrings: expected a list of texts, found 'numpy'"),
        ({"tasks": {"docstrings": [1]}}, r"tasks.docstrings: expected a list of texts, found \[1\]"),
        ({"tasks": {"docstrings": ["numpy"], "train_examples": 0}}, "tasks.train_examples: expected at least 1"),
        ({"tasks": {"docstrings": ["numpy"], "test_examples": 1.5}}, "test_examples: expected an integer, found 1.5"),
        ({**GOOD, "arms": "ella"}, "arms: expected a list of texts, found 'ella'"),
        ({**GOOD, "arms": ["swim"]}, "arms: arm is 'swim'; expected one of"),
        ({**GOOD, "arms": ["ella", "ella"]}, r"arms: \['ella'\] stand more than once"),
        ({**GOOD, "seeds": 3}, "seeds: expected a list of integers, found 3"),
        ({**GOOD, "seeds": [True]}, "seeds: expected a list of integers"),
        ({**GOOD, "seeds": [1, 2, 1]}, r"seeds: \[1\] stand more than once"),
        ({**GOOD, "out": None}, "out: expected text, found None"),
        ({**GOOD, "title": 3}, "title: expected text, found 3"),
        ({**GOOD, "training": {"learning_rate": "fast"}}, "training.learning_rate: expected a number, found 'fast'"),
        ({**GOOD, "training": {"learning_rate": True}}, "training.learning_rate: expected a number, found True"),
        ({**GOOD, "training": {"learning_rate": -1}}, "training: learning_rate is -1.0; expected a finite number"),
        ({**GOOD, "training": {"learning_rate": "nan"}}, "learning_rate is nan; expected a finite number"),
        ({**GOOD, "training": {"max_grad_norm": -1}}, "max_grad_norm is -1.0; expected a number above 0, or None"),
        ({**GOOD, "training": {"epochs": 0}}, "epochs is 0; expected an integer of at least 1"),
        ({**GOOD, "training": {"epochs": 1.5}}, "training.epochs: expected an integer, found 1.5"),
        ({**GOOD, "training": {"epochs": None}}, "training.epochs: expected an integer, found None"),
        ({**GOOD, "training": {"dropout": "no"}}, "training.dropout: expected true or false, found 'no'"),
        ({**GOOD, "training": {"evaluate": "some"}}, "evaluate is 'some'; expected 'seen' or 'all'"),
        ({**GOOD, "ella": {"penalty": "l2"}}, "ella: penalty must be one of 'hadamard', 'spectral', found 'l2'"),
        ({**GOOD, "ella": {"ella_lambda": -1}}, "ella: ella_lambda must be finite and at least 0"),
        ({**GOOD, "ella": {"past_rank": True}}, "ella.past_rank: expected an integer, found True"),
        ({**GOOD, "lora": {"target_modules": [1]}}, "lora.target_modules: expected a list of texts"),
        ({**GOOD, "lora": {"r": "8"}}, "lora.r: expected an integer, found '8'"),
        ({**GOOD, "model": {"device": 0}}, "model.device: expected text, found 0"),
        ({**GOOD, "model": {"max_length": None}}, "model.max_length: expected an integer, found None"),
        ({**GOOD, "lora": {"r": 0}}, "^lora.r is 0; expected an integer of at least 1$"),
        ({**GOOD, "lora": {"alpha": float("nan")}}, "^lora.alpha is nan; expected a finite number above 0$"),
        ({**GOOD, "lora": {"alpha": 0}}, "^lora.alpha is 0.0; expected a finite number above 0$"),
        ({**GOOD, "lora": {"alpha": 10**400}}, "^lora.alpha: expected a number, found 1000"),
        ({**GOOD, "lora": {"dropout": 1}}, "^lora.dropout is 1.0; expected a finite number of at least 0 and below 1$"),
        ({**GOOD, "lora": {"dropout": -0.1}}, "^lora.dropout is -0.1; expected"),
        ({**GOOD, "lora": {"target_modules": ""}}, "^lora.target_modules is ''; expected names of modules"),
        ({**GOOD, "model": {"temperature": float("nan")}}, "model: temperature must be above 0, found nan"),
        ({**GOOD, "model": {"temperature": "inf"}}, "model: temperature must be above 0, found inf; expected a finite"),
        ({**GOOD, "model": {"kind": "tree"}}, "model: unknown model kind 'tree'; expected 'auto' or one of"),
        ({**GOOD, "model": {"dtype": "int8"}}, "model: unknown dtype 'int8'; expected e.g. 'float32'"),
        ({**GOOD, "model": {"template": "Answer:"}}, r"model: the prompt template needs the field {sentence} once"),
        ({**GOOD, "model": {"max_length": -1}}, "model: max_length is -1; expected an integer of at least 4"),
        (
            {**GOOD, "training": {"weight_decay": "nan"}},
            "training: weight_decay is nan; expected a finite number of at",
        ),
        ({**GOOD, "training": {"weight_decay": -0.1}}, "training: weight_decay is -0.1; expected"),
        ({**GOOD, "training": {"max_grad_norm": "nan"}}, "max_grad_norm is nan; expected a number above 0, or None"),
    ],
)
def test_mistakes_are_named(data, message):
    with pytest.raises(SpecError, match=message):
        parse_spec(data)


def test_files(tmp_path):
    with pytest.raises(SpecError, match=r"no stream file at .*gone\.yaml"):
        load_spec(tmp_path / "gone.yaml")
    path = tmp_path / "s.yaml"
    path.write_text("tasks: [")
    with pytest.raises(SpecError, match=r"s\.yaml is not yaml"):
        load_spec(path)
    path.write_bytes(b"title: \xff\xfe")
    with pytest.raises(SpecError, match=r"s\.yaml is not yaml"):
        load_spec(path)
    path.write_text("title: 2024-13-45")
    with pytest.raises(SpecError, match=r"s\.yaml is not yaml: month must be in 1"):
        load_spec(path)
    path.write_text("tasks: {docstrings: [numpy]}\nepochs: 3\n")
    with pytest.raises(SpecError, match=r"s\.yaml: the file: unknown keys \['epochs'\]"):
        load_spec(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("tasks: {folders: [a]}\nseeds: [0]\ntasks: {folders: [b]}", "line 3: key 'tasks' stands on line 1 already"),
        ("tasks:\n  folders: [a]\n  folders: [b]\n", "line 3: key 'folders' stands on line 2 already; keep one"),
        ("tasks: {folders: [a]}\nlora: {r: 4, alpha: 8, 'r': 16}", "line 2: key 'r' stands on line 2 already"),
        ("tasks: {folders: [a]}\nseeds: [{a: 1, a: 1}]", "line 2: key 'a' stands on line 2 already"),
    ],
)
def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path, text, message):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(SpecError, match=rf"s\.yaml: {message}"):
        load_spec(tmp_path / "s.yaml")


def test_keys_that_only_look_alike_are_kept(tmp_path):
    """The same key in two sections, and one that a merged section is overridden by."""
    path = tmp_path / "s.yaml"
    path.write_text("tasks: {folders: [a]}\nlora: {<<: {r: 4, dropout: 0.1}, r: 2}\ntraining: {dropout: true}\n")
    spec = load_spec(path)
    assert (spec.lora.r, spec.lora.dropout, spec.config.dropout) == (2, 0.1, True)
    # Merged from one that overrides what it merges itself.
    path.write_text("tasks: {folders: [a]}\ntraining: {<<: {<<: {epochs: 4}, epochs: 3}, epochs: 2}\n")
    assert load_spec(path).config.epochs == 2


def test_task_folders_start_at_the_file(tmp_path):
    write_task(tmp_path / "data" / "TC" / "news")
    write_task(tmp_path / "data" / "SC" / "mood")
    path = tmp_path / "s.yaml"
    path.write_text("tasks: {benchmark: data, order: [mood, news], train_examples: 4}\n")
    tasks = load_spec(path).tasks_of_seed()(0)
    assert [t.name for t in tasks] == ["mood", "news"] and {len(t.train) for t in tasks} == {4}
    assert [t.train for t in tasks] != [t.train for t in load_spec(path).tasks_of_seed()(1)]
    path.write_text("tasks: {folders: [data/TC/news]}\n")
    (task,) = load_spec(path).tasks_of_seed()(0)
    assert task.name == "news" and len(task.train) == 12
    path.write_text("tasks: {benchmark: data, order: standard-1}\n")
    with pytest.raises(TaskError, match=rf"no task '{ORDERS['standard-1'][0]}' below"):
        load_spec(path).tasks_of_seed()


def test_docstring_sizes(tmp_path):
    spec = parse_spec({"tasks": {"docstrings": ["numpy"], "train_examples": 12, "test_examples": 6}})
    (task,) = spec.tasks_of_seed()(0)
    assert (len(task.train), len(task.test)) == (12, 6)


def test_a_model_folder_beside_the_file(tmp_path, bert):
    (tmp_path / "model").symlink_to(bert)
    path = tmp_path / "s.yaml"
    path.write_text("tasks: {docstrings: [numpy]}\nmodel: {path: model, temperature: 5}\nlora: {r: 2}\n")
    classifier = load_spec(path).build()
    assert classifier.temperature == 5.0 and classifier.describe()["r"] == 2
