"""The real Trainer against a hand-written loop: accumulation, clipping, evaluation and logging."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from ella import EllaCallback, EllaConfig, EllaRegularizer, attach
from tests.ella.models import bert, randomise
from tests.processes import called

STEPS, ACCUMULATION, BATCH, LR, CLIP = 5, 4, 2, 1e-2, 0.5


class InOrder(Trainer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # BERT's loss is a mean of its batch and ignores the item count: the trainer has to divide by the accumulation.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)


def data(n, seed=0):
    gen = torch.Generator().manual_seed(seed)
    return [
        {"input_ids": torch.randint(5, 60, (9,), generator=gen), "labels": torch.randint(0, 3, (), generator=gen)}
        for _ in range(n)
    ]


def classifier():
    lora = LoraConfig(task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, target_modules=["query", "value"])
    return get_peft_model(bert().train(), lora)


def model_with_past(ella_lambda=0.02, **options):
    model = classifier()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=ella_lambda, normalize="rms", **options))
    randomise(model, 1)
    reg.end_task("before")
    randomise(model, 2)
    return model, reg


def arguments(tmp_path, **options):
    settings = {
        "output_dir": str(tmp_path), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": LR,
        "gradient_accumulation_steps": ACCUMULATION, "max_grad_norm": CLIP, "lr_scheduler_type": "constant",
        "report_to": "none", "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True,
        "optim": "adamw_torch", "weight_decay": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**settings | options)


def trained_by_hand(examples, strength=1.0, ella_lambda=0.02):
    """Mean loss over the accumulated micro-batches plus the penalty once, clipped together."""
    model, reg = model_with_past(ella_lambda)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    penalties = []
    for step in range(STEPS):
        optimizer.zero_grad()
        penalty = strength * reg.penalty()
        penalty.backward()
        penalties.append(penalty.item())
        for micro in range(ACCUMULATION):
            start = (step * ACCUMULATION + micro) * BATCH
            rows = examples[start : start + BATCH]
            batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            (model(**batch).loss / ACCUMULATION).backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
    return weights(model), penalties


def trained_by_trainer(tmp_path, examples, with_penalty=True, **options):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path, **options), train_dataset=examples, eval_dataset=examples[:6])
    if with_penalty:
        attach(trainer, reg)
    trainer.train()
    return weights(model), trainer


def weights(model):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if p.requires_grad])


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


EXAMPLES = data(STEPS * ACCUMULATION * BATCH)


def test_trainer_equals_the_hand_written_loop(tmp_path):
    """With accumulation, clipping, and an evaluation in the middle of training."""
    want, penalties = trained_by_hand(EXAMPLES)
    found, trainer = trained_by_trainer(tmp_path, EXAMPLES, eval_strategy="steps", eval_steps=2)
    assert difference(found, want) < 1e-6
    logged = [entry["ella_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(penalties, rel=1e-5)
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    # The same comparison notices a penalty four times too strong, and one that is missing.
    too_strong, _ = trained_by_hand(EXAMPLES, strength=4.0)
    assert difference(found, too_strong) > 1e-3
    without, _ = trained_by_trainer(tmp_path, EXAMPLES, with_penalty=False)
    assert difference(found, without) > 1e-3


def test_the_penalty_added_in_compute_loss_is_four_times_too_strong(tmp_path):
    """Why the callback exists: where the model divides its loss by the item count, as language models do, the trainer
    does not divide again, and the loss of every micro-batch carries the whole penalty."""
    model, reg = model_with_past()

    class Naive(InOrder):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.model_accepts_loss_kwargs = True

        def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
            assert num_items_in_batch == ACCUMULATION * BATCH
            return model(**inputs).loss * BATCH / num_items_in_batch + reg.penalty()

    settings = arguments(tmp_path, average_tokens_across_devices=False)
    Naive(model, settings, train_dataset=EXAMPLES).train()
    exact, _ = trained_by_hand(EXAMPLES)
    four, _ = trained_by_hand(EXAMPLES, strength=4.0)
    assert difference(weights(model), four) < 1e-5
    assert difference(weights(model), exact) > 1e-3


def test_the_penalty_reaches_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, trainer = trained_by_trainer(tmp_path, EXAMPLES, report_to="tensorboard", logging_steps=2)
    logged = [entry["ella_penalty"] for entry in trainer.state.log_history if "ella_penalty" in entry]
    for folder in {path.parent for path in tmp_path.rglob("events.out*")}:
        events = EventAccumulator(str(folder))
        events.Reload()
        if "train/ella_penalty" in events.Tags()["scalars"]:
            assert [e.value for e in events.Scalars("train/ella_penalty")] == pytest.approx(logged, rel=1e-6)
            return
    pytest.fail("TensorBoard has no train/ella_penalty")


def test_a_gradient_scaler_scales_the_seed_too():
    """fp16 training divides all of ``p.grad`` by the scale before clipping: the seed must carry it."""
    model, reg = model_with_past()

    class Scaled:
        class scaler:
            @staticmethod
            def get_scale():
                return 1024.0

    callback = EllaCallback(reg)
    callback.on_step_begin(None, None, None, optimizer=Scaled())
    scaled = [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]
    model.zero_grad()
    reg.add_gradient_()
    plain = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert scaled and any(s.any() for s in scaled)
    for s, p in zip(scaled, plain, strict=True):
        assert torch.allclose(s, 1024 * p, rtol=1e-5, atol=0)


def test_several_tasks_through_trainers(tmp_path):
    """A new trainer per task, the same regularizer: the past grows and the penalty acts from the second task on."""
    model, reg = model_with_past()
    for task in ("second", "third"):
        trainer = InOrder(model, arguments(tmp_path, max_steps=2), train_dataset=EXAMPLES)
        attach(trainer, reg)
        trainer.train()
        reg.end_task(task)
        assert not any(".default." in n and p.requires_grad for n, p in model.named_parameters())
    assert reg.tasks == ["before", "second", "third"]
    assert reg.state().layers[reg.layers[0].name].rank == 12


# --- resuming --------------------------------------------------------------------------------------------------------


def resume(folder, checkpoint, out):
    model = classifier()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=0.02, normalize="rms"))
    trainer = InOrder(model, arguments(folder), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train(resume_from_checkpoint=checkpoint)
    logged = [entry["ella_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    past = {name: layer.tensors() for name, layer in reg.state().layers.items()}
    torch.save({"weights": weights(model), "past": past, "tasks": reg.tasks, "logged": logged}, out)


def resumed(tmp_path, checkpoint):
    """What a fresh process finds."""
    called(tmp_path / "log", resume, tmp_path, checkpoint, tmp_path / "found.pt")
    return torch.load(tmp_path / "found.pt")


@pytest.mark.parametrize("past_rank", [128, 6])
def test_a_fresh_process_resumes_within_a_later_task(tmp_path, past_rank):
    """The model, the past with its energies and the tasks come from the checkpoint alone."""
    model, reg = model_with_past(past_rank=past_rank)
    reg.end_task("between")
    randomise(model, 4)
    trainer = InOrder(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    found = resumed(tmp_path, str(tmp_path / "checkpoint-2"))
    assert difference(found["weights"], weights(model)) < 1e-6
    assert found["tasks"] == reg.tasks == ["before", "between"]
    logged = [entry["ella_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    assert found["logged"] == pytest.approx(logged, rel=1e-5)
    for name, layer in reg.state().layers.items():
        tensors = found["past"][name]
        assert tensors.keys() == layer.tensors().keys() and ("row_energy" in tensors) == (past_rank == 6)
        assert all(torch.equal(tensors[key], tensor) for key, tensor in layer.tensors().items())
    # The same process, which has the past already.
    again = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    attach(again, reg)
    randomise(model, 77)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert difference(weights(model), found["weights"]) < 1e-6


def test_a_fresh_process_resumes_within_the_first_task(tmp_path):
    model = classifier()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=0.02, normalize="rms"))
    trainer = InOrder(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    found = resumed(tmp_path, True)
    assert difference(found["weights"], weights(model)) < 1e-6 and found["tasks"] == []
    # And not into a model that has finished other tasks.
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    attach(trainer, reg)
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"holds no state of ELLA, but this model has finished \['before'\]: resuming would"
    ):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(weights(model), before)


def test_a_callback_without_attach_does_not_mix_tasks(tmp_path):
    """After one task the knowledge has the trained adapter's rank: PEFT loads it there without a word."""
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    fresh = classifier()
    callback = EllaCallback(EllaRegularizer(fresh))
    trainer = InOrder(fresh, arguments(tmp_path), train_dataset=EXAMPLES, callbacks=[callback])
    with pytest.raises(ValueError, match="an adapter 'ella_task' of a later task that was loaded without"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path, save_strategy="steps", save_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    reg.end_task("later")
    trainer = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    attach(trainer, reg)
    with pytest.raises(ValueError, match=r"has finished the tasks \['before'\], this model \['before', 'later'\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for file in (tmp_path / "checkpoint-2").glob("ella_past*"):
        file.unlink()
    fresh = classifier()
    trainer = InOrder(fresh, arguments(tmp_path), train_dataset=EXAMPLES)
    attach(trainer, EllaRegularizer(fresh))
    with pytest.raises(ValueError, match="holds no state of ELLA, but it was saved in a later task"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize("first_task", [True, False])
def test_the_best_model_is_the_best_of_the_current_task(tmp_path, first_task):
    model, reg = (classifier(), None) if first_task else model_with_past()
    reg = reg or EllaRegularizer(model)
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    settings = arguments(tmp_path, load_best_model_at_end=True, greater_is_better=True, **options)
    knowledge = None if first_task else {n: p.clone() for n, p in model.named_parameters() if ".default" in n}
    trainer = InOrder(model, settings, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:6])
    attach(trainer, reg)
    seen = {}
    trainer.add_callback(type("Keep", (TrainerCallback,), {
        "on_save": lambda self, args, state, control, **kwargs: seen.update({state.global_step: weights(model)})
    })())  # fmt: skip
    trainer.train()
    # The worst is the best here: not the last one, whatever is learned.
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < STEPS and torch.equal(weights(model), seen[best]) and not torch.equal(seen[best], seen[STEPS])
    if knowledge is not None:
        assert all(torch.equal(p, knowledge[n]) for n, p in model.named_parameters() if n in knowledge)
        with pytest.raises(
            ValueError, match="load_best_model_at_end loads the finished tasks in place of the current one"
        ):
            InOrder(
                model, settings, train_dataset=EXAMPLES, eval_dataset=EXAMPLES[:6], callbacks=[EllaCallback(reg)]
            ).train()  # fmt: skip


def test_the_folder_of_save_model_goes_on(tmp_path):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path / "run"), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    again = EllaRegularizer.from_pretrained(classifier(), tmp_path / "saved")
    assert again.tasks == ["before"] and again.config == reg.config
    # Its root is a checkpoint without optimizer: adapters and past are taken from it.
    fresh = classifier()
    own = EllaRegularizer(fresh, reg.config)
    trainer = InOrder(fresh, arguments(tmp_path / "run"), train_dataset=EXAMPLES)
    attach(trainer, own)
    trainer._load_from_checkpoint(str(tmp_path / "saved"))
    assert torch.equal(weights(fresh), weights(model)) and own.values() == reg.values()


# --- a trainer that does otherwise -----------------------------------------------------------------------------------


class Zeroing(InOrder):
    set_to_none = True

    def training_step(self, model, *args, **kwargs):
        model.zero_grad(set_to_none=self.set_to_none)
        return super().training_step(model, *args, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_trainer_that_zeroes_the_seed_is_an_error_in_the_first_step(tmp_path, set_to_none, accumulation):
    model, reg = model_with_past(ella_lambda=1.0)
    before = weights(model)
    settings = arguments(tmp_path, gradient_accumulation_steps=accumulation)
    trainer = type("Zeroing", (Zeroing,), {"set_to_none": set_to_none})(model, settings, train_dataset=EXAMPLES)
    attach(trainer, reg)
    with pytest.raises(RuntimeError, match="dropped the penalty's gradient between the start of the optimizer step"):
        trainer.train()
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("ella_lambda", [0.0, 1e-9, 1e-3, 1.0, 1e6])
def test_no_other_trainer_is(tmp_path, ella_lambda):
    model, reg = model_with_past(ella_lambda=ella_lambda)
    trainer = InOrder(model, arguments(tmp_path, max_steps=2), train_dataset=EXAMPLES)
    attach(trainer, reg)
    trainer.train()


def test_another_model_in_the_trainer_is_an_error(tmp_path):
    _, reg = model_with_past()
    other, _ = model_with_past()
    trainer = InOrder(other, arguments(tmp_path), train_dataset=EXAMPLES, callbacks=[EllaCallback(reg)])
    with pytest.raises(ValueError, match="trains another model than the regularizer's"):
        trainer.train()
    trainer = InOrder(args=arguments(tmp_path), model_init=lambda: reg.model, train_dataset=EXAMPLES)
    with pytest.raises(ValueError, match="model_init builds a new model for every run"):
        attach(trainer, EllaRegularizer(trainer.model))


def test_wrong_attachments_are_named(tmp_path):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    other = InOrder(model_with_past()[0], arguments(tmp_path), train_dataset=EXAMPLES)
    with pytest.raises(TypeError, match="trainer must be a transformers Trainer, found Linear"):
        attach(nn.Linear(1, 1), reg)
    with pytest.raises(TypeError, match="regularizer must be an EllaRegularizer, found str"):
        attach(trainer, "reg")
    with pytest.raises(ValueError, match="belongs to another model"):
        attach(other, reg)
    wrapped = nn.Module()
    wrapped.inner = model
    other.model = wrapped
    with pytest.raises(ValueError, match=r"a Module, wraps the regularizer's.* give the trainer the PeftModel itself"):
        attach(other, reg)
    attach(trainer, reg)
    with pytest.raises(ValueError, match="already has an EllaCallback"):
        attach(trainer, reg)


def test_engines_that_would_lose_the_penalty_are_refused(tmp_path):
    model, reg = model_with_past()
    trainer = InOrder(model, arguments(tmp_path), train_dataset=EXAMPLES)
    trainer.args.fsdp, trainer.args.fsdp_config = True, {"version": 1}
    with pytest.raises(ValueError, match="FSDP1's flat parameters hold no rows of a LoRA factor"):
        attach(trainer, reg)
    with pytest.raises(ValueError, match="FSDP1's flat parameters"):
        EllaCallback(reg).on_train_begin(trainer.args, trainer.state, trainer.control)
    trainer.args.fsdp, trainer.args.deepspeed = None, {"config": 1}
    with pytest.raises(ValueError, match="DeepSpeed keeps gradients apart from the parameters, where the callback's"):
        EllaCallback(reg).on_train_begin(trainer.args, trainer.state, trainer.control)
