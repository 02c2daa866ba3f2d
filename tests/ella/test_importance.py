"""``penalty="importance"``: sums of squared gradients as they are measured, and the penalty made of them."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ella import EllaConfig, EllaRegularizer, attach, importance
from ella.checkpoint import PAST_FILE
from tests.ella.models import TOKENS, deltas, ids, llama, lora, randomise, tiny
from tests.ella.test_trainer import EXAMPLES, InOrder, arguments, classifier, difference, weights
from tests.kernels.cases import relative_error

CONFIG = EllaConfig(penalty="importance")


def loss_of(model, tokens=TOKENS):
    return model(input_ids=tokens, labels=tokens).loss


def losses(model, scale=1.0):
    """Of every record."""
    return (scale * loss_of(model, row[None]) for row in TOKENS)


def begun(config=CONFIG, **options):
    """A model in its first task, of which nothing is measured yet."""
    model = get_peft_model(llama(), lora(**options))
    reg = EllaRegularizer(model, config)
    randomise(model, 1)
    return model, reg


def measured(model, reg, of=losses):
    return importance.measure(model, reg.layers, of(model))


def is_close(found, want, bound=1e-5):
    assert found.keys() == want.keys()
    return all(
        relative_error(a.double(), b.double()) < bound
        for name in want
        for a, b in zip(found[name], want[name], strict=True)
    )


def dense(model, reg, records):
    """Row and column sums of squares of the base weights' own gradients, which autograd forms."""
    found = {}
    named = {layer.name: layer.module.get_base_layer().weight for layer in reg.layers}
    for record in records:
        for weight in named.values():
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(loss_of(model, record), list(named.values()))
        for weight in named.values():
            weight.requires_grad_(False)
        for name, gradient in zip(named, gradients, strict=True):
            squares = gradient.double().square()
            before = found.get(name, (0.0, 0.0))
            found[name] = (before[0] + squares.sum(1), before[1] + squares.sum(0))
    return found


# --- what is measured -------------------------------------------------------------------------------------------------


def test_row_and_column_sums_of_squared_gradients():
    """Record by record, and of several records in one loss."""
    model, reg = begun(target_modules=["q_proj", "v_proj", "down_proj"])
    found = measured(model, reg)
    assert len(found) == 6 and is_close(found, dense(model, reg, TOKENS[:, None]))
    together = measured(model, reg, lambda m: (loss_of(m, records) for records in [TOKENS]))
    assert is_close(together, dense(model, reg, [TOKENS])) and not is_close(together, found)


def test_products_are_taken_a_part_at_a_time(monkeypatch):
    model, reg = begun()
    want = measured(model, reg)
    monkeypatch.setattr(importance, "_TOKENS", 5)
    assert is_close(measured(model, reg), want)


def test_calls_of_one_loss_are_of_one_gradient():
    """A model that runs twice for a loss, as an encoder of texts and labels does."""
    model, reg = begun()

    def twice(m):
        yield loss_of(m, TOKENS[:1]) - 0.5 * loss_of(m, TOKENS[1:])

    found = measured(model, reg, twice)
    named = {layer.name: layer.module.get_base_layer().weight.requires_grad_() for layer in reg.layers}
    gradients = torch.autograd.grad(next(twice(model)), list(named.values()))
    for (rows, cols), gradient in zip(found.values(), gradients, strict=True):
        assert relative_error(rows, gradient.square().sum(1)) < 1e-5
        assert relative_error(cols, gradient.square().sum(0)) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_it_is_measured_in_eval_mode_and_leaves_no_trace(reentrant):
    """Checkpointing, which computes a layer twice, acts in training only."""
    model, reg = begun(lora_dropout=0.5)
    want = measured(model, reg)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    loss_of(model).backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.clone() for p in trained]
    assert is_close(measured(model, reg), want)
    assert all(torch.equal(p.grad, before) for p, before in zip(trained, gradients, strict=True))
    assert all(module.training for module in model.modules())
    assert not any(isinstance(h, importance._Note) for m in model.modules() for h in m._forward_hooks.values())


