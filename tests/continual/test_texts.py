"""What is lost between a text and its tokens: labels refused by name, long sentences counted and cut by rule."""

from __future__ import annotations

import warnings

import pytest
import torch

from ella.continual.models import EncoderClassifier, LabelGenerator, LoraSettings, build_classifier
from ella.continual.texts import check_labels, cut, cuts_together, ids_of, normal, specials, tokenizer_fingerprint

from . import tiny

EVERYWHERE = LoraSettings(r=2, target_modules="all-linear")
LONG = "which goes on and on for much longer than sixteen of the tokens there are until it says at last"


@pytest.fixture(scope="module")
def minilm():
    return build_classifier(max_length=16)


def records(*sentences, label):
    return [{"sentence": sentence, "label": label} for sentence in sentences]


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "labels, message",
    [
        (["News", "news", "sport"], r"labels become the same tokens.*\[\['News', 'news'\]\]; reword.*case, accents"),
        (["rosé", "rose"], r"\[\['rosé', 'rose'\]\]"),
        (["sport ", "sport"], r"\[\['sport ', 'sport'\]\]"),
        (
            ["𐎠", "𐎡", "sport"],
            r"labels \['𐎠', '𐎡'\] hold characters that the tokenizer does not know \(\[UNK\]\); reword",
        ),
        (["mostly 𐎠", "sport"], r"labels \['mostly 𐎠'\] hold characters"),
        (["", "sport"], r"labels \[''\] are empty to the tokenizer"),
        (["\u200b", "sport"], r"are empty to the tokenizer: it drops their characters"),
        (
            [f"{LONG} yes", f"{LONG} no"],
            r"would be cut: .* says at last no': 22}, room for 14; shorten them or raise max_l",
        ),
        ([f"no {LONG}", "yes"], "would be cut"),
    ],
)
def test_labels_lost_in_an_encoders_tokenizer_are_refused(minilm, labels, message):
    with pytest.raises(ValueError, match=message):
        minilm.encode(records("a text", label=labels[0]), labels)


def test_labels_that_only_change_are_kept(minilm):
    labels = ("True", "FALSE", "rosé", "C++", "C#", "state-of-the-art", "Society & Culture")
    task = minilm.encode(records("a text", label="True"), labels)
    front, back = [minilm.tokenizer.cls_token_id], [minilm.tokenizer.sep_token_id]
    lower = [label.lower().replace("é", "e") for label in labels]
    assert task.label_tokens == [front + ids + back for ids in ids_of(minilm.tokenizer, lower)]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """An encoder-decoder that knows a few words, without case and accents."""
    folder = tiny.save_t5(tmp_path_factory.mktemp("words"))
    tiny.word_tokenizer("options answer : , . a pear iron fruit metal cafe tea").save_pretrained(folder)
    return build_classifier(folder, max_length=32, lora=EVERYWHERE)


@pytest.mark.parametrize(
    "labels, message",
    [
        (["金属", "水果"], r"labels \['金属', '水果'\] hold characters that the tokenizer does not know \(<unk>\)"),
        (["fruit", "a metal {"], r"labels \['a metal {'\] hold characters"),
        (["café", "cafe"], r"become the same tokens.*\[\['café', 'cafe'\]\]"),
        (["fruit", "</s>"], r"labels are not what their tokens are read back as, {'</s>': ''}; reword them"),
        (["fruit", " "], r"labels \[' '\] are empty"),
        (
            ["fruit", "Fruit."],
            r"must differ by more than case, spaces and closing punctuation: \[\['fruit', 'Fruit.'\]\]",
        ),
    ],
)
def test_labels_lost_in_a_generators_tokenizer_are_refused(words, labels, message):
    with pytest.raises(ValueError, match=message):
        words.encode(records("a pear", label=labels[0]), labels)


def test_a_label_is_recognised_as_it_is_read_back(words, monkeypatch):
    """An answer cannot have the accent, nor the spacing, that the tokenizer does not keep."""
    labels = ("Café", "fruit,tea", "metal")
    task = words.encode(records("a pear", "iron", "a", label="Café"), labels)
    assert words.tokenizer.batch_decode(task.label_tokens, skip_special_tokens=True) == ["cafe", "fruit , tea", "metal"]

    def answers(input_ids, **_):
        width = max(map(len, task.label_tokens))
        return torch.tensor([[0, *ids, *[0] * (width - len(ids))] for ids in task.label_tokens])

    monkeypatch.setattr(words.model, "generate", answers)
    assert sorted(words.predict(task)) == [0, 1, 2]


def test_signs_are_labels_and_nothing_is_none(words):
    assert [normal(text) for text in ("Yes!", " No . ", "?", "!", "")] == ["yes", "no", "?", "!", ""]
    task = words.encode(records("a pear", label="."), (".", ","))
    assert len({tuple(ids) for ids in task.label_tokens}) == 2


def test_labels_of_a_tokenizer_without_unknowns():
    own = tiny.tokenizer()
    assert own.unk_token_id is None
    labels = ["金属", "水果", "Yes", "yes"]
    check_labels(own, labels, ids_of(own, labels))


