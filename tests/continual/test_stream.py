"""The stream loop: what each arm does to the adapter, the penalty inside a step, and whole runs of every model kind."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from ella.acting import TASK
from ella.config import EllaConfig
from ella.continual.arms.ewc import Ewc
from ella.continual.first import FirstTask
from ella.continual.models import EncoderClassifier, LoraSettings, build_classifier
from ella.continual.stream import StreamConfig, StreamResult, run_stream, task_seed
from ella.knowledge import trained_adapter
from ella.lora import adapted_layers

from . import tiny

STRENGTH = 1.0
CONFIG = StreamConfig(
    batch_size=8, learning_rate=1e-2, epochs=4, ella=EllaConfig(ella_lambda=STRENGTH, normalize="rms")
)
TASKS = tiny.two_tasks(n_train=64, n_test=32)
STEPS = 32  # of a task


class Watched(EncoderClassifier):
    """Records what every training step starts from."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.rows: list[list[int]] = []
        self.norms: list[float] = []  # of all lora_B of the trained adapter, before the step

    def loss(self, task, rows):
        self.rows.append(list(rows))
        self.norms.append(math.fsum(p.detach().norm().item() for p in trained(self, "lora_B")))
        return super().loss(task, rows)


def trained(classifier, part: str) -> list[torch.nn.Parameter]:
    adapter = trained_adapter(classifier.model, "default")
    return [p for n, p in classifier.model.named_parameters() if part in n and f".{adapter}." in n]


def watched(bert) -> Watched:
    built = build_classifier(bert, lora=LoraSettings(r=4, alpha=8))
    return Watched(built.model, built.tokenizer)


def dense_past(classifier) -> dict[str, torch.Tensor]:
    """W_past per layer as a matrix, in float64."""
    return {
        name: module.lora_B["default"].weight.detach().double() @ module.lora_A["default"].weight.detach().double()
        for name, module in classifier.model.named_modules()
        if hasattr(module, "lora_A") and TASK in module.lora_A
    }


def run(bert, arm: str, tasks=TASKS, **changes):
    """(classifier, result, dense past after each task)"""
    classifier = watched(bert)
    pasts = []
    config = replace(CONFIG, arm=arm, **changes)
    result = run_stream(
        classifier, tasks, config, progress=False, on_task_end=lambda *_: pasts.append(dense_past(classifier))
    )
    return classifier, result, pasts


@pytest.fixture(scope="module")
def arms(bert):
    return {arm: run(bert, arm) for arm in ("seqlora", "inclora", "ella", "alone")}


def overlap(pasts) -> float:
    """‖ΔW₂ ⊙ W₁‖² summed over layers, each W₁ divided by its root mean square."""
    first, second = pasts
    total = 0.0
    for name, w in first.items():
        total += float(((second[name] - w) * w / w.square().mean().sqrt()).square().sum())
    return total


def test_tasks_are_learned(arms):
    for arm, (_, result, _) in arms.items():
        before, own = result.matrix.untrained, [result.matrix.rows[i][i] for i in range(2)]
        assert own[0] > before[0] + 20 and own[1] > before[1] + 20, (arm, before, own)
        assert [t["steps"] for t in result.tasks] == [STEPS, STEPS] and result.tasks[0]["loss"] < 0.3


def test_same_batches_and_same_first_task_in_all_arms(arms):
    rows = [classifier.rows for classifier, _, _ in arms.values()]
    assert len(rows[0]) == 2 * STEPS and all(r == rows[0] for r in rows)
    assert rows[0][:STEPS] != rows[0][STEPS:]
    losses = {result.tasks[0]["loss"] for _, result, _ in arms.values()}
    assert len(losses) == 1
    first_fresh, first_ella = arms["inclora"][2][0], arms["ella"][2][0]
    assert all(torch.equal(first_fresh[name], first_ella[name]) for name in first_fresh) and first_fresh


def test_another_seed_is_another_run(bert, arms):
    classifier, result, _ = run(bert, "ella", seed=1)
    assert classifier.rows != arms["ella"][0].rows
    assert result.tasks[0]["loss"] != arms["ella"][1].tasks[0]["loss"]


