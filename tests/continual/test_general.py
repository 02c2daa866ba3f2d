"""General ability by lm-eval, which a fake stands for: what it is asked, when, and what becomes of its answers."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from ella.continual import General, StreamConfig, compare_arms, general_ability, run_stream
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.spec import SpecError, parse_spec

from . import tiny

GENERAL = General(("piqa", "boolq"), limit=5)
CONFIG = StreamConfig("seqlora", epochs=1, batch_size=8, general=GENERAL)


@pytest.fixture
def lm_eval(monkeypatch):
    """Stands for the package; ``calls`` are the keywords of each evaluation, ``results`` what a task is given."""

    def scores(model) -> dict:
        trained = any(p.abs().sum() > 0 for n, p in model.named_parameters() if "lora_B" in n)
        return {
            "piqa": {"name": "piqa", "sample_len": 5, "acc,none": 0.25 if trained else 0.5, "acc_norm,none": 0.9},
            "boolq": {"exact_match,strict": 0.75, "exact_match,loose": 1.0, "acc_stderr,none": "N/A"},
        }

    fake = SimpleNamespace(calls=[], results=scores)

    def simple_evaluate(model, **options):
        assert not any(module.training for module in model.model.modules())
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(7)
        model.tokenizer.padding_side = "left"
        fake.calls.append(options | {"batch_size": model.batch_size})
        found = fake.results(model.model)
        return found if found is None else {"results": found}

    class HFLM:
        def __init__(self, pretrained, tokenizer, batch_size):
            self.model, self.tokenizer, self.batch_size = pretrained, tokenizer, batch_size

    package, models, wrapper = (ModuleType(f"lm_eval{part}") for part in ("", ".models", ".models.huggingface"))
    package.simple_evaluate, wrapper.HFLM = simple_evaluate, HFLM
    for module in (package, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return fake


def build(path):
    return build_classifier(path, max_length=48, lora=LoraSettings(target_modules="all-linear"))


@pytest.fixture
def classifier(llama):
    return build(llama)


def test_what_is_asked_and_what_is_left_as_it_was(lm_eval, classifier):
    model, tokenizer = classifier.model, classifier.tokenizer
    model.train()
    side = tokenizer.padding_side = "right"
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    found = general_ability(model, tokenizer, ["piqa", "boolq"], 5, batch_size=3, num_fewshot=2)
    assert found == {"piqa": 50.0, "boolq": 75.0}
    asked = {"tasks": ["piqa", "boolq"], "limit": 5, "num_fewshot": 2, "bootstrap_iters": 0, "log_samples": False}
    assert lm_eval.calls == [asked | {"batch_size": 3}]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert tokenizer.padding_side == side and model.training


@pytest.mark.parametrize(
    "results, message",
    [
        ({"arc_easy": {"acc,none": 1.0}}, r"no score of 'piqa' itself, but of \['arc_easy'\]; name one of these"),
        (
            {"piqa": {"word_perplexity,none": 9.0}},
            r"lm-eval scores 'piqa' by \['word_perplexity,none'\]; expected",
        ),
        (None, "no results in this process"),
    ],
)
def test_results_without_a_score_are_named(lm_eval, classifier, results, message):
    lm_eval.results = lambda model: results
    with pytest.raises(ValueError, match=message):
        general_ability(classifier.model, classifier.tokenizer, ["piqa"])


def test_a_stream_asks_before_and_after(lm_eval, classifier, llama, tmp_path):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    result = run_stream(classifier, tasks, CONFIG, tmp_path / "out", progress=False)
    assert result.general == {"before": {"piqa": 50.0, "boolq": 75.0}, "after": {"piqa": 25.0, "boolq": 75.0}}
    assert [call["limit"] for call in lm_eval.calls] == [5, 5]
    again = run_stream(build(llama), tasks, CONFIG, tmp_path / "out", progress=False)
    assert again.general == result.general and len(lm_eval.calls) == 2
    plain = run_stream(build(llama), tasks, replace(CONFIG, general=None), progress=False)
    # Nothing is drawn from the generators that training draws from.
    assert plain.matrix.rows == result.matrix.rows and plain.general == {}
    with pytest.raises(ValueError, match=r"holds another run; differing: config\.general was .*, now None"):
        run_stream(build(llama), tasks, replace(CONFIG, general=None), tmp_path / "out", progress=False)


@pytest.mark.parametrize("arm", ["seqlora", "ella", "ewc"])
def test_a_run_killed_at_the_last_question_goes_on_there(lm_eval, llama, tmp_path, monkeypatch, arm):
    tasks, config = tiny.two_tasks(n_train=8, n_test=4), replace(CONFIG, arm=arm)
    answer, asked = lm_eval.results, []

    def killed(model):
        asked.append(model)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(model)

    lm_eval.results = killed
    with pytest.raises(KeyboardInterrupt):
        run_stream(build(llama), tasks, config, tmp_path, progress=False)
    second = build(llama)
    monkeypatch.setattr(second, "loss", None)  # no training
    result = run_stream(second, tasks, config, tmp_path, progress=False)
    assert result.general["before"]["piqa"] == 50.0 and result.general["after"]["boolq"] == 75.0 and len(asked) == 3
    third = run_stream(build(llama), tasks, config, tmp_path, progress=False)
    assert third.general == result.general and len(asked) == 3


def test_methods_share_what_was_before_and_the_report_shows_it(lm_eval, llama, tmp_path):
    tasks = tiny.two_tasks(n_train=8, n_test=4)
    results = compare_arms(
        lambda: build(llama),
        lambda seed: tasks,
        CONFIG,
        arms=["seqlora", "ella"],
        seeds=[0],
        out_dir=tmp_path,
        title="t",
        notes={},
        progress=False,
        echo=lambda text: None,
    )
    assert len(lm_eval.calls) == 3 and results[0].general["before"] == results[1].general["before"]
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "General ability" in text and "the first 5 examples of each" in text
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    cells = {row[0]: row[1:] for row in rows if len(row) == 4}
    assert cells["before the stream"][:2] == ["50.0", "75.0"]
    assert cells["ELLA"] == ["25.0 (-25.0)", "75.0 (+0.0)", "-12.5"]
    saved = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert saved["runs"][0]["general"]["after"]["piqa"] == 25.0


def test_without_lm_eval_nothing_runs(monkeypatch, classifier, tmp_path):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setattr(classifier, "accuracy", None)
    message = r"measured by lm-eval, which cannot be imported \(.*\); run: pip install 'ella-kernels\[general\]'"
    with pytest.raises(ImportError, match=message):
        run_stream(classifier, tiny.two_tasks(n_train=8, n_test=4), CONFIG, tmp_path / "a", progress=False)
    options = {"arms": ["ella"], "seeds": [0], "out_dir": tmp_path / "b", "title": "t", "notes": {}}
    with pytest.raises(ImportError, match=message):
        compare_arms(lambda: pytest.fail("built"), lambda seed: tiny.two_tasks(), CONFIG, **options)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_is_refused(lm_eval, bert):
    encoder = build_classifier(bert, max_length=32, lora=LoraSettings(target_modules=("query",)))
    with pytest.raises(ValueError, match="of models that write text, found an encoder; leave 'general' out"):
        run_stream(encoder, tiny.two_tasks(), CONFIG, progress=False)


def test_settings():
    assert StreamConfig().identity()["general"] is None and "general" not in CONFIG.shared()
    data = {"tasks": {"folders": ["a"]}, "arms": ["ella", {"arm": "ella", "as": "b", "epochs": 2}]}
    spec = parse_spec({**data, "general": {"tasks": ["piqa"], "limit": 3}})
    assert [arm.general for arm in spec.arms] == [General(("piqa",), 3)] * 2
    assert parse_spec(data).config.general is None


@pytest.mark.parametrize(
    "general, message",
    [
        ({"limit": 3}, "general: expected 'tasks', names of lm-eval's tasks"),
        ({"tasks": []}, r"general.tasks is \(\); expected names of lm-eval's tasks"),
        ({"tasks": "piqa"}, "general.tasks is 'piqa'; expected names"),
        ({"tasks": ["piqa", "piqa"]}, "general.tasks names a task more than once"),
        ({"tasks": ["piqa"], "limit": 0}, "general.limit is 0; expected an integer of at least 1"),
        ({"tasks": ["piqa"], "shots": 0}, r"general: unknown keys \['shots'\]; known are \['limit', 'tasks'\]"),
        (["piqa"], "general: expected keys with values, found list"),
    ],
)
def test_mistakes_are_named(general, message):
    with pytest.raises(SpecError, match=message):
        parse_spec({"tasks": {"folders": ["a"]}, "general": general})
