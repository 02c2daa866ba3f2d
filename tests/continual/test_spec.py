"""Stream files: the example loads, every mistake is named with its section and key."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ella.continual import TaskError
from ella.continual.spec import SpecError, load_spec, parse_spec

from .test_tasks import write_task

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "stream.yaml"


def names(spec) -> list[str]:
    return [arm.name for arm in spec.arms]


def test_tasks_of_one_name_are_refused_before_anything_runs(tmp_path):
    write_task(tmp_path / "a/things")
    for tasks in (
        {"benchmark": ".", "order": ["things", "THINGS"]},
        {"folders": ["a/things", "a/things/"]},
    ):
        with pytest.raises((TaskError, SpecError), match="stand more than once"):
            parse_spec({"tasks": tasks}, tmp_path).loaded  # noqa: B018


def test_notes_say_what_ran(tmp_path):
    write_task(tmp_path / "a/things")
    data = {"tasks": {"folders": ["a/things"], "train_examples": 2}, "lora": {"r": 4, "target_modules": ["query"]}}
    notes = parse_spec(data | {"model": {"max_length": 32}}, tmp_path).notes()
    assert "at most 32 tokens a text, float32" in notes["model"]
    assert notes["adapter"] == "LoRA r = 4, α = 16, dropout 0, on query"
    assert notes["examples (train/test)"].startswith("things 2/")


def test_the_example_loads():
    spec = load_spec(EXAMPLE)
    assert names(spec) == ["inclora", "ella"] and spec.seeds == (0,) and spec.out == "stream_out"
    assert spec.report_to == ()
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
    assert "report_to:" in text
    # What stands there in remarks is right as well.
    lines = [line.strip().removeprefix("# ") for line in text.splitlines()]
    (entry,) = [line for line in lines if line.startswith("- {arm:")]
    (orders,) = [line for line in lines if line.startswith("orders:")]
    spec = parse_spec({"arms": yaml.safe_load(entry), "tasks": {"benchmark": "x", **yaml.safe_load(orders)}})
    assert names(spec) == ["ELLA λ 1"] and list(spec.tasks.named_orders()) == ["standard-1", "reversed"]


def test_what_the_example_builds():
    spec = load_spec(EXAMPLE)
    classifier = spec.build()
    assert classifier.kind == "encoder" and classifier.max_length == 64
    told = classifier.describe()
    assert (told["r"], told["alpha"], told["target_modules"]) == (8, 16, ["query", "value"])


def test_defaults():
    spec = parse_spec({"tasks": {"docstrings": ["numpy"]}})
    assert names(spec) == ["ella"] and spec.seeds == (0,) and spec.model.path is None
    assert spec.config.ella == type(spec.config.ella)()


def test_numbers_that_yaml_reads_as_text():
    data = yaml.safe_load("{tasks: {docstrings: [numpy]}, training: {learning_rate: 1e-3}, ella: {ella_lambda: 3e4}}")
    assert isinstance(data["training"]["learning_rate"], str)
    spec = parse_spec(data)
    assert spec.config.learning_rate == 1e-3 and spec.config.ella.ella_lambda == 3e4
    whole = parse_spec({"tasks": {"docstrings": ["numpy"]}, "training": {"max_grad_norm": None, "weight_decay": 0}})
    assert whole.config.max_grad_norm is None and whole.config.weight_decay == 0.0


def test_arms_with_settings_of_their_own():
    entries = [
        "fresh",
        "ella",
        {"arm": "ella", "as": "strong", "ella_lambda": "1e1", "past_rank": 4},
        {"arm": "one", "as": "slow", "learning_rate": "1e-5", "epochs": 2},
    ]
    spec = parse_spec({**GOOD, "arms": entries, "ella": {"ella_lambda": 2}, "training": {"epochs": 3}})
    assert names(spec) == ["inclora", "ella", "strong", "slow"]
    inclora, ella, strong, slow = spec.arms
    assert (inclora.arm, inclora.label, slow.arm) == ("inclora", "", "seqlora")
    assert strong.settings == {"ella_lambda": 10.0, "past_rank": 4} and ella.settings == {}
    assert [arm.identity()["ella"]["ella_lambda"] for arm in (ella, strong)] == [2.0, 10.0]
    assert [(arm.learning_rate, arm.epochs) for arm in (ella, slow)] == [(2e-3, 3), (1e-5, 2)]
    only = spec.chosen(["fresh", "strong"], (3, 3))
    assert names(only) == ["inclora", "strong"] and only.seeds == (3,)
    assert names(spec.chosen()) == names(spec)
    with pytest.raises(ValueError, match=r"no arms \['swim'\] in this stream; it has \['inclora', 'ella', 'strong'"):
        spec.chosen(["swim", "ella"])


def test_some_of_the_orders():
    mine = {"name": "mine", "tasks": ["a"]}
    spec = parse_spec({"tasks": {"benchmark": "x", "orders": ["standard-1", mine, "long-4"]}})
    assert spec.chosen(orders=["long-4", "mine"]).tasks.orders == [mine, "long-4"]
    assert spec.chosen().tasks == spec.tasks
    with pytest.raises(
        ValueError, match=r"no orders \['long-6'\] in this stream; it has \['standard-1', 'mine', 'long"
    ):
        spec.chosen(orders=["long-6"])
    alone = parse_spec({"tasks": {"benchmark": "x", "order": "standard-1"}})
    assert alone.chosen(orders=["standard-1"]).tasks == alone.tasks


def test_integrations():
    def report_to(value):
        return parse_spec({**GOOD, "training": {"report_to": value}}).report_to

    assert report_to(None) == report_to([]) == () and report_to(["wandb", "mlflow"]) == ("wandb", "mlflow")


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
        ({**GOOD, "arms": "ella"}, r"arms: expected a list of names or {arm: name, ...}, found 'ella'"),
        ({**GOOD, "arms": [3]}, r"arms: expected a list of names .*, found \[3\]"),
        ({**GOOD, "arms": ["seqlora", "one"]}, r"arms: \['seqlora'\] stand more than once; tell them apart with 'as'"),
        ({**GOOD, "arms": [{"as": "x"}]}, "arms, arm: expected text, found None"),
        ({**GOOD, "arms": [{"arm": "swim"}]}, "arms: arm is 'swim'; expected one of"),
        ({**GOOD, "arms": [{"arm": "ella", "as": 3}]}, "arms, ella, as: expected text, found 3"),
        ({**GOOD, "arms": [{"arm": "ella", "as": "inclora"}]}, "'inclora' is another method; call this one something"),
        ({**GOOD, "arms": [{"arm": "ella", "lamda": 3}]}, r"arms: arm 'ella' has no settings \['lamda'\]; known are"),
        ({**GOOD, "arms": [{"arm": "seqlora", "ella_lambda": 3}]}, r"'seqlora' has no settings \['ella_lambda'\]"),
        ({**GOOD, "arms": [{"arm": "ella", "past_rank": "x"}]}, "arms, ella.past_rank: expected an integer, found 'x'"),
        ({**GOOD, "arms": [{"arm": "ella", "ella_lambda": -1}]}, "arms, ella: ella_lambda must be finite and at least"),
        (
            {**GOOD, "arms": [{"arm": "ella", "epochs": 0}]},
            "arms, ella: epochs is 0; expected an integer of at least 1",
        ),
        ({**GOOD, "training": {"report_to": "wandb"}}, "training.report_to: expected a list of texts, found 'wandb'"),
        ({**GOOD, "training": {"report_to": ["a", "a"]}}, r"training.report_to: \['a'\] stand more than once"),
        ({"tasks": {"benchmark": "x", "order": ["a"], "orders": ["long-4"]}}, r"found \['order', 'orders'\]"),
        ({"tasks": {"docstrings": ["numpy"], "orders": ["long-4"]}}, r"'order' belongs to 'benchmark'.*\['orders'\]"),
        ({"tasks": {"benchmark": "x", "order": ["a", "a"]}}, r"tasks.order: \['a'\] stand more than once"),
        ({"tasks": {"benchmark": "x", "orders": []}}, r"tasks.orders: expected a list of names .*, found \[\]"),
        ({"tasks": {"benchmark": "x", "orders": ["long-9"]}}, "tasks.orders: unknown order 'long-9'"),
        ({"tasks": {"benchmark": "x", "orders": ["long-4", "long-4"]}}, r"tasks.orders: \['long-4'\] stand more than"),
        ({"tasks": {"benchmark": "x", "orders": [3]}}, "tasks.orders: expected keys with values, found int"),
        ({"tasks": {"benchmark": "x", "orders": [{"tasks": ["a"]}]}}, "tasks.orders, name: expected text, found None"),
        ({"tasks": {"benchmark": "x", "orders": [{"name": "n", "task": 1}]}}, r"tasks.orders: unknown keys \['task'\]"),
        ({"tasks": {"benchmark": "x", "orders": [{"name": "n"}]}}, "tasks.orders, n: expected a list of texts"),
        (
            {"tasks": {"benchmark": "x", "orders": [{"name": "long-4", "tasks": ["a"]}]}},
            "is an order of the literature",
        ),
        (
            {"tasks": {"benchmark": "x", "order": ["a"], "missing": "skip"}},
            "tasks.missing: expected error or leave_out",
        ),
        ({**GOOD, "tasks": {"docstrings": ["numpy"], "missing": "error"}}, "leave_out, of a benchmark; found 'error'"),
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
        ({**GOOD, "ella": {"penalty": "l2"}}, "ella: penalty must be one of 'hadamard', 'spectral', 'importance'"),
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
        ({**GOOD, "lora": {"dropout": 0.1}}, "lora.dropout is 0.1, but training.dropout is false: nothing would be"),
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
    path.write_text("tasks: {benchmark: data, order: [mood, news], train_examples: 4}\nseeds: [0, 1]\n")
    spec = load_spec(path)
    first, other = (spec.tasks_of(cell) for cell in spec.cells())
    assert [t.name for t in first] == ["mood", "news"] and {len(t.train) for t in first} == {4}
    assert [t.train for t in first] != [t.train for t in other]
    path.write_text("tasks: {folders: [data/TC/news]}\n")
    spec = load_spec(path)
    (task,) = spec.tasks_of(*spec.cells())
    assert task.name == "news" and len(task.train) == 12


@pytest.fixture
def lacking(tmp_path):
    """A stream of what is given, beside a benchmark that lacks one task of standard-1: yahoo."""
    for folder in ("TC/agnews", "TC/DBpedia", "SC/amazon"):
        write_task(tmp_path / "data" / folder)

    def spec(**tasks):
        return parse_spec({"tasks": {"benchmark": "data", **tasks}, "seeds": [0, 1]}, tmp_path)

    return spec


def test_orders(lacking):
    spec = lacking(orders=["standard-1", {"name": "mine", "tasks": ["agnews", "dbpedia"]}, "standard-3"])
    assert spec.loaded.orders == {
        "standard-1": ("DBpedia", "amazon", "agnews"),
        "mine": ("agnews", "DBpedia"),
        "standard-3": ("amazon", "agnews", "DBpedia"),
    }
    cells = spec.cells()
    assert [(c.config.order, c.config.seed) for c in cells] == [(o, s) for o in spec.loaded.orders for s in (0, 1)]
    assert [task.name for task in spec.tasks_of(cells[2])] == ["agnews", "DBpedia"]
    assert [c.name for c in cells][:3] == ["standard-1-ella-0", "standard-1-ella-1", "mine-ella-0"]
    assert spec.notes()["tasks of standard-1"] == "DBpedia, amazon, agnews; without yahoo, not there"
    assert spec.notes()["tasks of mine"] == "agnews, DBpedia"


def test_tasks_that_are_missing(lacking):
    (order,) = lacking(order="standard-1").loaded.left_out.items()
    assert order == ("standard-1", ("yahoo",))
    for tasks in ({"order": ["amazon", "yahoo"]}, {"orders": [{"name": "mine", "tasks": ["yahoo"]}]}):
        with pytest.raises(TaskError, match=r"no task 'yahoo' below .*data; found \['agnews', 'amazon', 'dbpedia'\]"):
            lacking(**tasks).cells()
    with pytest.raises(TaskError, match="no task 'yahoo' below"):
        lacking(order="standard-1", missing="error").cells()
    lenient = lacking(order=["amazon", "yahoo"], missing="leave_out")
    assert [cell.tasks for cell in lenient.cells()] == [("amazon",)] * 2
    assert [cell.name for cell in lenient.cells()] == ["ella-0", "ella-1"]
    with pytest.raises(TaskError, match=r"no task of order 'trace-7' below .*data: expected some of \['C-STANCE'"):
        lacking(order="trace-7").cells()


def test_docstring_sizes(tmp_path):
    spec = parse_spec({"tasks": {"docstrings": ["numpy"], "train_examples": 12, "test_examples": 6}})
    (task,) = spec.tasks_of(*spec.cells())
    assert (len(task.train), len(task.test)) == (12, 6)


def test_a_model_folder_beside_the_file(tmp_path, bert):
    (tmp_path / "model").symlink_to(bert)
    path = tmp_path / "s.yaml"
    path.write_text("tasks: {docstrings: [numpy]}\nmodel: {path: model, temperature: 5}\nlora: {r: 2}\n")
    classifier = load_spec(path).build()
    assert classifier.temperature == 5.0 and classifier.describe()["r"] == 2