def test_the_same_seed_is_the_same_run(bert, arms):
    _, result, pasts = run(bert, "ella")
    assert result.matrix.to_dict() == arms["ella"][1].matrix.to_dict()
    assert all(torch.equal(w, arms["ella"][2][1][name]) for name, w in pasts[1].items())


def test_what_the_second_task_starts_from(arms):
    """ "seqlora" goes on with the adapter; the others start a fresh one, which has no effect (B = 0)."""
    for arm, (classifier, _, _) in arms.items():
        assert classifier.norms[0] == 0.0
        assert (classifier.norms[STEPS] == 0.0) == (arm != "seqlora"), arm
    one = arms["seqlora"][0]
    assert one.norms[STEPS] == pytest.approx(one.norms[STEPS - 1], rel=0.5)


def test_what_is_kept_of_finished_tasks(arms):
    for arm, (classifier, result, pasts) in arms.items():
        norms = [math.fsum(p.detach().norm().item() for p in trained(classifier, "lora_B"))]
        if arm in ("inclora", "ella"):
            assert len(pasts[1]) == result.layers == 4 and result.state_bytes > 0
            # Folded: the whole effect is in the past, rank 4 a task, and the adapter is fresh again.
            assert norms == [0.0]
            ranks = [[int(torch.linalg.matrix_rank(w, rtol=1e-5)) for w in past.values()] for past in pasts]
            assert ranks == [[4] * 4, [8] * 4]
        else:
            assert pasts == [{}, {}] and result.state_bytes == 0
            assert norms[0] > 0
        assert result.dense_bytes == 4 * 4 * 32 * 32


def test_alone_forgets_what_came_before(bert, arms):
    """The second task alone gives what a fresh model trained on it from the same seed gives."""
    classifier, result, _ = arms["alone"]
    built = watched(bert)
    torch.manual_seed(task_seed(0, 1))
    for module in built.model.modules():
        if hasattr(module, "reset_lora_parameters"):
            module.reset_lora_parameters("default", True)
    task = built.encode(TASKS[1].train, TASKS[1].labels)
    train_by_hand(built, task, arms["alone"][0].rows[STEPS:], lambda: 0.0)
    for a, b in zip(trained(classifier, "lora_"), trained(built, "lora_"), strict=True):
        assert torch.equal(a, b)
    # An adapter per task: the first task keeps its own, and its score.
    assert result.matrix.rows[1][0] == result.matrix.rows[0][0]
    assert result.matrix.rows[1][1] == built.accuracy(built.encode(TASKS[1].test, TASKS[1].labels))


def test_the_penalty_acts_in_the_ella_arm_only(arms):
    for arm, (_, result, _) in arms.items():
        first, second = result.tasks
        assert first["penalty"] == first["penalty_seconds"] == 0
        assert (second["penalty"] > 0) == (second["penalty_seconds"] > 0) == (arm == "ella")
        assert math.isnan(result.penalty_share()) == (arm != "ella")
    assert 0 < arms["ella"][1].penalty_share() < 1


def test_the_penalty_keeps_away_from_the_past(bert, arms):
    fresh, ella = overlap(arms["inclora"][2]), overlap(arms["ella"][2])
    assert 0 < ella < 0.7 * fresh
    _, _, stronger = run(bert, "ella", ella=EllaConfig(ella_lambda=300.0, normalize="rms"))
    assert 0 < overlap(stronger) < 0.5 * ella


def test_no_strength_is_the_fresh_arm(bert, arms):
    _, result, pasts = run(bert, "ella", ella=EllaConfig(ella_lambda=0.0, normalize="rms"))
    fresh = arms["inclora"]
    assert result.matrix.to_dict() == fresh[1].matrix.to_dict()
    assert all(torch.equal(w, fresh[2][1][name]) for name, w in pasts[1].items())


