"""Adapters, folders and trainers that others change: the right model, or an error that says what to do."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from ella import EllaConfig, EllaRegularizer, attach
from ella.acting import TASK
from ella.checkpoint import PAST_FILE, load_past
from ella.trainer import _Seed
from tests.ella.models import Tiny, ids, llama, logits, lora, randomise, tiny
from tests.ella.test_trainer import EXAMPLES, InOrder, arguments, classifier, difference, model_with_past, weights
from tests.kernels.cases import relative_error


def finished(**options):
    """A model within its second task."""
    model = get_peft_model(llama(), lora(**options))
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
    randomise(model, 1)
    reg.end_task("a")
    randomise(model, 2)
    return model, reg


# --- in the model -----------------------------------------------------------------------------------------------------


def test_a_trained_adapter_made_anew_is_noticed(tmp_path):
    """With another rank for the next task, say. What the message says brings the finished tasks back."""
    model, reg = finished()
    randomise(model, 3, TASK, size=0.0)
    want = logits(model)
    model.delete_adapter(TASK)
    with pytest.raises(ValueError, match="adapter 'default' holds the finished tasks"):
        EllaRegularizer(model)
    model.add_adapter(TASK, lora(r=8))
    model.set_adapter(TASK)
    with pytest.raises(ValueError, match=r"lost its model.*'ella_task' was deleted and made anew, without"):
        reg.penalty()
    with pytest.raises(ValueError, match=r"\['a'\], but 'ella_task', .* selected_adapters=\['default'\]"):
        EllaRegularizer(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    again = EllaRegularizer(loaded)
    assert again.tasks == ["a"] and relative_error(logits(loaded), want) < 1e-6


def test_a_pickled_model_is_the_same(tmp_path):
    """With an attention, whose class is made when finished tasks first act in it."""
    model = tiny(targets=["attention", "up", "tokens"])
    reg = EllaRegularizer(model)
    reg.end_task("a")
    randomise(model, 2)
    want = model(ids()).detach()
    torch.save(model, tmp_path / "model.pt")
    found = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(found(ids()), want)
    assert [type(m) for m in found.modules()] == [type(m) for m in model.modules()]
    again = EllaRegularizer(found)
    again.end_task("b")
    assert again.tasks == ["a", "b"] and reg.tasks == ["a"]
    assert relative_error(found(ids()).detach(), want) < 1e-6


def test_the_adapters_state_is_asked_for_by_name():
    model, reg = finished()
    known, current = get_peft_model_state_dict(model), get_peft_model_state_dict(model, adapter_name=reg.adapter)
    assert known.keys() == current.keys()
    for layer in reg.layers:
        for factor, adapter, state in ((0, "default", known), (0, TASK, current), (1, TASK, current)):
            name = f"base_model.model.{layer.path}.lora_{'AB'[factor]}.weight"
            assert torch.equal(state[name], layer.parameters(adapter)[factor])


def test_finished_tasks_are_not_trained():
    model, reg = finished()
    for name, p in model.named_parameters():
        p.requires_grad = "lora_" in name
    for call in (reg.penalty, reg.add_gradient_, lambda: reg.end_task("b")):
        with pytest.raises(ValueError, match="the finished tasks, adapter 'default', are set to be trained"):
            call()
    for name, p in model.named_parameters():
        p.requires_grad = f".{TASK}." in name
    reg.penalty().backward()


def test_rescaled_finished_tasks_are_not_folded():
    model, reg = finished()
    for layer in reg.layers:
        layer.module.set_scale("default", 0.5)
    with pytest.raises(ValueError, match=r"are scaled by 0\.5 .* scale 'default' by 1 again before 'b' is folded"):
        reg.end_task("b")
    assert reg.tasks == ["a"]
    for layer in reg.layers:
        layer.module.set_scale("default", 1.0)
    before = logits(model)
    reg.end_task("b")
    assert relative_error(logits(model), before) < 1e-6


def test_orthogonal_factors_beside_an_embedding():
    model = get_peft_model(
        Tiny(), LoraConfig(r=4, target_modules=["tokens", "up"], init_lora_weights="orthogonal")
    ).eval()
    reg = EllaRegularizer(model)
    randomise(model, 1)
    before = model(ids()).detach()
    reg.end_task("a")
    assert relative_error(model(ids()).detach(), before) < 1e-6


def test_a_task_ends_under_autocast_as_without():
    found = []
    for enabled in (False, True):
        model = get_peft_model(llama(), lora())
        reg = EllaRegularizer(model, EllaConfig(keep_past="merge"))
        randomise(model, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            reg.end_task("a")
        found.append(logits(model))
    assert torch.equal(*found)


# --- in a folder ------------------------------------------------------------------------------------------------------


def test_a_state_written_over_an_earlier_one_is_refused(tmp_path):
    """The adapter within task b stays in the folder: loaded by PEFT, b would act twice."""
    model, reg = finished()
    model.save_pretrained(tmp_path)
    reg.end_task("b")
    want = logits(model)
    reg.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=r"finished tasks \['a'\], ELLA's state beside it with \['a', 'b'\]"):
        EllaRegularizer.from_pretrained(loaded, tmp_path)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert EllaRegularizer.from_pretrained(loaded, tmp_path).tasks == ["a", "b"]
    assert relative_error(logits(loaded), want) < 1e-6


def test_an_adapter_written_over_that_of_another_run_is_refused(tmp_path):
    model, _ = finished()
    model.save_pretrained(tmp_path)
    first = get_peft_model(llama(), lora())
    EllaRegularizer(first)
    randomise(first, 5)
    first.save_pretrained(tmp_path)  # in its first task, with no state of ELLA yet
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    with pytest.raises(ValueError, match=r"saved with the finished tasks \[\], ELLA's state beside it with \['a'\]"):
        EllaRegularizer.from_pretrained(loaded, tmp_path)


def test_finished_tasks_saved_over_an_earlier_save_are_not_mixed(tmp_path):
    """Only "default" is saved the second time: "ella_task" of task b stays, which the first now holds too."""
    model, reg = finished()
    model.save_pretrained(tmp_path)
    reg.end_task("b")
    want = logits(model)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    match = r"ella_task was trained after the finished tasks \['a'\], the adapter beside it holds \['a', 'b'\]"
    for start in (llama, get_fresh):
        loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True) if start is llama else get_fresh()
        with pytest.raises(ValueError, match=match):
            EllaRegularizer.from_pretrained(loaded, tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    loaded.load_adapter(str(tmp_path / TASK), TASK, is_trainable=True)
    with pytest.raises(ValueError, match="the adapter 'ella_task' was trained after"):
        EllaRegularizer(loaded)
    loaded.delete_adapter(TASK)  # as the message says
    assert EllaRegularizer(loaded).tasks == ["a", "b"]
    assert relative_error(logits(loaded), want) < 1e-6
    shutil.rmtree(tmp_path / TASK)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    assert EllaRegularizer.from_pretrained(loaded, tmp_path).tasks == ["a", "b"]
    assert relative_error(logits(loaded), want) < 1e-6


def test_a_trained_adapter_of_an_earlier_save_is_not_taken_beside_newer_tasks(tmp_path):
    model, reg = finished()
    model.save_pretrained(tmp_path / "old")
    reg.end_task("b")
    model.save_pretrained(tmp_path / "new")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "new", is_trainable=True)
    loaded.load_adapter(str(tmp_path / "old" / TASK), TASK, is_trainable=True)  # this is task b
    with pytest.raises(ValueError, match=r"the adapter 'ella_task' was trained after the finished tasks \['a'\]"):
        EllaRegularizer.from_pretrained(loaded, tmp_path / "new")
    alone = PeftModel.from_pretrained(llama(), tmp_path / "old" / TASK, is_trainable=True)
    with pytest.raises(
        ValueError, match=r"'default' was saved as the task in training after the finished tasks \['a'\]"
    ):
        EllaRegularizer(alone)


@pytest.mark.parametrize("place", ["", "foo"])
def test_an_adapter_of_another_name_goes_on_with_its_task(tmp_path, place):
    """PEFT gives it a folder of its own, and the trained one another beside it."""
    config = EllaConfig(adapter_name="foo")
    model = get_peft_model(llama(), lora(), adapter_name="foo")
    reg = EllaRegularizer(model, config)
    randomise(model, 1, "foo")
    reg.end_task("a")
    randomise(model, 2)
    want = logits(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "foo", adapter_name="foo", is_trainable=True)
    EllaRegularizer.from_pretrained(loaded, tmp_path / place)
    assert relative_error(logits(loaded), want) < 1e-6
    reg.end_task("b")
    model.save_pretrained(tmp_path, selected_adapters=["foo"])
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "foo", adapter_name="foo", is_trainable=True)
    with pytest.raises(ValueError, match=r"ella_task was trained after the finished tasks \['a'\], the adapter beside"):
        EllaRegularizer.from_pretrained(loaded, tmp_path / place)


def test_a_state_in_a_folder_of_its_own_takes_no_task_from_beside_it(tmp_path):
    model, reg = finished()
    model.save_pretrained(tmp_path)
    reg.save_pretrained(tmp_path / "state")
    model.set_adapter("default")
    want = logits(model)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    EllaRegularizer.from_pretrained(loaded, tmp_path / "state")
    assert relative_error(logits(loaded), want) < 1e-6


def test_finished_tasks_that_were_trained_on_are_taken_with_a_warning(tmp_path):
    """As the plain LoRA that they are, by PEFT alone."""
    model, _ = finished()
    model.save_pretrained(tmp_path / "learned")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "learned", is_trainable=True)
    with torch.no_grad():
        for name, p in loaded.named_parameters():
            if "lora_B" in name:
                p.mul_(1.1)
    loaded.save_pretrained(tmp_path / "more")
    again = PeftModel.from_pretrained(llama(), tmp_path / "more", is_trainable=True)
    with pytest.warns(UserWarning, match=r"of the finished tasks \['a'\] is .*: the adapter has been changed since"):
        assert EllaRegularizer(again).tasks == ["a"]
    assert relative_error(logits(again), logits(loaded)) < 1e-6


def get_fresh():
    return get_peft_model(llama(), lora())


def test_a_trained_adapter_knows_what_it_follows_after_a_load(tmp_path):
    """Its note is of now, not of the file it came from; and a rank pattern of the user's stays what it was."""
    pattern = {"q_proj": 3}
    model, _ = finished(rank_pattern=pattern)
    model.save_pretrained(tmp_path / "a")
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "a", is_trainable=True)
    reg = EllaRegularizer.from_pretrained(loaded, tmp_path / "a")
    reg.end_task("b")
    randomise(loaded, 3, TASK)
    loaded.save_pretrained(tmp_path / "b")
    again = PeftModel.from_pretrained(llama(), tmp_path / "b", is_trainable=True)
    again.load_adapter(str(tmp_path / "b" / TASK), TASK, is_trainable=True)
    last = EllaRegularizer(again)
    assert last.tasks == ["a", "b"] and relative_error(logits(again), logits(loaded)) < 1e-6
    last.end_task("c")
    assert again.peft_config[TASK].rank_pattern == pattern
    assert {layer.parameters()[0].shape[0] for layer in last.layers} == {3, 4}