# --- long sentences ---------------------------------------------------------------------------------------------------

STORY = "the river was high and they spoke of it all day and again the next day"
PAIRS = [
    "Premise: {} Hypothesis: {}",
    "premise: {}\nhypothesis: {}",
    "sentence 1: {}\nsentence 2: {}",
    "mnli sentence1: {} sentence2: {}",
    "Question: {} Passage: {}",
    "paragraph: {} question: {}",
    "Text A: {} Text B: {}",
    "{} [SEP] {}",
]


def silent(function, *arguments):
    """The value and the warnings of a call."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        return function(*arguments), [str(w.message) for w in caught if issubclass(w.category, UserWarning)]


def test_cut_sentences_are_counted_once(minilm):
    task, told = silent(minilm.encode, records(STORY, "short", STORY, "short too", label="a"), ("a", "b"))
    assert told == [
        "2 of 4 sentences (50 %) are longer than the 14 tokens that max_length 16 and the model leave them and were "
        "cut; a higher max_length, where the model has positions for it, reads more of them"
    ]
    plain = minilm.tokenizer([STORY], truncation=True, max_length=16)["input_ids"]
    assert [task.tokens[0]] == plain
    just = minilm.tokenizer.decode(plain[0], skip_special_tokens=True)
    assert silent(minilm.encode, records(just, "short", label="a"), ("a", "b"))[1] == []


def test_what_several_encodings_cut_is_said_once(minilm):
    def encode():
        with cuts_together():
            minilm.encode(records(STORY, "short", label="a"), ("a", "b"))
            warnings.warn("something else", stacklevel=1)
            minilm.encode(records("short", label="a"), ("a", "b"))
            minilm.encode(records(STORY, STORY, "premise: " + STORY + " hypothesis: no", label="a"), ("a", "b"))

    _, told = silent(encode)
    assert told[0] == "something else" and len(told) == 2
    assert told[1].startswith("4 of 6 sentences (67 %) are longer than the 14 tokens")
    assert "1 that are pairs lost their middle" in told[1]


@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_keeps_both_ends(minilm, form):
    texts = [form.format(STORY, "nobody crossed"), form.format(STORY, "somebody crossed"), form.format("it", STORY)]
    task, told = silent(minilm.encode, records(*texts, label="a"), ("a", "b"))
    assert len(told) == 1 and "3 of 3 sentences (100 %)" in told[0] and "3 that are pairs lost their middle" in told[0]
    for text, ids in zip(texts, task.tokens, strict=True):
        whole = minilm.tokenizer(text)["input_ids"]
        assert ids == whole[:8] + whole[-8:]
    assert task.tokens[0] != task.tokens[1]


@pytest.mark.parametrize(
    "form", ["Title: {}\nText: {}", "{}\n{}", "He said: {} She said: {}", "question: {} question: {}"]
)
def test_other_sentences_lose_their_end(minilm, form):
    text = form.format(STORY, STORY)
    task, told = silent(minilm.encode, records(text, label="a"), ("a", "b"))
    assert task.tokens == minilm.tokenizer([text], truncation=True, max_length=16)["input_ids"]
    assert len(told) == 1 and "pairs" not in told[0]


def test_pairs_too_lose_their_end_on_request():
    ends = build_classifier(max_length=16, keep_ends=False)
    text = PAIRS[0].format(STORY, "nobody crossed")
    task, told = silent(ends.encode, records(text, label="a"), ("a", "b"))
    assert task.tokens == ends.tokenizer([text], truncation=True, max_length=16)["input_ids"]
    assert len(told) == 1 and "pairs" not in told[0]
    assert ends.describe()["keep_ends"] is False


def test_the_side_that_a_tokenizer_cuts_is_kept():
    own = tiny.tokenizer()
    (whole,) = ids_of(own, [STORY])
    own.truncation_side = "left"
    with pytest.warns(UserWarning, match="1 of 1"):
        assert cut(own, [STORY], 7, 7, True) == [whole[-7:]]


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_generators_pair_keeps_both_ends_and_the_options(kind, request):
    built = build_classifier(request.getfixturevalue(kind), max_length=64, lora=EVERYWHERE)
    text = "premise: " + f"{STORY} " * 9 + "hypothesis: nobody crossed"
    task, told = silent(built.encode, records(text, "iron", label="fruit"), ("fruit", "metal"))
    assert len(task.tokens[0]) == 64 and len(told) == 1 and "1 of 2 sentences (50 %)" in told[0]
    read = built.tokenizer.decode(task.tokens[0], skip_special_tokens=True)
    assert read.startswith("premise: the river")
    assert read.endswith("nobody crossed\nOptions: fruit, metal\nAnswer:")


def test_specials_stand_at_both_ends():
    assert specials(tiny.tokenizer(front="<s>", back="</s>")) == ([1], [2])
    assert specials(tiny.tokenizer(back="</s>")) == ([], [2])
    assert specials(tiny.tokenizer()) == ([], [])


def test_a_record_without_tokens_is_named(bert, llama):
    encoder = build_classifier(bert)
    blank = records("pear", "", label="fruit")
    task = encoder.encode(blank, ("fruit", "metal"))
    assert task.tokens[1] == [1, 2] and encoder.loss(task, [0, 1]).isfinite()
    bare = EncoderClassifier(encoder.model, tiny.tokenizer())
    with pytest.raises(ValueError, match=r"record 1, '', has no tokens: .*; leave the record out or give it a text"):
        bare.encode(blank, ("fruit", "metal"))
    decoder = build_classifier(llama, lora=EVERYWHERE)
    with pytest.raises(ValueError, match="record 1, '', has no tokens"):
        LabelGenerator(decoder.model, tiny.tokenizer(), template="{sentence}").encode(blank, ("fruit", "metal"))


# --- positions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [tiny.save_gpt2, tiny.save_bart])
def test_prompt_and_answer_have_positions(tmp_path, save):
    """As long as the model has positions: trained on, generated, and each answer's loss that of the model alone."""
    built = build_classifier(save(tmp_path, 64), max_length=64, lora=EVERYWHERE)
    labels = ("fruit", "metal of some age")
    texts = [f"{STORY} " * 9, "iron"]
    task, told = silent(built.encode, records(*texts, label="metal of some age"), labels)
    longest = max(map(len, task.label_tokens))
    assert len(task.tokens[0]) == (64 if built.seq2seq else 64 - longest - 1) and len(told) == 1
    with torch.no_grad():
        loss = float(built.loss(task, [0]))
        answer = task.label_tokens[1]
        if built.seq2seq:
            inputs = {
                "input_ids": torch.tensor([task.tokens[0]]),
                "decoder_input_ids": torch.tensor([[2, *answer[:-1]]]),
            }
            logits = built.model(**inputs).logits[0]
        else:
            logits = built.model(input_ids=torch.tensor([task.tokens[0] + answer])).logits[0, -len(answer) - 1 : -1]
    by_hand = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
    assert loss == pytest.approx(float(by_hand), rel=1e-5) and loss > 0
    assert len(built.predict(task)) == 2