def test_an_activation_in_place_is_not_in_it():
    found = []
    for in_place in (False, True):
        torch.manual_seed(0)
        base = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(inplace=in_place), torch.nn.Linear(16, 4))
        model = get_peft_model(base, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        reg = EllaRegularizer(model, CONFIG)
        found.append(importance.measure(model, reg.layers, (model(x).square().sum() for x in torch.eye(8))))
    assert is_close(found[1], found[0])


@pytest.mark.parametrize("inside", [False, True])
def test_half_precision(inside):
    """Small gradients in float16, the forward or all of it under autocast, are not flushed to zero."""
    model, reg = begun()
    want = measured(model, reg)

    def halved(m):
        for row in TOKENS:
            with torch.autocast("cpu", torch.float16):
                loss = loss_of(m, row[None])
            yield 1e-3 * loss

    with torch.autocast("cpu", torch.float16, enabled=inside):
        found = measured(model, reg, halved)
    assert is_close({n: [1e6 * part.double() for part in pair] for n, pair in found.items()}, want, 1e-2)


def test_compiled_code_is_measured():
    model, reg = begun(target_modules=["q_proj", "gate_proj", "down_proj"])
    want = measured(model, reg)
    for block in model.base_model.model.model.layers:
        block.mlp.compile(backend="aot_eager")
    loss_of(model).backward()
    assert is_close(measured(model, reg), want)
    whole, other = begun(target_modules=["q_proj", "gate_proj", "down_proj"])
    whole.compile(backend="aot_eager")
    assert is_close(measured(whole, other), want)


def test_only_the_adapter_in_training_is_measured():
    """A reference model in a preference loss has gradients too, here."""
    model, reg = begun()
    want = measured(model, reg)

    def with_reference(m):
        for row in TOKENS:
            with m.disable_adapter():
                embedded = m.get_input_embeddings()(row[None]).detach().requires_grad_()
                reference = m(inputs_embeds=embedded).logits.sum()
            with torch.no_grad():
                loss_of(m)
            yield loss_of(m, row[None]) + 1e-3 * reference

    assert is_close(measured(model, reg, with_reference), want)


# --- the penalty ------------------------------------------------------------------------------------------------------


def finished(config=CONFIG, scale=1.0):
    """A model within its third task; also, by layer, the matrices that its penalty is of, in float64."""
    model, reg = begun(config)
    total = {}
    for seed, task in ((1, "a"), (2, "b")):
        randomise(model, seed)
        size = sum(part.square().sum() for parts in deltas(reg).values() for part in parts)
        sums = dense(model, reg, TOKENS[:, None])
        whole = sum(rows.sum() for rows, _ in sums.values())
        for name, pair in sums.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = [a + b * size / whole for a, b in zip(before, pair, strict=True)]
        reg.measure_importance(losses(model, scale))
        reg.end_task(task)
    randomise(model, 3)
    return model, reg, {name: torch.outer(rows, cols) / rows.sum() for name, (rows, cols) in total.items()}


def test_the_penalty_is_the_dense_one():
    _, reg, matrices = finished(EllaConfig(penalty="importance", ella_lambda=3.0))
    want = {name: (parts[0].square() * matrices[name]).sum().item() for name, parts in deltas(reg).items()}
    assert reg.values() == pytest.approx(want, rel=1e-5)
    penalty = reg.penalty()
    assert penalty.item() == pytest.approx(3.0 * sum(want.values()), rel=1e-5)
    penalty.backward()
    for layer in reg.layers:
        a, b = (p.detach().double().requires_grad_() for p in layer.parameters())
        (3.0 * ((layer.scaling() * b @ a).square() * matrices[layer.name]).sum()).backward()
        for found, expected in zip(layer.parameters(), (a, b), strict=True):
            assert relative_error(found.grad.double(), expected.grad) < 1e-5


def test_the_strength_is_set_by_its_size():
    """An update as large as all earlier ones together adds 4 where it lies by chance."""
    _, reg, matrices = finished()
    size = sum(matrix.sum().item() for matrix in matrices.values())
    n = sum(matrix.numel() for matrix in matrices.values())
    assert reg.strength() == pytest.approx(4.0 * n / size**2, rel=1e-5)


def test_the_scale_of_a_loss_is_not_in_it():
    _, one, matrices = finished()
    _, scaled, _ = finished(scale=2.0**-40)
    assert scaled.values() == pytest.approx(one.values(), rel=1e-5)
    _, rms, _ = finished(EllaConfig(penalty="importance", ella_lambda=1.0, normalize="rms"))
    for name, value in rms.values().items():
        assert value == pytest.approx(one.values()[name] / matrices[name].mean().item(), rel=1e-5)


# --- from one process to the next -------------------------------------------------------------------------------------


def test_it_is_saved_with_the_past(tmp_path):
    model, reg, _ = finished()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=r"\['a', 'b'\], but not their importance to penalise by: load it with Ella"):
        EllaRegularizer(loaded, CONFIG)
    again = EllaRegularizer.from_pretrained(loaded, tmp_path)
    assert again.config == CONFIG and again.values() == pytest.approx(reg.values(), rel=1e-6)
    again.measure_importance(losses(loaded))
    again.end_task("c")
    assert again.tasks == ["a", "b", "c"] and again.strength() < reg.strength()
    other = tmp_path / "other"
    reg.save_pretrained(other)
    fresh = EllaRegularizer.from_pretrained(get_peft_model(llama(), lora()), other)
    randomise(fresh.model, 3)
    assert fresh.values() == pytest.approx(reg.values(), rel=1e-6)


