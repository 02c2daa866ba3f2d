"""Tasks whose answers are free texts: read, drawn, learned, written and scored; a stream of them."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ella.continual import StreamConfig, TaskError, TextTask, load_benchmark, read_task, run_stream
from ella.continual.demo import run_demo
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.scores import score
from ella.continual.spec import parse_spec
from ella.continual.tasks import ORDERS, TRACE_METRICS

from . import tiny

WORDS = [word for words in tiny.WORDS.values() for word in words]
PAIRS = zip(WORDS, WORDS[3:] + WORDS[:3], strict=True)
RECORDS = [{"prompt": f"they spoke of {a} and {b}\nAnswer:", "answer": f"{b} {a}"} for a, b in PAIRS]


def swapped(name: str, metric: str, n: int = 12, **options) -> TextTask:
    """Two words in, the same in the other order out."""
    drawn = random.Random(name).sample(RECORDS, n + 4)
    return TextTask(name, tuple(drawn[:n]), tuple(drawn[n:]), metric, **options)


def test_rouge_refuses_answers_without_words_that_it_reads():
    records = ({"prompt": "天气?", "answer": "今天天气很好"},)
    with pytest.raises(TaskError, match="'rouge-l', which compares words of a-z and 0-9, and no answer has one"):
        TextTask("weather", records, records, "rouge-l")
    TextTask("weather", records, records, "edit")


def write_trace_task(folder: Path, **splits) -> Path:
    folder.mkdir(parents=True)
    for name, value in {"train": RECORDS, "eval": RECORDS[:2], "test": RECORDS[:4], **splits}.items():
        if value is not None:
            (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


# --- records ----------------------------------------------------------------------------------------------------------


def test_reads_the_layout_of_trace(tmp_path):
    for name in ORDERS["trace-7"]:
        write_trace_task(tmp_path / name)
    tasks = load_benchmark(tmp_path, ORDERS["trace-7"])
    assert [(task.name, task.metric) for task in tasks] == [(name, TRACE_METRICS[name]) for name in ORDERS["trace-7"]]
    assert all((t.train, t.dev, t.test) == (tuple(RECORDS), tuple(RECORDS[:2]), tuple(RECORDS[:4])) for t in tasks)
    lone = write_trace_task(tmp_path / "x" / "fomc", eval=None, train=[RECORDS[0] | {"id": 1}])
    assert read_task(lone).train == (RECORDS[0],) and read_task(lone, "sari").metric == "sari"


@pytest.mark.parametrize(
    "name, splits, message",
    [
        ("FOMC", {"train": None}, r"missing file .*train\.json"),
        ("FOMC", {"test": None}, r"missing file .*test\.json"),
        ("FOMC", {"train": []}, "empty train split"),
        ("FOMC", {"test": {"a": 1}}, r"test\.json holds dict; expected a list of records"),
        (
            "FOMC",
            {"test": [{"prompt": "a"}]},
            r"test\.json\[0\]: expected keys 'prompt' and 'answer', found \['prompt'\]",
        ),
        ("FOMC", {"eval": [{"prompt": "a", "answer": 3}]}, r"eval\.json\[0\]: expected text in 'answer', found int"),
        ("mine", {}, r"no metric is known for a task 'mine'; expected one of \['20Minuten', .*metric="),
    ],
)
def test_a_bad_folder_is_named(tmp_path, name, splits, message):
    write_trace_task(tmp_path / name, **splits)
    with pytest.raises(TaskError, match=message):
        load_benchmark(tmp_path, [name])


def test_task_checks_what_it_is_given():
    with pytest.raises(TaskError, match=r"task 't' is scored by 'bleu'; expected a metric, one of \['choice'"):
        TextTask("t", tuple(RECORDS), tuple(RECORDS), "bleu")
    with pytest.raises(TaskError, match="task 't': answer_tokens is 0; expected an integer of at least 1"):
        TextTask("t", tuple(RECORDS), tuple(RECORDS), "exact", answer_tokens=0)


def test_subsets_and_fingerprints():
    task = swapped("t", "exact")
    small = task.subset(5, 2, seed=3)
    assert (len(small.train), len(small.test)) == (5, 2) and set(map(str, small.train)) <= set(map(str, task.train))
    assert small == task.subset(5, 2, seed=3) and small.train != task.subset(5, 2, seed=4).train
    assert task.subset(99).train == task.train
    with pytest.raises(TaskError, match="task 't', test: a split of 0 records was asked for"):
        task.subset(test=0)
    other = [
        replace(task, metric="edit"),
        replace(task, answer_tokens=9),
        replace(task, train=task.train[::-1]),
        replace(task, test=task.test[:-1]),
    ]
    prints = [t.fingerprint() for t in (task, *other)]
    assert len(set(prints)) == 5 and replace(task, dev=task.train).fingerprint() == prints[0]


# --- what a generator does with them ----------------------------------------------------------------------------------


def build(path, max_length=64, **options):
    torch.manual_seed(0)
    built = build_classifier(path, max_length=max_length, lora=LoraSettings(target_modules="all-linear"), **options)
    with torch.no_grad():
        for name, p in built.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return built


@pytest.fixture(scope="module", params=["llama", "t5"])
def generator(request):
    return build(request.getfixturevalue(request.param))


def test_loss_is_on_the_tokens_of_the_answer(generator):
    task = swapped("t", "exact")
    encoded = generator.encode_texts(task, "train")
    end = generator.tokenizer.eos_token_id
    values = []
    for i in (0, 1):
        answer = encoded.label_tokens[encoded.targets[i]]
        assert answer[-1] == end
        text = generator.tokenizer.decode(answer[:-1])
        assert text == (task.train[i]["answer"] if generator.seq2seq else " " + task.train[i]["answer"])
        assert generator.tokenizer.decode(encoded.tokens[i], skip_special_tokens=True) == task.train[i]["prompt"]
        with torch.no_grad():
            for n, token in enumerate(answer):
                if generator.seq2seq:
                    ids = {"input_ids": [encoded.tokens[i]], "decoder_input_ids": [[0, *answer[:n]]]}
                else:
                    ids = {"input_ids": [[*encoded.tokens[i], *answer[:n]]]}
                logits = generator.model(**{k: torch.tensor(v) for k, v in ids.items()}).logits
                values.append(-logits[0, -1].log_softmax(-1)[token].item())
    with torch.no_grad():
        assert generator.loss(encoded, [0, 1]).item() == pytest.approx(sum(values) / len(values), rel=1e-4)


@pytest.mark.parametrize("metric", ["exact", "edit"])
def test_what_is_written_is_scored(generator, metric, monkeypatch):
    task = swapped("t", metric)
    encoded = generator.encode_texts(task, "test")
    longest = max(len(ids) for ids in generator.encode_texts(task, "train").label_tokens)
    bounds = []
    original = generator.model.generate

    def spy(**kwargs):
        bounds.append(kwargs["max_new_tokens"])
        return original(**kwargs)

    monkeypatch.setattr(generator.model, "generate", spy)
    written = generator.write(encoded, 3)
    answers = [record["answer"] for record in task.test]
    assert bounds == [longest, longest] and len(written) == 4
    assert generator.accuracy(encoded, 3) == score(metric, [""] * 4, written, answers)
    monkeypatch.setattr(generator, "write", lambda task, size: [f" {a} " for a in answers[:3]] + ["neither"])
    found = generator.accuracy(encoded)
    assert found == 75.0 if metric == "exact" else 75.0 < found < 100.0


def test_a_prompt_that_ends_in_space_takes_none(llama):
    record = {"prompt": "plum\n", "answer": "crow"}
    encoded = build(llama).encode_texts(TextTask("t", (record,), (record,), "exact"), "train")
    assert encoded.labels == ("crow",)


def test_long_prompts_keep_their_ends(llama):
    long = {"prompt": "apple " * 80 + "\nAnswer:", "answer": "crow"}
    task = TextTask("t", (long, RECORDS[0]), (long,), "exact")
    whole = build(llama).tokenizer(long["prompt"])["input_ids"]
    for keep_ends, front in ((True, 16), (False, 1)):
        built = build(llama, 33, keep_ends=keep_ends)
        with pytest.warns(UserWarning, match=r"1 of 2 prompts \(50 %\) are longer than the 32 tokens"):
            ids = built.encode_texts(task, "train").tokens[0]
        # The bos token counts among those of max_length.
        kept = front + 1 if keep_ends else 1
        assert len(ids) == 33 and ids[:kept] == whole[:kept] and ids[kept:] == whole[kept - 33 :]


def test_long_answers_are_cut_in_training_only(generator):
    task = swapped("t", "exact", answer_tokens=3)
    with pytest.warns(
        UserWarning, match=r"\d+ of 12 answers \(\d+ %\) are longer than the 3 tokens that answer_tokens"
    ):
        encoded = generator.encode_texts(task, "train")
    assert encoded.new_tokens == 3 == max(map(len, encoded.label_tokens))
    cut = next(ids for ids in encoded.label_tokens if len(ids) == 3)
    assert cut[-1] != generator.tokenizer.eos_token_id
    assert generator.encode_texts(task, "test").labels[0].strip() == task.test[0]["answer"]


def test_prompt_and_answer_have_positions(tmp_path):
    built = build(tiny.save_gpt2(tmp_path / "gpt2", 40), 40)
    long = {"prompt": "apple " * 80, "answer": "crow"}
    task = TextTask("t", (long,), (long,), "exact", answer_tokens=4)
    with pytest.warns(UserWarning, match="were cut"):
        encoded = built.encode_texts(task, "test")
    assert len(encoded.tokens[0]) + encoded.new_tokens == 40 and len(built.write(encoded)) == 1
    story = TextTask("t", ({"prompt": "a", "answer": "apple " * 40},), (long,), "exact")
    with pytest.raises(ValueError, match=r"40 positions leave -?\d+ tokens .* lower answer_tokens, or take a model"):
        built.encode_texts(story, "test")


# --- streams ----------------------------------------------------------------------------------------------------------


def test_a_stream_of_texts(llama):
    tasks = [swapped("first", "exact"), swapped("second", "edit")]
    config = StreamConfig("replay", {"buffer": 4, "batch": 2}, epochs=2, batch_size=4)
    result = run_stream(build(llama), tasks, config, progress=False)
    matrix = result.matrix
    assert matrix.complete and matrix.rows[1][1] > matrix.untrained[1]
    assert result.tasks[0]["state_bytes"] > 4 * 4 * 12  # answers are kept with their prompts


def test_an_encoder_refuses_texts(bert):
    built = build_classifier(bert, max_length=32, lora=LoraSettings(target_modules=("query",)))
    message = "task 't', test: a model of kind 'encoder' classifies and writes no text, which metric 'exact' scores"
    with pytest.raises(ValueError, match=message):
        run_stream(built, [swapped("t", "exact")], progress=False)


def test_a_stream_file_of_trace(tmp_path):
    for name in ("FOMC", "20Minuten"):
        write_trace_task(tmp_path / "TRACE" / name)
    spec = parse_spec(
        {"tasks": {"benchmark": "TRACE", "order": "trace-7", "answer_tokens": 5, "train_examples": 3}}, tmp_path
    )
    (cell,) = spec.cells()
    tasks = spec.tasks_of(cell)
    assert [(t.name, t.answer_tokens, len(t.train)) for t in tasks] == [("FOMC", 5, 3), ("20Minuten", 5, 3)]
    assert spec.notes()["tasks of trace-7"].startswith("FOMC (exact), 20Minuten (sari); without C-STANCE, MeetingBank")


def test_the_demo_refuses_texts(tmp_path):
    write_trace_task(tmp_path / "FOMC")
    with pytest.raises(TaskError, match=r"the demo's model writes no texts, which tasks \['FOMC'\] ask for"):
        run_demo(out_dir=tmp_path / "out", data=tmp_path, order=["FOMC"])
