"""Cases: the transformers Trainer under every engine."""

from __future__ import annotations

import os

import torch
from accelerate import DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ella import EllaRegularizer, attach
from tests.distributed.models import (
    BATCH,
    CLIP,
    LR,
    STEPS,
    adapted,
    batch,
    rank,
    regularized,
    weights,
    with_past,
    world,
)  # fmt: skip

WRAPPED = {"llama": ["LlamaDecoderLayer"], "t5": ["T5Block"]}


class InOrder(Trainer):
    def _get_train_sampler(self, *_args, **_kwargs):
        return SequentialSampler(self.train_dataset)


def rows(kind, steps, first=0):
    batches = [batch(kind, first + step) for step in range(steps)]
    return [{key: value[i] for key, value in whole.items()} for whole in batches for i in range(BATCH)]


def as_on_gpus(kind):
    """accelerate runs these engines on accelerators only: its state is told that the CPUs are some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = kind


def forget_the_last_engine():
    """What accelerate and transformers remember of it, in a process that runs one case after another."""
    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def arguments(folder, kind, engine, accumulation, **options):
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH // world(),
        "learning_rate": LR, "gradient_accumulation_steps": accumulation, "max_grad_norm": CLIP,
        "lr_scheduler_type": "constant", "report_to": "none", "logging_steps": 1, "save_strategy": "no",
        "use_cpu": not engine.startswith("zero") or world() == 1,
        "disable_tqdm": True, "optim": "sgd", "weight_decay": 0.0, "seed": 5,
        # Else the loss of a model that takes no token count, as T5, is multiplied by the number of processes.
        "average_tokens_across_devices": False,
        "dataloader_pin_memory": False, "per_device_eval_batch_size": BATCH // world(),
    } | options  # fmt: skip
    if world() > 1 and engine == "fsdp2":
        as_on_gpus(DistributedType.MULTI_GPU)
        settings["accelerator_config"] = {"use_configured_state": True}
        config = {"version": 2, "transformer_layer_cls_to_wrap": WRAPPED[kind]}
        settings |= {"fsdp": True, "fsdp_config": config | settings.pop("fsdp_config", {})}
    if world() > 1 and engine.startswith("zero"):
        as_on_gpus(DistributedType.DEEPSPEED)
        settings["accelerator_config"] = {"use_configured_state": True}
        settings["deepspeed"] = {
            "zero_optimization": {"stage": int(engine[-1])}, "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto", "gradient_clipping": "auto", "zero_allow_untested_optimizer": True,
        }  # fmt: skip
    return TrainingArguments(**settings)


def in_a_fresh_model(kind, reg, folder):
    """What a new process does under ZeRO-3, whose engines do not follow a model into another task."""
    fresh = weights(reg)
    reg.save_pretrained(folder)
    model = adapted(kind)
    reg = EllaRegularizer.from_pretrained(model, folder)
    with torch.no_grad():
        for layer in reg.layers:
            for factor, p in zip("AB", layer.parameters(), strict=True):
                p.copy_(fresh[f"{layer.name}.{factor}"])
    return model, reg


def two_tasks(folder, kind, engine, accumulation, strength="1.0"):
    """A trainer per task on one model, evaluated in between."""
    forget_the_last_engine()
    torch.manual_seed(7)
    model = adapted(kind)
    reg = regularized(model, float(strength))
    logs, n = [], int(accumulation)
    for number, task in enumerate(("first", "second")):
        options = {"eval_strategy": "steps", "eval_steps": 2}
        data = rows(kind, STEPS * n, 100 * number)
        trainer = InOrder(
            model, arguments(folder, kind, engine, n, **options), train_dataset=data, eval_dataset=rows(kind, 1, 900)
        )
        attach(trainer, reg)
        trainer.train()
        assert world() == 1 or reg._spread() == {"fsdp2": "FSDP2", "zero2": "ZeRO", "zero3": "ZeRO-3"}.get(engine)
        logs += [entry for entry in trainer.state.log_history if "loss" in entry]
        trained, values = weights(reg), reg.values() if engine != "zero3" else None
        torch.manual_seed(11)
        reg.end_task(task)
        if engine == "zero3" and task == "first" and world() > 1:
            model, reg = in_a_fresh_model(kind, reg, folder / "between")
    reg.save_pretrained(folder / "state")
    past = {name: held.parts[0].left @ held.parts[0].right for name, held in reg.state().layers.items()}
    return {
        "weights": trained, "fresh": weights(reg), "past": past, "values": values,
        "steps": [(entry["ella_penalty"], float(entry["grad_norm"])) for entry in logs],
    }  # fmt: skip


class Dies(TrainerCallback):
    """Rank 1 is killed after the third step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and rank() == 1:
            os._exit(9)


def resumable(folder, kind, engine, place, what):
    """Four steps in the second task with checkpoints after two and four: unbroken, killed in between, resumed."""
    forget_the_last_engine()
    if what == "resumed":
        model = adapted(kind)
        reg = regularized(model, 1.0)
    else:
        model, reg = with_past(kind, 1.0)
    config = {}
    if engine == "fsdp2-sharded":
        engine, config = "fsdp2", {"fsdp_config": {"state_dict_type": "SHARDED_STATE_DICT"}}
    # With a state to save, unlike plain gradient descent.
    options = {"optim": "adamw_torch", "learning_rate": 1e-2, "max_steps": 4}
    options |= {"save_strategy": "steps", "save_steps": 2, **(config if world() > 1 else {})}
    trainer = InOrder(model, arguments(place, kind, engine, 1, **options), train_dataset=rows(kind, 4))
    attach(trainer, reg)
    if what == "killed":
        trainer.add_callback(Dies())
    trainer.train(resume_from_checkpoint=f"{place}/checkpoint-2" if what == "resumed" else None)
    logged = [entry["ella_penalty"] for entry in trainer.state.log_history if "loss" in entry]
    past = {name: held.parts[0].left @ held.parts[0].right for name, held in reg.state().layers.items()}
    return {"weights": weights(reg), "past": past, "logged": logged, "tasks": reg.tasks}