def train_by_hand(classifier, task, batches, penalty) -> None:
    """The step of the stream, written out with an ordinary loss."""
    parameters = [p for p in classifier.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=CONFIG.learning_rate, weight_decay=0.0)
    for rows in batches:
        optimizer.zero_grad()
        (EncoderClassifier.loss(classifier, task, rows) + penalty()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()


def test_a_step_is_task_loss_plus_penalty(bert, arms):
    """The second task against a loop in which autograd differentiates λ·Σ‖ΔW ⊙ W_past‖² from dense matrices."""
    _, _, (first, second) = arms["ella"]
    by_hand = watched(bert)
    run_stream(by_hand, TASKS[:1], replace(CONFIG, arm="ella"), progress=False)
    torch.manual_seed(task_seed(0, 1))
    layers = {name: m for name, m in by_hand.model.named_modules() if name in first}
    for module in layers.values():
        module.reset_lora_parameters(TASK, True)

    def penalty():
        total = 0.0
        for name, module in layers.items():
            past = (first[name] / first[name].square().mean().sqrt()).float()
            update = module.scaling[TASK] * module.lora_B[TASK].weight @ module.lora_A[TASK].weight
            total = total + (update * past).square().sum()
        return STRENGTH * total

    task = by_hand.encode(TASKS[1].train, TASKS[1].labels)
    train_by_hand(by_hand, task, arms["ella"][0].rows[STEPS:], penalty)
    for name, module in layers.items():
        update = module.scaling[TASK] * module.lora_B[TASK].weight @ module.lora_A[TASK].weight
        error = (second[name] - first[name] - update.double()).norm() / update.norm()
        assert update.norm() > 0 and error < 1e-4, (name, float(error))


def test_what_is_evaluated(bert):
    tasks = tiny.three_tasks(n_train=8, n_test=8)
    seen, everything = (run(bert, "inclora", tasks, evaluate=what)[1].matrix.rows for what in ("seen", "all"))
    measured = [[not math.isnan(v) for v in row] for row in seen]
    assert measured == [[True, True, False], [True, True, True], [True, True, True]]
    assert not any(math.isnan(v) for row in everything for v in row)
    for short, full in zip(seen, everything, strict=True):
        assert all(math.isnan(a) or a == b for a, b in zip(short, full, strict=True))


def test_dropout_trains_and_is_seeded(bert):
    classifier = watched(bert)
    modes = []
    original = classifier.loss
    classifier.loss = lambda *a: (modes.append(classifier.model.training), original(*a))[1]
    first = run_stream(classifier, TASKS, replace(CONFIG, dropout=True), progress=False)
    again = run_stream(watched(bert), TASKS, replace(CONFIG, dropout=True), progress=False)
    without = run_stream(watched(bert), TASKS, CONFIG, progress=False)
    assert modes == [True] * 2 * STEPS and not classifier.model.training
    assert [t["loss"] for t in first.tasks] == [t["loss"] for t in again.tasks] != [t["loss"] for t in without.tasks]


def test_merging_the_past_gives_the_same_scores(bert):
    """On a float32 base, adding finished tasks to the weights is the adapter's effect up to rounding."""
    kept = run(bert, "inclora")[1].matrix
    merged = run(bert, "inclora", ella=EllaConfig(keep_past="merge"))[1].matrix
    for a, b in zip(kept.rows, merged.rows, strict=True):
        assert a == pytest.approx(b, abs=100 / 32 + 0.1)


def test_results_survive_json(arms):
    import json

    _, result, _ = arms["ella"]
    back = StreamResult.from_dict(json.loads(json.dumps(result.to_dict())))
    assert back.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert (back.arm, back.seed) == ("ella", 0) and back.penalty_share() == result.penalty_share()


def test_progress_shows_the_penalty(bert, capsys):
    run_stream(watched(bert), TASKS, CONFIG, progress=True)
    shown = capsys.readouterr().err
    assert "ella/0 1/2 things" in shown and "ella/0 2/2 beings" in shown
    assert "loss=" in shown and "penalty=0," not in shown.split("beings", 1)[1] and "penalty=" in shown


def test_errors(bert):
    with pytest.raises(ValueError, match=r"at least one task and distinct names, found \[\]"):
        run_stream(watched(bert), [], CONFIG, progress=False)
    with pytest.raises(ValueError, match=r"distinct names, found \['things', 'things'\]"):
        run_stream(watched(bert), [TASKS[0]] * 2, CONFIG, progress=False)
    classifier, _, _ = run(bert, "inclora", TASKS[:1])
    with pytest.raises(ValueError, match="already carries a past"):
        run_stream(classifier, TASKS, CONFIG, progress=False)
    with pytest.raises(ValueError, match="training diverged in seqlora/0 1/2 things: the loss is nan"):
        run_stream(watched(bert), TASKS, replace(CONFIG, arm="seqlora", learning_rate=1e30), progress=False)


def spoiled(bert, where: int, value: float) -> Watched:
    """A classifier whose loss in step ``where`` is ``value``, with an ordinary gradient."""
    classifier = watched(bert)
    ordinary = classifier.loss

    def loss(task, rows):
        kept = ordinary(task, rows)
        return kept + value if len(classifier.rows) == where + 1 else kept

    classifier.loss = loss
    return classifier


@pytest.mark.parametrize("arm", ["seqlora", "ella"])
@pytest.mark.parametrize("step, value", [(0, math.inf), (5, math.inf), (STEPS - 1, -math.inf), (STEPS + 3, math.inf)])
def test_a_loss_that_is_no_number_is_an_error_in_any_step(bert, arm, step, value, tmp_path):
    name, number = ("1/2 things", step) if step < STEPS else ("2/2 beings", step - STEPS)
    message = f"training diverged in {arm}/0 {name}: the loss is {value} in step {number + 1} of {STEPS}; try a lower"
    with pytest.raises(ValueError, match=message):
        run_stream(spoiled(bert, step, value), TASKS, replace(CONFIG, arm=arm), tmp_path, progress=False)
    # What was finished before is kept, and nothing of what failed.
    assert [p.name for p in tmp_path.glob("after-*")] == (["after-1-things"] if step > STEPS else [])


@pytest.mark.parametrize("arm", ["seqlora", "inclora", "ella", "alone"])
def test_the_last_update_is_looked_at(bert, arm):
    """It shows in no loss: in weights that are no numbers, or in scores of weights that are too large."""
    tasks = [task.subset(train=8) for task in TASKS]
    config = replace(CONFIG, arm=arm, epochs=1, learning_rate=1e25)
    with pytest.raises(ValueError, match=r"diverged in .*: base_model.*lora_\S* is not finite after the last step"):
        run_stream(watched(bert), tasks, replace(config, weight_decay=1e15), progress=False)
    with pytest.raises(ValueError, match=r"task 'things', test: the model's scores are not finite for record \d+, "):
        run_stream(watched(bert), tasks, config, progress=False)


def test_what_is_lost_in_the_tokenizer_is_named_with_its_task(bert):
    bare = watched(bert)
    bare.tokenizer = tiny.tokenizer()
    blank = replace(TASKS[1], test=(*TASKS[1].test, {"sentence": "", "label": "bird"}))
    with pytest.raises(ValueError, match="task 'beings', test: record 32, '', has no tokens"):
        run_stream(bare, [TASKS[0], blank], CONFIG, progress=False)


def test_what_is_lost_of_a_later_task_is_said_before_any_training(bert, monkeypatch):
    bare = watched(bert)
    bare.tokenizer = tiny.tokenizer()
    blank = replace(TASKS[1], train=(*TASKS[1].train, {"sentence": "", "label": "bird"}))
    monkeypatch.setattr(torch.optim, "AdamW", None)
    with pytest.raises(ValueError, match=r"task 'beings', train: record \d+, '', has no tokens"):
        run_stream(bare, [TASKS[0], blank], CONFIG, progress=False)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arm": "swim"}, "arm is 'swim'; expected one of"),
        ({"evaluate": "none"}, "evaluate is 'none'"),
        ({"batch_size": 0}, "batch_size is 0; expected an integer of at least 1"),
        ({"eval_batch_size": 2.0}, "eval_batch_size is 2.0"),
        ({"learning_rate": 0}, "learning_rate is 0"),
        ({"lr_scheduler_type": "polynomial"}, r"lr_scheduler_type is 'polynomial'; expected one of \['constant', 'lin"),
        ({"learning_rate": float("inf")}, "learning_rate is inf"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'; expected a finite number above 0"),
        ({"learning_rate": 10**400}, "learning_rate is 1000.*; expected a finite number"),
        ({"weight_decay": float("nan")}, "weight_decay is nan; expected a finite number of at least 0"),
        ({"weight_decay": -1}, "weight_decay is -1;"),
        ({"max_grad_norm": 0.0}, "max_grad_norm is 0.0; expected a number above 0, or None"),
        ({"max_grad_norm": "1"}, "max_grad_norm is '1'; expected a number above 0, or None"),
        ({"batch_size": True}, "batch_size is True; expected an integer"),
        ({"dropout": "no"}, "dropout is 'no'; expected True or False"),
        ({"seed": 1.0}, "seed is 1.0; expected an integer"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(**changes)


def test_the_rate_falls_over_every_task(bert, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1]
    )
    linear = replace(CONFIG, epochs=1, lr_scheduler_type="linear")
    run_stream(watched(bert), TASKS, linear, progress=False)
    # 8 steps a task, from the rate itself to an eighth of it, as transformers' Trainer has it.
    assert rates == pytest.approx(2 * [linear.learning_rate * (8 - k) / 8 for k in range(8)])


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_generators_run_a_stream(kind, request, tmp_path):
    """Two tasks end to end in a decoder and an encoder-decoder: learned, penalised, saved, continued."""
    path = request.getfixturevalue(kind)

    def build():
        return build_classifier(path, max_length=48, lora=LoraSettings(r=8, alpha=32, target_modules="all-linear"))

    config = replace(CONFIG, learning_rate=3e-3, epochs=6, ella=EllaConfig(0.1, normalize="rms"))
    result = run_stream(build(), TASKS, config, tmp_path, progress=False)
    assert result.matrix.complete and result.tasks[1]["penalty"] > 0 and result.state_bytes > 0
    # No label by chance: a random model never writes one.
    assert result.matrix.untrained == [0.0, 0.0]
    assert min(result.matrix.rows[0][0], result.matrix.rows[1][1]) >= 50.0, result.matrix.rows
    again = run_stream(build(), TASKS, config, tmp_path, progress=False)
    assert again.to_dict() == result.to_dict()


def test_interference_is_told_by_layer(arms):
    for arm in ("inclora", "ella"):
        _, result, pasts = arms[arm]
        first, second = (task["interference"] for task in result.tasks)
        assert set(first.values()) == {0.0} and len(second) == len(pasts[0])
        for (name, w), value in zip(pasts[0].items(), second.values(), strict=True):
            want = float(((pasts[1][name] - w) * w / w.square().mean().sqrt()).square().sum())
            assert value == pytest.approx(want, rel=1e-4), name
    assert sum(arms["ella"][1].tasks[1]["interference"].values()) < sum(
        arms["inclora"][1].tasks[1]["interference"].values()
    )
    assert "interference" not in arms["seqlora"][1].tasks[1]


def test_importance_goes_on_where_a_run_stopped(bert, tmp_path):
    """Its first task is that of the others; what is measured is saved with the past."""
    tasks = tiny.three_tasks(n_train=16, n_test=8)
    ordinary = run_stream(watched(bert), tasks, CONFIG, first_dir=tmp_path / "first", progress=False)
    config = replace(CONFIG, ella=replace(CONFIG.ella, penalty="importance"))
    whole = run_stream(watched(bert), tasks, config, progress=False)
    assert whole.matrix.rows[0] == ordinary.matrix.rows[0]
    assert 0 < whole.tasks[1]["penalty"] != ordinary.tasks[1]["penalty"]
    shapes = [layer.shape for layer in adapted_layers(watched(bert).model, "default")]
    assert whole.state_bytes - ordinary.state_bytes == sum(4 * (out + in_) for out, in_ in shapes)

    def stop(index, result):
        if index == 1:
            raise KeyboardInterrupt

    run = {"out_dir": tmp_path / "run", "first_dir": tmp_path / "first", "progress": False}
    with pytest.raises(KeyboardInterrupt):
        run_stream(watched(bert), tasks, config, on_task_end=stop, **run)
    found = run_stream(watched(bert), tasks, config, **run)
    assert found.matrix.rows == whole.matrix.rows
    assert found.tasks[2]["penalty"] == pytest.approx(whole.tasks[2]["penalty"], rel=1e-6)


def test_the_first_task_is_trained_once(bert, arms, tmp_path):
    """Methods that begin alike take it from the first that trained it, and end as if they had not."""
    for arm, (_, whole, _) in arms.items():
        shared = watched(bert)
        result = run_stream(shared, TASKS, replace(CONFIG, arm=arm), first_dir=tmp_path, progress=False)
        assert result.matrix.to_dict() == whole.matrix.to_dict()
        assert [t["loss"] for t in result.tasks] == [t["loss"] for t in whole.tasks]
        assert len(shared.rows) == (2 * STEPS if arm == "seqlora" else STEPS)
    assert len([*tmp_path.iterdir()]) == 1


def test_the_first_task_of_an_adapter_on_embeddings_is_kept_whole(bert, tmp_path):
    """PEFT's factors of an embedding are parameters without a module of their own."""

    def built():
        return build_classifier(bert, lora=LoraSettings(r=4, alpha=8, target_modules=("query", "word_embeddings")))

    config = replace(CONFIG, arm="seqlora", learning_rate=5e-2)
    whole = run_stream(built(), TASKS, config, progress=False)
    for _ in range(2):  # trained, and then taken
        result = run_stream(built(), TASKS, config, first_dir=tmp_path, progress=False)
        assert result.matrix.to_dict() == whole.matrix.to_dict()
        assert [t["loss"] for t in result.tasks] == [t["loss"] for t in whole.tasks]
    (kept,) = tmp_path.glob("*/after-*/adapter.safetensors")
    embedded = {name: t for name, t in load_file(kept).items() if "lora_embedding" in name}
    assert len(embedded) == 2 and all(t.any() for t in embedded.values())


def test_what_is_trained_beside_the_adapter_is_refused(bert):
    model = AutoModel.from_pretrained(bert)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["query"], modules_to_save=["LayerNorm"]))
    classifier = EncoderClassifier(adapted, AutoTokenizer.from_pretrained(bert), max_length=16)
    with pytest.raises(ValueError, match=r"the model trains \['.*LayerNorm.*leave out modules_to_save and bias"):
        run_stream(classifier, TASKS, CONFIG, progress=False)


