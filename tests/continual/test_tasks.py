"""Tasks from folders, datasets and lists; bad input named; subsets balanced and repeatable."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from ella.continual import Task, TaskError, load_benchmark, read_task
from ella.continual.tasks import ORDERS

RECORDS = [{"sentence": f"text {i}", "label": "yes" if i % 3 else "no"} for i in range(12)]


def write_task(folder: Path, labels=("no", "yes"), **splits) -> Path:
    folder.mkdir(parents=True)
    for name, value in {"train": RECORDS, "dev": RECORDS[:2], "test": RECORDS[:4], "labels": labels, **splits}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


def test_reads_the_folder_layout(tmp_path):
    task = read_task(write_task(tmp_path / "SC" / "mood"))
    assert (task.name, task.labels) == ("mood", ("no", "yes"))
    assert (task.train, task.dev, task.test) == (tuple(RECORDS), tuple(RECORDS[:2]), tuple(RECORDS[:4]))
    assert read_task(write_task(tmp_path / "nodev", dev=None)).dev == ()


def test_extra_keys_of_a_record_are_dropped(tmp_path):
    task = read_task(write_task(tmp_path / "t", train=[{"sentence": "a", "label": "no", "id": 7}]))
    assert task.train == ({"sentence": "a", "label": "no"},)


def test_text_is_utf8(tmp_path):
    folder = write_task(tmp_path / "t", train=None)
    (folder / "train.json").write_bytes('[{"sentence": "Grüße 漢", "label": "no"}]'.encode())
    assert read_task(folder).train[0]["sentence"] == "Grüße 漢"


@pytest.mark.parametrize(
    "splits, message",
    [
        ({"train": None}, r"missing file .*train\.json"),
        ({"test": None}, r"missing file .*test\.json"),
        ({"labels": None}, r"missing file .*labels\.json"),
        ({"train": "[{"}, r"train\.json is not readable as UTF-8 json"),
        ({"train": {"a": 1}}, r"train\.json holds dict; expected a list of records"),
        ({"labels": {"no": 0}}, r"labels\.json holds dict; expected a list of label texts"),
        ({"labels": [0, 1]}, r"labels\.json.*expected a list of label texts"),
        ({"labels": []}, "task 't' has no labels"),
        ({"labels": ["no", "yes", "no"]}, r"lists labels more than once: \['no'\]"),
        ({"labels": ["no", "maybe"]}, r"train\[1\]: label 'yes' is not one of the labels \['no', 'maybe'\]"),
        ({"train": [{"sentence": "a", "lable": "no"}]}, r"record 0: expected keys 'sentence' and 'label', found"),
        ({"train": ["a"]}, r"record 0: expected keys 'sentence' and 'label', found str"),
        ({"test": [{"sentence": None, "label": "no"}]}, "found NoneType and str"),
        ({"test": [{"sentence": "a", "label": 2}]}, "label 2 is outside the 2 labels"),
        ({"test": [{"sentence": "a", "label": True}]}, "found str and bool"),
        ({"train": []}, "empty train split"),
    ],
)
def test_a_bad_folder_is_named(tmp_path, splits, message):
    with pytest.raises(TaskError, match=message):
        read_task(write_task(tmp_path / "t", **splits))


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(TaskError, match=r"no task folder at .*gone"):
        read_task(tmp_path / "gone")
    with pytest.raises(TaskError, match=r"no benchmark folder at .*gone"):
        load_benchmark(tmp_path / "gone", ["a"])


def test_a_benchmark_is_read_in_order_and_any_case(tmp_path):
    write_task(tmp_path / "TC" / "AgNews")
    write_task(tmp_path / "SC" / "amazon")
    write_task(tmp_path / "flat")
    assert [t.name for t in load_benchmark(tmp_path, ["amazon", "agnews", "FLAT"])] == ["amazon", "AgNews", "flat"]


def test_benchmark_errors(tmp_path):
    write_task(tmp_path / "TC" / "news")
    with pytest.raises(TaskError, match=r"no task 'yahoo' below .*found \['news'\]"):
        load_benchmark(tmp_path, ["news", "yahoo"])
    write_task(tmp_path / "SC" / "News")
    with pytest.raises(TaskError, match="'news' stands in 2 folders"):
        load_benchmark(tmp_path, ["news"])
    write_task(tmp_path / "SC" / "half", train=None)
    with pytest.raises(TaskError, match=r"missing file .*half/train\.json"):
        load_benchmark(tmp_path, ["half"])


def test_task_checks_what_it_is_given():
    with pytest.raises(TaskError, match=r"task 't', test\[0\]: expected keys 'sentence' and 'label', found \['text'\]"):
        Task("t", tuple(RECORDS), ({"text": "a"},), ("no", "yes"))
    with pytest.raises(TaskError, match=r"train\[0\]: expected text in 'label', found list"):
        Task("t", ({"sentence": "a", "label": ["no"]},), tuple(RECORDS), ("no", "yes"))


def test_datasets_with_a_class_label():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "answer": datasets.ClassLabel(names=["neg", "pos"])}
    )
    data = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "answer": [1, 0, 1]}, features=features)
    task = Task.from_records("d", data, data.select([1]), sentence_column="text", label_column="answer")
    assert task.labels == ("neg", "pos")
    assert [r["label"] for r in task.train] == ["pos", "neg", "pos"]
    assert task.test == ({"sentence": "b", "label": "neg"},)
    renamed = Task.from_records("d", data, data, labels=["bad", "good"], sentence_column="text", label_column="answer")
    assert [r["label"] for r in renamed.train] == ["good", "bad", "good"]


def class_labels(names, answers):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=names)})
    rows = {"sentence": [f"text {i}" for i in range(len(answers))], "label": answers}
    return datasets.Dataset.from_dict(rows, features=features)


def found(task) -> dict[str, list[str]]:
    return {split: [r["label"] for r in getattr(task, split)] for split in ("train", "dev", "test")}


ORDERED, TURNED = ["entails", "neutral", "contradicts"], ["contradicts", "entails", "neutral"]


@pytest.mark.parametrize("labels", [None, ORDERED, TURNED, ["neutral", "contradicts", "entails"], [*TURNED, "other"]])
def test_every_split_has_names_of_its_own(labels):
    task = Task.from_records(
        "nli",
        class_labels(ORDERED, [0, 1, 2]),
        class_labels(TURNED, [0, 1, 2]),
        dev=class_labels(["neutral", "entails"], [0, 1]),
        labels=labels,
    )
    assert task.labels == tuple(labels or ORDERED)
    assert found(task) == {"train": ORDERED, "dev": ["neutral", "entails"], "test": TURNED}


def test_renamed_labels_follow_the_names():
    words = ["yes", "perhaps", "no"]
    task = Task.from_records("nli", class_labels(ORDERED, [0, 1, 2]), class_labels(TURNED, [0, 1, 2]), labels=words)
    assert found(task) == {"train": words, "dev": [], "test": ["no", "yes", "perhaps"]}
    one = Task.from_records(
        "nli", class_labels(ORDERED, [0, 1]), class_labels(TURNED, [0]), labels=[*ORDERED[:2], "no"]
    )
    assert found(one)["test"] == ["no"] and one.labels == ("entails", "neutral", "no")


def test_splits_without_names_are_read_with_the_labels_or_those_of_train():
    plain = [{"sentence": "a", "label": 2}]
    assert found(Task.from_records("nli", class_labels(ORDERED, [0]), plain))["test"] == ["contradicts"]
    assert found(Task.from_records("nli", plain, plain, labels=TURNED))["test"] == ["neutral"]
    assert found(Task.from_records("nli", class_labels(ORDERED, [0]), plain, labels=["a", "b", "c"]))["test"] == ["c"]
    with pytest.raises(TaskError, match=r"test\[0\]: label 2 is 'neutral' by the labels .* 'contradicts' by the names"):
        Task.from_records("nli", class_labels(ORDERED, [0]), plain, labels=TURNED)
    # The names of test say nothing about the numbers of train.
    with pytest.raises(TaskError, match=r"train\[0\]: label 2 is a number; pass labels="):
        Task.from_records("nli", plain, class_labels(ORDERED, [0]))
    texts = [{"sentence": str(i), "label": name} for i, name in enumerate(ORDERED)]
    assert found(Task.from_records("nli", texts, class_labels(TURNED, [0, 2])))["test"] == ["contradicts", "neutral"]


@pytest.mark.parametrize(
    "test_names, labels",
    [
        (["entailment", "not_entailment"], None),
        (["Entails", "Neutral", "Contradicts"], None),
        (["a", "b", "c"], ["yes", "perhaps", "no"]),
        (ORDERED, ["yes", "no"]),
        (ORDERED, ["neutral", "maybe", "contradicts"]),
    ],
)
def test_names_that_are_no_labels_are_refused_with_both(test_names, labels):
    with pytest.raises(TaskError) as caught:
        Task.from_records("nli", class_labels(ORDERED, [1, 0]), class_labels(test_names, [0]), labels=labels)
    message = str(caught.value)
    assert "task 'nli', t" in message and str(list(labels or ORDERED)) in message
    assert str(test_names) in message


def test_lists_of_records():
    task = Task.from_records("l", RECORDS, RECORDS[:3])
    assert task.labels == ("no", "yes") and task.train == tuple(RECORDS)
    numbered = [{"sentence": "a", "label": 1}, {"sentence": "b", "label": 0}]
    assert Task.from_records("l", numbered, numbered, labels=["x", "y"]).train[0]["label"] == "y"
    with pytest.raises(TaskError, match=r"task 'l', train\[0\]: label 1 is a number; pass labels="):
        Task.from_records("l", numbered, numbered)
    with pytest.raises(TaskError, match="label 1 is outside the 1 labels"):
        Task.from_records("l", numbered, numbered, labels=["x"])
    with pytest.raises(TaskError, match=r"test\[0\]: label 'maybe' is not one of"):
        Task.from_records("l", RECORDS, [{"sentence": "a", "label": "maybe"}])


def uneven() -> Task:
    records = tuple({"sentence": f"{k} {i}", "label": k} for k, n in (("a", 20), ("b", 5), ("c", 2)) for i in range(n))
    return Task("uneven", records, records, ("a", "b", "c"))


def test_subsets_are_balanced():
    task = uneven().subset(train=6, test=12)
    assert Counter(r["label"] for r in task.train) == {"a": 2, "b": 2, "c": 2}
    # A class that runs out leaves its share to the others.
    assert Counter(r["label"] for r in task.test) == {"a": 5, "b": 5, "c": 2}
    assert len({r["sentence"] for r in task.test}) == 12
    assert set(map(str, task.test)) <= set(map(str, uneven().test))


def test_subsets_repeat_by_seed():
    first, again, other = (uneven().subset(9, 9, seed) for seed in (3, 3, 4))
    assert first == again
    assert first.train != other.train and first.test != other.test
    # Not the same draw twice: train and test choose apart.
    assert first.train != first.test


def test_subsets_do_not_depend_on_the_process_hash():
    chosen = [r["sentence"] for r in uneven().subset(4, 1, seed=0).train]
    assert chosen == ["a 1", "b 3", "c 0", "a 8"]


def test_a_subset_larger_than_the_task_is_the_task():
    assert uneven().subset(100, 27) == uneven() == uneven().subset()


@pytest.mark.parametrize("size", [0, -1, 1.5, "4", True, float("nan")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_a_size_that_is_no_count_is_named(split, size):
    with pytest.raises(TaskError, match=f"task 'uneven', {split}: a split of {size!r} records was asked for; expected"):
        uneven().subset(**{split: size})


def test_labels_are_texts():
    with pytest.raises(TaskError, match="task 'rated': label 1 is no text; expected the name of each class in order"):
        Task.from_records("rated", [{"sentence": "good", "label": 0}], [{"sentence": "bad", "label": 0}], labels=[1, 0])


def test_classes_are_dealt_to_tasks():
    labels = ("a", "b", "c", "d", "e")
    rows = tuple({"sentence": f"{k} {i}", "label": k} for i in range(3) for k in labels)
    task = Task("five", rows, rows[5:], labels, rows[10:])
    first, second = task.split_classes(2)
    assert (first.name, first.labels, second.name, second.labels) == ("five 1", ("a", "c", "e"), "five 2", ("b", "d"))
    for split in ("train", "dev", "test"):
        given = getattr(task, split)
        for part in (first, second):
            assert getattr(part, split) == tuple(row for row in given if row["label"] in part.labels)
    (alone,) = task.split_classes(1)
    assert (alone.labels, alone.train) == (task.labels, task.train)
    with pytest.raises(TaskError, match="task 'five' has 5 classes; expected at least 6 for 3 tasks of two or more"):
        task.split_classes(3)
    with pytest.raises(ValueError, match="parts is 0; expected an integer of at least 1"):
        task.split_classes(0)


def test_fingerprints_see_every_change():
    task = uneven()
    swapped = Task(task.name, task.train[::-1], task.test, task.labels)
    shifted = Task(task.name, task.train[:-1], (*task.test, task.train[-1]), task.labels)
    relabelled = Task(task.name, task.train, task.test, ("a", "c", "b"))
    renamed = Task("other", task.train, task.test, task.labels)
    assert task.fingerprint() == uneven().fingerprint()
    prints = [t.fingerprint() for t in (task, swapped, shifted, relabelled, renamed, task.subset(6, 6))]
    assert len(set(prints)) == len(prints)


def test_orders_of_the_literature():
    assert {len(order) for name, order in ORDERS.items() if name.startswith("standard")} == {4}
    longs = [order for name, order in ORDERS.items() if name.startswith("long")]
    assert len(longs) == 3 and all(sorted(order) == sorted(longs[0]) and len(set(order)) == 15 for order in longs)
    assert len(set(ORDERS["trace-7"])) == len(ORDERS["trace-7"]) == 8


@pytest.mark.skipif("ELLA_BENCHMARK_DIR" not in os.environ, reason="ELLA_BENCHMARK_DIR names no benchmark folder")
def test_a_real_benchmark_folder():
    tasks = load_benchmark(os.environ["ELLA_BENCHMARK_DIR"], ["dbpedia", "amazon", "agnews", "mnli"])
    assert [len(task.labels) for task in tasks] == [14, 5, 4, 3]
    for task in tasks:
        small = task.subset(8 * len(task.labels), len(task.labels), seed=1)
        assert set(Counter(r["label"] for r in small.train).values()) == {8}
        assert set(Counter(r["label"] for r in small.test).values()) == {1}
        assert not {r["sentence"] for r in task.train} & {r["sentence"] for r in task.test}