def test_answers_without_positions_are_refused(tmp_path):
    labels = (f"{STORY} yes", f"{STORY} no")
    asked = records("iron", label=labels[0])
    decoder = build_classifier(
        tiny.save_gpt2(tmp_path / "gpt2", 160), max_length=160, lora=EVERYWHERE, template="{sentence}"
    )
    assert len(decoder.encode(asked, labels).tokens) == 1
    short = build_classifier(
        tiny.save_gpt2(tmp_path / "short", 32), max_length=32, lora=EVERYWHERE, template="{sentence}"
    )
    with pytest.raises(
        ValueError, match=r"the model's 32 positions leave -?\d+ tokens for a sentence beside 2 options and an"
    ):
        short.encode(asked, labels)
    seq2seq = build_classifier(
        tiny.save_bart(tmp_path / "b", 32), max_length=32, lora=EVERYWHERE, template="{sentence}"
    )
    with pytest.raises(
        ValueError, match=r"labels would be cut: .*room for 30; shorten them, the decoder has 32 positions"
    ):
        seq2seq.encode(asked, labels)


def test_the_longest_answer_that_is_accepted_fits(tmp_path):
    built = build_classifier(tiny.save_bart(tmp_path, 24), max_length=24, lora=EVERYWHERE, template="{sentence}")
    token = ids_of(built.tokenizer, ["a"])[0]
    assert len(token) == 1
    labels = ("q" * 22, "fruit")
    task = built.encode(records("iron", label=labels[0]), labels)
    assert len(task.label_tokens[0]) == 23
    assert built.loss(task, [0]).isfinite() and built.predict(task) == [-1]
    with pytest.raises(ValueError, match="would be cut"):
        built.encode(records("iron", label="fruit"), ("q" * 23, "fruit"))


def test_positions_that_start_after_padding(tmp_path):
    """RoBERTa's 66 positions are 64: two are taken by padding."""
    folder = tiny.save_roberta(tmp_path, 66)
    for length in (65, 66):
        with pytest.raises(ValueError, match=f"max_length is {length}; expected 4 to the model's 64 positions"):
            build_classifier(folder, max_length=length)
    built = build_classifier(folder, max_length=64)
    task, _ = silent(built.encode, records(f"{STORY} " * 9, label="fruit"), ("fruit", "metal"))
    assert len(task.tokens[0]) == 64 and built.loss(task, [0]).isfinite()


# --- identity ---------------------------------------------------------------------------------------------------------


def test_tokenizers_are_told_apart():
    first, used, ends, lower = (
        tiny.tokenizer(),
        tiny.tokenizer(),
        tiny.tokenizer(back="</s>"),
        tiny.word_tokenizer("a b"),
    )
    used(["a text"], truncation=True, max_length=4, padding=True)
    assert tokenizer_fingerprint(first) == tokenizer_fingerprint(used)
    swapped = tiny.word_tokenizer("b a")
    left = tiny.word_tokenizer("a b")
    left.truncation_side = "left"
    unpadded = tiny.word_tokenizer("a b")
    unpadded.pad_token = "</s>"
    assert len({tokenizer_fingerprint(t) for t in (first, ends, lower, swapped, left, unpadded)}) == 6