@pytest.mark.parametrize("arm", ["ella", "inclora", "lines"])
def test_a_past_that_nobody_merges_is_refused(arm):
    with pytest.raises(ValueError, match=r"keep_past is 'external'.*expected 'adapter' or 'merge'"):
        StreamConfig(arm=arm, settings={"keep_past": "external"})
    StreamConfig(arm="seqlora", ella=EllaConfig(keep_past="external"))


def test_what_a_method_does_between_tasks_counts(bert, monkeypatch):
    config = replace(CONFIG, arm="ewc", settings={"fisher_batches": 2})
    after = Ewc.after_task
    monkeypatch.setattr(Ewc, "after_task", lambda *given: (time.sleep(0.2), after(*given)))
    result = run_stream(build_classifier(bert, lora=LoraSettings(r=4)), TASKS, config, progress=False)
    between = [task["method_seconds"] for task in result.tasks]
    assert all(seconds >= 0.2 for seconds in between)
    rest = sum(task["seconds"] + task["evaluation_seconds"] for task in result.tasks)
    assert result.seconds == pytest.approx(rest + sum(between))
    del result.tasks[0]["method_seconds"]  # as a run saved before there was one
    assert result.seconds == pytest.approx(rest + sum(between[1:]))


def test_a_first_task_that_others_may_be_reading_stays(bert, tmp_path):
    arm = replace(CONFIG, arm="seqlora").make_arm(watched(bert), lambda index: pytest.fail("no training"))
    FirstTask(tmp_path, {"a": 1}).save(arm, {"steps": 1})
    FirstTask(tmp_path, {"a": 1}).save(arm, {"steps": 2})
    assert FirstTask(tmp_path, {"a": 1}).load(arm) == {"steps": 1}
    assert len([*tmp_path.glob("*/after-*")]) == 1


@pytest.mark.parametrize(
    "changes, tasks", [({"seed": 1}, TASKS), ({"learning_rate": 2e-2}, TASKS), ({}, TASKS[::-1]), ({}, TASKS[:1])]
)
def test_another_first_task_is_trained_anew(bert, tmp_path, changes, tasks):
    config = replace(CONFIG, arm="seqlora", epochs=1)
    for _ in range(2):
        first = watched(bert)
        run_stream(first, TASKS, config, first_dir=tmp_path, progress=False)
    assert len(first.rows) == STEPS // 4
    other = watched(bert)
    run_stream(other, tasks, replace(config, **changes), first_dir=tmp_path, progress=False)
    assert len(other.rows) == (0 if tasks == TASKS[:1] else 2 * STEPS // 4)