def test_a_trainer_resumes_with_it(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def record_losses(model):
        return (model(**{key: value[None] for key, value in record.items()}).loss for record in EXAMPLES[:4])

    def train(reg, **resume):
        trainer = InOrder(reg.model, arguments(tmp_path, **options), train_dataset=EXAMPLES)
        attach(trainer, reg)
        trainer.train(**resume)
        reg.measure_importance(record_losses(reg.model))
        reg.end_task("last")
        randomise(reg.model, 9)

    unbroken = EllaRegularizer(classifier(), CONFIG)
    randomise(unbroken.model, 1)
    unbroken.measure_importance(record_losses(unbroken.model))
    unbroken.end_task("before")
    train(unbroken)
    resumed = EllaRegularizer(classifier(), CONFIG)
    train(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.tasks == ["before", "last"]
    assert resumed.values() == pytest.approx(unbroken.values(), rel=1e-5)
    assert difference(weights(resumed.model), weights(unbroken.model)) < 1e-6


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_task_that_was_not_measured_is_not_folded():
    model, reg = begun()
    message = r"of 'a' was not measured: before end_task\('a'\) call measure_importance\(losses\)"
    with pytest.raises(ValueError, match=message):
        reg.end_task("a")
    assert reg.tasks == []
    reg.measure_importance(losses(model))
    reg.reset_adapter()  # the task begins anew
    randomise(model, 2)
    with pytest.raises(ValueError, match=message):
        reg.end_task("a")
    reg.measure_importance(losses(model))
    reg.end_task("a")
    randomise(model, 0, size=0.0)
    reg.end_task("nothing was learned")
    randomise(model, 3)
    with pytest.raises(ValueError, match="the importance of 'b' was not measured"):
        reg.end_task("b")


def test_losses_that_tell_nothing_are_refused():
    model, reg = begun()
    with pytest.raises(
        ValueError, match=r"nothing was measured: expected losses that depend on the LoRA layers, \(model"
    ):
        reg.measure_importance([])
    own = r"loss {} comes from no forward of its own through the LoRA layers: expected losses that are computed while"

    def of_one_forward():
        """Per record, of a batch: the second one's gradients would be lost."""
        scores = model(input_ids=TOKENS).logits[:, :-1].transpose(1, 2)
        yield from torch.nn.functional.cross_entropy(scores, TOKENS[:, 1:], reduction="none").mean(1)

    of_weights = (sum(p.sum() for p in model.parameters()) for _ in range(1))
    for of, number in (([loss_of(model)], 1), (of_weights, 1), (of_one_forward(), 2)):
        with pytest.raises(ValueError, match=own.format(number)):
            reg.measure_importance(of)
    with pytest.raises(ValueError, match=r"loss 1 has no graph: compute it with adapters enabled, outside"):
        reg.measure_importance(loss.detach() for loss in losses(model))
    with pytest.raises(ValueError, match=r"gradients of .*q_proj are not finite: nothing is taken"):
        reg.measure_importance(losses(model, float("inf")))
    with pytest.raises(ValueError, match=r"penalty is 'hadamard'; what is measured here is for penalty='importance'"):
        begun(EllaConfig())[1].measure_importance([])
    with pytest.raises(TypeError, match=r"loss 1 must be a tensor of one element, \(model.*; found CausalLMOutput"):
        reg.measure_importance(model(input_ids=row[None]) for row in TOKENS)
    with pytest.raises(TypeError, match=r"losses must be made one by one, .*; found Tensor"):
        reg.measure_importance(loss_of(model))
    model.disable_adapter_layers()
    with pytest.raises(ValueError, match="loss 1 has no graph"):
        reg.measure_importance(losses(model))


def test_what_was_measured_before_the_last_step_is_not_taken():
    model, reg = begun()
    reg.measure_importance(losses(model))
    randomise(model, 5)
    with pytest.raises(ValueError, match="was measured before 'a' was trained to where it is now"):
        reg.end_task("a")
    other = EllaRegularizer(model, CONFIG)
    reg.measure_importance(losses(model))
    other.measure_importance(losses(model))
    other.end_task("a")
    randomise(model, 6)
    with pytest.raises(ValueError, match="was measured before 'b' was trained"):
        reg.end_task("b")
    reg.measure_importance(losses(model))
    reg.end_task("b")
    assert reg.tasks == ["a", "b"]


def test_a_layer_that_no_gradient_reaches_is_named():
    model, reg = begun()
    projection = model.base_model.model.model.layers[0].self_attn.q_proj

    def elsewhere(module, args, output):
        return output.detach()

    handle = projection.register_forward_hook(elsewhere)
    with pytest.raises(ValueError, match=r"no gradient reaches model.layers.0.self_attn.q_proj, although its forward"):
        reg.measure_importance(losses(model))
    handle.remove()
    reg.measure_importance(losses(model))


def test_only_linear_layers_are_measured():
    with pytest.raises(ValueError, match=r"measured on linear layers; tokens is of kind 'embedding': leave it out of"):
        EllaRegularizer(tiny(), CONFIG)
    model = tiny(targets=["up", "down"])
    reg = EllaRegularizer(model, CONFIG)
    found = importance.measure(model, reg.layers, (m(ids()).square().sum() for m in [model]))
    assert [len(found["down"].rows), len(found["down"].cols)] == [12, 16]  # of a transposed weight
    hadamard = EllaRegularizer(tiny())
    with pytest.raises(ValueError, match="measured on linear layers"):
        hadamard.config = CONFIG


def test_a_past_without_it_is_not_penalised_by_it():
    _, reg = begun(EllaConfig())
    reg.end_task("a")
    reg.config = CONFIG
    for call in (reg.penalty, lambda: reg.measure_importance([])):
        with pytest.raises(ValueError, match=r"tasks \['a'\] were folded without the importance that"):
            call()
    _, reg, _ = finished()
    reg.config = EllaConfig()
    assert reg.values()["model.layers.0.self_attn.q_proj"] > 0  # the past itself is there
    reg.end_task("c")  # of which nothing is measured
    reg.config = CONFIG
    with pytest.raises(ValueError, match="were folded without the importance"):
        reg.add_gradient_()
    assert all(held.importance is None for held in reg.state().layers.values())


def test_settings_of_components_mean_nothing_here():
    for options in ({"penalty_rank": 4}, {"penalty_energies": False}):
        with pytest.raises(ValueError, match=r"penalty='importance' has no components: expected penalty_rank=None"):
            EllaConfig(penalty="importance", **options)


def test_a_state_with_a_broken_one_is_not_written(tmp_path):
    _, reg, _ = finished()
    state = reg.state()
    held = state.layers[next(iter(state.layers))].importance
    held.rows[0] = -1.0
    with pytest.raises(ValueError, match=r"row_importance: expected energies of at least 0, found -1"):
        reg.save_pretrained(tmp_path)
    assert not (tmp_path / PAST_FILE).exists()