def test_a_configuration_alone_is_no_past(tmp_path):
    """Read from a saved folder and put on a fresh model, it says that random factors are finished tasks."""
    model, _ = finished()
    model.save_pretrained(tmp_path)
    fresh = get_peft_model(llama(), LoraConfig.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match=r"is that of finished tasks, but its factors are not .* \['a'\] is"):
        EllaRegularizer(fresh)
    half = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True).to(torch.bfloat16)
    assert EllaRegularizer(half).tasks == ["a"]


# --- in a trainer -----------------------------------------------------------------------------------------------------


def saving(folder, **options):
    return arguments(folder, max_steps=4, save_strategy="steps", save_steps=2, **options)


def test_a_run_into_the_folder_of_another_is_its_own(tmp_path):
    """The first task writes no state of ELLA by itself: that of a checkpoint it writes over must not stay."""
    model, reg = model_with_past()
    trainer = InOrder(model, saving(tmp_path), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    assert load_past(tmp_path / "checkpoint-2").tasks == ["before"]

    model = classifier()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=0.02, normalize="rms"))
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}
    trainer = InOrder(model, saving(tmp_path, **options), train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:6])
    attach(trainer, reg)
    trainer.train()
    assert reg.tasks == [] and load_past(tmp_path / "checkpoint-2").tasks == []
    trained = weights(model)

    again = classifier()
    reg = EllaRegularizer(again, EllaConfig(ella_lambda=0.02, normalize="rms"))
    trainer = InOrder(again, saving(tmp_path, **options), train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:6])
    attach(trainer, reg)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert reg.tasks == [] and difference(weights(again), trained) < 1e-6


