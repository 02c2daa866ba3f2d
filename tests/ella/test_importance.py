"""``penalty="importance"``: squared gradients as they are measured in training, and the penalty made of them."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model

from ella import EllaConfig, EllaRegularizer, attach, importance
from ella.acting import TASK
from ella.checkpoint import PAST_FILE
from tests.ella.models import TOKENS, deltas, ids, llama, lora, randomise, tiny
from tests.ella.test_trainer import EXAMPLES, InOrder, arguments, classifier, difference, weights
from tests.kernels.cases import relative_error

CONFIG = EllaConfig(penalty="importance")


def loss_of(model, tokens=TOKENS):
    return model(input_ids=tokens, labels=tokens).loss


def begun(config=CONFIG, **options):
    """A model in its first task, of which nothing is measured yet."""
    model = get_peft_model(llama(), lora(**options))
    reg = EllaRegularizer(model, config)
    randomise(model, 1)
    return model, reg


def measured(reg):
    return importance.measured(reg.layers)


def is_close(found, want, bound=1e-5):
    assert found.keys() == want.keys()
    return all(
        relative_error(a.double(), b.double()) < bound
        for name in want
        for a, b in zip(found[name], want[name], strict=True)
    )


def by_token(model, reg, records=TOKENS):
    """Row and column sums of ``Σ_tokens (δ xᵀ)²`` of every layer: the matrices are formed, in float64."""
    seen, handles = {}, []

    def noting(name):
        def note(module, args, output):
            output.retain_grad()
            seen[name] = args[0].detach(), output

        return note

    for layer in reg.layers:
        handles.append(layer.module.register_forward_hook(noting(layer.name)))
    loss_of(model, records).backward()
    for handle in handles:
        handle.remove()
    found = {}
    for name, (x, output) in seen.items():
        tokens = zip(x.flatten(0, -2).double(), output.grad.flatten(0, -2).double(), strict=True)
        fisher = sum(torch.outer(gradient, token).square() for token, gradient in tokens)
        found[name] = fisher.sum(1), fisher.sum(0)
    return found


# --- what is measured -------------------------------------------------------------------------------------------------


def test_row_and_column_sums_of_squared_gradients():
    model, reg = begun(target_modules=["q_proj", "v_proj", "down_proj"])
    want = by_token(model, reg)
    assert len(want) == 6 and is_close(measured(reg), want)
    loss_of(model).backward()
    assert is_close(measured(reg), {name: [2 * part for part in pair] for name, pair in want.items()})


def test_many_tokens_are_taken_a_part_at_a_time(monkeypatch):
    model, reg = begun()
    want = by_token(model, reg)
    monkeypatch.setattr(importance, "_TOKENS", 5)
    reg.reset_adapter()
    randomise(model, 1)
    loss_of(model).backward()
    assert is_close(measured(reg), want)


def test_recomputed_activations_are_measured_once():
    model, reg = begun()
    want = by_token(model, reg)
    model, reg = begun()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss_of(model).backward()
    assert is_close(measured(reg), want)


def test_only_the_adapter_in_training_is_measured():
    model, reg = begun()
    with torch.no_grad():
        loss_of(model)
    with model.disable_adapter():
        inputs = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
        model(inputs_embeds=inputs).logits.sum().backward()
    model.add_adapter("other", lora())
    model.set_adapter("other")
    loss_of(model).backward()
    model.set_adapter("default")
    assert all(pair.total == 0 for pair in measured(reg).values())
    loss_of(model).backward()
    assert all(pair.total > 0 for pair in measured(reg).values())


def test_a_step_that_a_scaler_skips_is_left_out():
    model, reg = begun()
    loss_of(model).backward()
    want = measured(reg)
    (loss_of(model) * float("inf")).backward()
    assert is_close(measured(reg), want, 1e-12)


def test_measured_anew_from_given_losses():
    """In place of what training measured, record by record; gradients are left alone."""
    model, reg = begun()
    (3.0 * loss_of(model)).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]
    reg.measure_importance(loss_of(model, row[None]) for row in TOKENS)
    found = measured(reg)
    assert all(torch.equal(p.grad, before) for p, before in zip(trained, gradients, strict=True))
    wanted = {}
    for row in TOKENS:
        for name, pair in by_token(model, reg, row[None]).items():
            before = wanted.get(name, (0.0, 0.0))
            wanted[name] = [a + b for a, b in zip(before, pair, strict=True)]
    assert is_close(found, wanted)
    with pytest.raises(ValueError, match="no loss depends on the adapter in training: nothing was measured"):
        reg.measure_importance([])
    with pytest.raises(ValueError, match=r"penalty is 'hadamard'; what is measured here is for penalty='importance'"):
        begun(EllaConfig())[1].measure_importance([])


def test_a_task_begins_anew():
    model, reg = begun()
    loss_of(model).backward()
    reg.reset_adapter()
    assert all(pair.total == 0 for pair in measured(reg).values())
    randomise(model, 2)
    loss_of(model).backward()
    reg.end_task("a")
    assert all(pair.total == 0 for pair in measured(reg).values())


# --- the penalty ------------------------------------------------------------------------------------------------------


def finished(config=CONFIG, scale=1.0):
    """A model within its third task; also, by layer, the matrices that its penalty is of, in float64."""
    model, reg = begun(config)
    total = {}
    for seed, task in ((1, "a"), (2, "b")):
        randomise(model, seed)
        size = sum(part.square().sum() for parts in deltas(reg).values() for part in parts)
        (scale * loss_of(model)).backward()
        sums = {name: [part.double() for part in pair] for name, pair in measured(reg).items()}
        whole = sum(rows.sum() for rows, _ in sums.values())
        for name, pair in sums.items():
            before = total.get(name, [0.0, 0.0])
            total[name] = [a + b * size / whole for a, b in zip(before, pair, strict=True)]
        reg.end_task(task)
        model.zero_grad()
    randomise(model, 3)
    return model, reg, {name: torch.outer(rows, cols) / rows.sum() for name, (rows, cols) in total.items()}


def test_the_penalty_is_the_dense_one():
    _, reg, weights_of = finished(EllaConfig(penalty="importance", ella_lambda=3.0))
    want = {name: (parts[0].square() * weights_of[name]).sum().item() for name, parts in deltas(reg).items()}
    assert reg.values() == pytest.approx(want, rel=1e-5)
    penalty = reg.penalty()
    assert penalty.item() == pytest.approx(3.0 * sum(want.values()), rel=1e-5)
    penalty.backward()
    for layer in reg.layers:
        a, b = (p.detach().double().requires_grad_() for p in layer.parameters())
        (3.0 * ((layer.scaling() * b @ a).square() * weights_of[layer.name]).sum()).backward()
        for found, expected in zip(layer.parameters(), (a, b), strict=True):
            assert relative_error(found.grad.double(), expected.grad) < 1e-5


def test_the_strength_is_set_by_its_size():
    """An update as large as all earlier ones together adds 4 where it lies by chance."""
    _, reg, weights_of = finished()
    size = sum(matrix.sum().item() for matrix in weights_of.values())
    n = sum(matrix.numel() for matrix in weights_of.values())
    assert reg.strength() == pytest.approx(4.0 * n / size**2, rel=1e-5)


def test_the_scale_of_a_loss_is_not_in_it():
    _, one, weights_of = finished()
    _, scaled, _ = finished(scale=2.0**16)
    assert scaled.values() == pytest.approx(one.values(), rel=1e-5)
    _, rms, _ = finished(EllaConfig(penalty="importance", ella_lambda=1.0, normalize="rms"))
    for name, value in rms.values().items():
        assert value == pytest.approx(one.values()[name] / weights_of[name].mean().item(), rel=1e-5)


# --- from one process to the next -------------------------------------------------------------------------------------


def test_it_is_saved_with_the_past(tmp_path):
    model, reg, _ = finished()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=r"\['a', 'b'\], but not their importance to penalise by: load it with Ella"):
        EllaRegularizer(loaded, CONFIG)
    again = EllaRegularizer.from_pretrained(loaded, tmp_path)
    assert again.config == CONFIG and again.values() == pytest.approx(reg.values(), rel=1e-6)
    loss_of(loaded).backward()
    again.end_task("c")
    assert again.tasks == ["a", "b", "c"] and again.strength() < reg.strength()
    other = tmp_path / "other"
    reg.save_pretrained(other)
    fresh = EllaRegularizer.from_pretrained(get_peft_model(llama(), lora()), other)
    randomise(fresh.model, 3)
    assert fresh.values() == pytest.approx(reg.values(), rel=1e-6)


def test_a_copied_model_measures_for_itself():
    model, reg = begun()
    loss_of(model).backward()
    before = measured(reg)
    twin = EllaRegularizer(copy.deepcopy(model), CONFIG)
    loss_of(twin.model).backward()
    assert is_close(measured(reg), before, 1e-12)
    assert is_close(measured(twin), {name: [2 * part for part in pair] for name, pair in before.items()})


OPTIONS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def trainer_of(folder, reg):
    trainer = InOrder(reg.model, arguments(folder, **OPTIONS), train_dataset=EXAMPLES)
    attach(trainer, reg)
    return trainer


@pytest.mark.parametrize("tasks", [0, 1])
def test_a_resumed_trainer_measures_on(tmp_path, tasks):
    def start(model):
        reg = EllaRegularizer(model, CONFIG)
        for task in range(tasks):
            randomise(model, task)
            model(**{key: value[None] for key, value in EXAMPLES[0].items()}).loss.backward()
            reg.end_task(str(task))
            model.zero_grad()
        return reg

    unbroken = start(classifier())
    trainer_of(tmp_path, unbroken).train()
    resumed = EllaRegularizer(classifier(), CONFIG)
    trainer_of(tmp_path, resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert difference(weights(resumed.model), weights(unbroken.model)) < 1e-6
    assert is_close(measured(resumed), measured(unbroken))
    for reg in (unbroken, resumed):
        reg.end_task("last")
        randomise(reg.model, 9)
    assert resumed.values() == pytest.approx(unbroken.values(), rel=1e-5)

    (tmp_path / "checkpoint-2" / importance.FILE).unlink()
    with pytest.raises(FileNotFoundError, match=r"ella_importance.safetensors is missing: what was measured"):
        fresh = EllaRegularizer(classifier(), CONFIG)
        trainer_of(tmp_path, fresh).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_task_of_which_nothing_was_measured_is_not_folded():
    model, reg = begun()
    with pytest.raises(ValueError, match="nothing was measured of 'a', which is not folded"):
        reg.end_task("a")
    assert reg.tasks == []
    randomise(model, 0, size=0.0)
    reg.end_task("nothing")  # nothing was learned either
    assert reg.tasks == ["nothing"] and reg.strength() == 0.0


def test_only_linear_layers_are_measured():
    with pytest.raises(ValueError, match=r"measured on linear layers; tokens is of kind 'embedding': leave it out of"):
        EllaRegularizer(tiny(), CONFIG)
    model = tiny(targets=["up", "down"])
    reg = EllaRegularizer(model, CONFIG)
    model(ids()).square().sum().backward()
    found = measured(reg)
    assert [len(found["down"].rows), len(found["down"].cols)] == [12, 16]  # of a transposed weight
    reg.end_task("a")
    other = tiny()
    hadamard = EllaRegularizer(other)
    with pytest.raises(ValueError, match="measured on linear layers"):
        hadamard.config = CONFIG


def test_a_past_without_it_is_not_penalised_by_it(tmp_path):
    _, reg = begun(EllaConfig())
    reg.end_task("a")
    reg.config = CONFIG
    with pytest.raises(ValueError, match=r"tasks \['a'\] were folded without the importance that"):
        reg.penalty()
    _, reg, _ = finished()
    reg.config = EllaConfig()
    assert reg.values()["model.layers.0.self_attn.q_proj"] > 0  # the past itself is there
    reg.end_task("c")  # measured no more
    reg.config = CONFIG
    with pytest.raises(ValueError, match="were folded without the importance"):
        reg.add_gradient_()
    assert all(held.importance is None for held in reg.state().layers.values())


def test_settings_of_components_mean_nothing_here():
    for options in ({"penalty_rank": 4}, {"penalty_energies": False}):
        with pytest.raises(ValueError, match=r"penalty='importance' has no components: expected penalty_rank=None"):
            EllaConfig(penalty="importance", **options)


def test_a_broken_measurement_is_named(tmp_path):
    model, reg, _ = finished()
    loss_of(model).backward()
    importance.save(tmp_path, reg.layers)
    before = measured(reg)
    importance.load(tmp_path, reg.layers)
    assert is_close(measured(reg), before, 1e-12)
    _, wider = begun(target_modules=["q_proj", "v_proj", "o_proj"])
    with pytest.raises(ValueError, match=r"layer 'model.layers.0.self_attn.o_proj': expected shapes .* found \[None"):
        importance.load(tmp_path, wider.layers)
    state = reg.state()
    first = next(iter(state.layers))
    state.layers[first].importance.rows[0] = -1.0
    with pytest.raises(ValueError, match=r"row_importance: expected energies of at least 0, found -1"):
        reg.save_pretrained(tmp_path)
    assert not (tmp_path / PAST_FILE).exists()


def test_hooks_go_with_the_regularizer():
    model, reg, _ = finished()
    model.delete_adapter(TASK)
    with pytest.raises(ValueError, match="adapter 'ella_task' was deleted"):
        reg.penalty()
    assert not any(importance._hook(module) for module in model.modules())