def test_the_best_model_is_not_another_runs(tmp_path):
    model, _ = model_with_past()
    model.save_pretrained(tmp_path / "old")
    assert (tmp_path / "old" / PAST_FILE).exists()
    model = classifier()
    reg = EllaRegularizer(model)
    trainer = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.state.best_model_checkpoint = str(tmp_path / "old")
    with pytest.raises(ValueError, match=r"has finished the tasks \['before'\], this run \[\]: it is another run's"):
        trainer._load_best_model()


def test_a_trainer_is_of_one_task(tmp_path):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path, max_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    trainer.train()  # the same task again
    reg.end_task("second")
    with pytest.raises(ValueError, match=r"of an earlier task \(finished then: \['before'\].*make a new trainer"):
        trainer.train()
    trainer.optimizer = trainer.lr_scheduler = None
    trainer.train()


def test_a_step_that_was_broken_off_leaves_no_hook(tmp_path):
    class Broken(InOrder):
        def compute_loss(self, *args, **kwargs):
            raise KeyboardInterrupt

    model, reg = model_with_past()
    trainer = Broken(model, arguments(tmp_path, max_steps=2), train_dataset=EXAMPLES)
    callback = attach(trainer, reg)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    callback.on_train_begin(trainer.args, None, None)
    gc.collect()
    assert not any(isinstance(found, _Seed) for found in gc.get_objects())


def test_what_cannot_be_told_is_no_alarm():
    parameter = nn.Parameter(torch.ones(4))

    def arrived(act):
        parameter.grad = torch.full((4,), 0.1)
        seed = _Seed(parameter, parameter.grad)
        act()
        return seed.arrived()

    def overflow():
        (parameter * float("inf")).sum().backward()

    def stepped():  # an optimizer that steps in the backward
        parameter.grad = None
        with torch.no_grad():
            parameter.add_(1.0)

    def dropped():
        parameter.grad = None

    assert arrived(overflow) is None and arrived(stepped) is None and arrived(dropped) is False
