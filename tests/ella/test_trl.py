"""TRL's own trainers, task after task: in each the reference is the model before the task.

TRL adds to a model that is a PEFT model already a frozen adapter "ref", a copy of "default", and scores its reference
with that; where there is no "ref" it disables the adapters.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer.utils import use_adapter

from ella import EllaConfig, EllaRegularizer, attach
from tests.ella.models import randomise
from tests.processes import called

STEPS, ACCUMULATION, BATCH = 2, 2, 2
TASKS = ("first", "second", "third")
IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(7))
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
# "merged": finished tasks are in the base weights, beside which a copy of "default" must add nothing. "embeddings":
# PEFT names the factors of an embedding otherwise, and TRL's own copy leaves them out.
KINDS = ("llama", "moe", "merged")


def base_of(kind):
    torch.manual_seed(0)
    if kind == "moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **EXPERTS, router_aux_loss_coef=0.0))
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def lora_of(kind):
    targets = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind == "moe":
        names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        targets = {"target_modules": ["q_proj"], "target_parameters": names}
    elif kind == "embeddings":
        targets = {"target_modules": ["q_proj", "down_proj", "embed_tokens"]}
    return LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **targets)


def settings_of(kind):
    return EllaConfig(keep_past="merge" if kind == "merged" else "adapter")


def regularized(kind):
    return EllaRegularizer(get_peft_model(base_of(kind), lora_of(kind)), settings_of(kind))


def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 64)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def prefer_small_ids(completion_ids, **_):
    return [-sum(ids) / 64 / len(ids) for ids in completion_ids]


def example(method, i):
    prompt, good, bad = f"w{i} w5", f" w7 w{i + 20}", f" w9 w{i + 3} w4"
    if method == "dpo":
        return {"prompt": prompt, "chosen": good, "rejected": bad}
    if method == "kto":
        return {"prompt": prompt, "completion": good if i % 2 else bad, "label": bool(i % 2)}
    return {"text": prompt + good} if method == "sft" else {"prompt": prompt}


ROLLOUTS = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
METHODS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig, {"beta": 1.0}),
    "kto": (trl.KTOTrainer, trl.KTOConfig, {"beta": 1.0}),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig, ROLLOUTS),
    "rloo": (trl.RLOOTrainer, trl.RLOOConfig, ROLLOUTS),
    "sft": (trl.SFTTrainer, trl.SFTConfig, {}),
}


def trainer_of(method, model, folder, peft_config=None, **options):
    trainer, config, own = METHODS[method]
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 2e-2,
        "gradient_accumulation_steps": ACCUMULATION, "lr_scheduler_type": "constant", "report_to": "none",
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    rewards = {"reward_funcs": prefer_small_ids} if own is ROLLOUTS else {}
    return trainer(
        model=model,
        args=config(**settings | own | options),
        train_dataset=Dataset.from_list([example(method, i) for i in range(10, 26)]),
        processing_class=tokenizer(),
        peft_config=peft_config,
        **rewards,
    )


class Watch:
    """What a trainer computes: losses of micro-batches, and log-probabilities of each row by policy and reference."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.losses, self.scored = [], []
        trainer.model.register_forward_hook(self._note_forward, with_kwargs=True)
        self._compute_loss, trainer.compute_loss = trainer.compute_loss, self._note_loss

    def _note_loss(self, *args, **kwargs):
        loss = self._compute_loss(*args, **kwargs)
        self.losses.append((self.trainer.state.global_step, loss.item()))
        return loss

    def _note_forward(self, model, args, kwargs, output):
        if kwargs.get("fused_lm_head"):
            status = model.get_model_status()
            by_reference = status.enabled is False or status.active_adapters == ["ref"]
            for row, logps in zip(kwargs["input_ids"].tolist(), output.log_probs.detach().clone(), strict=True):
                self.scored.append((self.trainer.state.global_step, by_reference, tuple(row), logps))

    def losses_at(self, step):
        return [loss for at, loss in self.losses if at == step]

    def gap(self, step):
        """Relative distance of policy and reference over the rows of an optimizer step."""
        found = [entry[1:] for entry in self.scored if entry[0] == step]
        reference = {row: logps for by_reference, row, logps in found if by_reference}
        pairs = [(logps, reference[row]) for by_reference, row, logps in found if not by_reference]
        assert len(pairs) >= ACCUMULATION * BATCH
        return difference(*(torch.cat(side) for side in zip(*pairs, strict=True)))


def difference(a, b):
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def logits(model):
    was = model.training
    found = model.eval()(input_ids=IDS).logits
    model.train(was)
    return found


def factors(reg):
    return [p.detach().clone() for layer in reg.layers for p in layer.parameters()]


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if "loss" in entry]


def run_task(kind, trainer, reg):
    """Train and fold; policy and reference agree at the beginning, training moves the policy alone, a fold nothing."""
    model, base = reg.model, logits(base_of(kind))
    before, fresh, finished = logits(model), factors(reg), len(reg.tasks)
    attach(trainer, reg)
    watch = Watch(trainer)
    trainer.train()

    if not isinstance(trainer, trl.SFTTrainer):
        assert watch.gap(0) < 1e-6
        assert watch.gap(1) > 1e-4
    if isinstance(trainer, trl.DPOTrainer):
        assert watch.losses_at(0) == pytest.approx([math.log(2)] * ACCUMULATION, abs=1e-6)
    elif not isinstance(trainer, trl.SFTTrainer):
        assert logged(trainer, "kl")[0] == pytest.approx(0, abs=1e-6)
    for adapter in {"ref", None} & {None, *model.peft_config}:
        with use_adapter(model, adapter):
            reference = logits(model)
        assert difference(reference, before) < 1e-6
        # What the same bound would find if the finished tasks were missing.
        assert not finished or difference(reference, base) > 1e-2

    penalties = logged(trainer, "ella_penalty")
    assert penalties[0] == 0  # the update is zero before the first step
    assert (penalties[1] > 0) == (finished > 0)
    assert not any(torch.equal(a, b) for a, b in zip(factors(reg), fresh, strict=True))
    assert all(f".{reg.adapter}" in name for name, p in model.named_parameters() if p.requires_grad)
    trained = logits(model)
    assert difference(trained, before) > 1e-3

    reg.end_task(TASKS[finished])
    assert difference(logits(model), trained) < 1e-6
    assert set(model.peft_config) == {"default", "ella_task"}


@pytest.mark.parametrize("kind", [*KINDS, "embeddings"])
@pytest.mark.parametrize("method", METHODS)
def test_three_tasks_of_a_peft_model(method, kind, tmp_path):
    reg = regularized(kind)
    for _ in TASKS:
        run_task(kind, trainer_of(method, reg.model, tmp_path), reg)


@pytest.mark.parametrize("kind", ["llama", "moe"])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_trainer_makes_the_peft_model(method, kind, tmp_path):
    trainer = trainer_of(method, base_of(kind), tmp_path, lora_of(kind))
    reg = EllaRegularizer(trainer.model)
    run_task(kind, trainer, reg)
    for _ in TASKS[1:]:
        run_task(kind, trainer_of(method, reg.model, tmp_path), reg)


@pytest.mark.parametrize("kind", KINDS)
def test_without_the_adapter_ref(kind, tmp_path):
    """As TRL does it for expert parameters where PEFT is older than 0.20: the reference is adapters disabled."""
    reg = regularized(kind)
    for _ in TASKS:
        trainer = trainer_of("dpo", reg.model, tmp_path)
        reg.model.delete_adapter("ref")
        run_task(kind, trainer, reg)


@pytest.mark.parametrize("kind", KINDS)
def test_a_usual_pipeline(kind, tmp_path):
    """Another trainer in each task, which all patch the forward of the same base model."""
    reg = regularized(kind)
    for method in ("sft", "dpo", "grpo"):
        run_task(kind, trainer_of(method, reg.model, tmp_path), reg)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_is_scored_beforehand(kind, tmp_path):
    """The trainer scores its reference when it is made: before ``attach``, and into a cache that outlives it."""
    reg = regularized(kind)
    for task in TASKS:
        trainer = trainer_of("dpo", reg.model, tmp_path, precompute_ref_log_probs=True)
        attach(trainer, reg)
        watch = Watch(trainer)
        trainer.train()
        assert watch.losses_at(0) == pytest.approx([math.log(2)] * ACCUMULATION, abs=1e-6)
        assert any(abs(loss - math.log(2)) > 1e-3 for loss in watch.losses_at(1))
        reg.end_task(task)


@pytest.mark.parametrize("kind", ["llama", "moe"])
@pytest.mark.parametrize("method", ["dpo", "kto", "grpo", "rloo"])
def test_a_reference_without_the_past_is_noticed(method, kind, tmp_path):
    reg = regularized(kind)
    run_task(kind, trainer_of("sft", reg.model, tmp_path), reg)
    trainer = trainer_of(method, reg.model, tmp_path, max_steps=1)
    attach(trainer, reg)
    for name, parameter in reg.model.named_parameters():
        if ".ref." in name:
            parameter.data.zero_()
    watch = Watch(trainer)
    trainer.train()
    assert watch.gap(0) > 1e-4
    if method == "dpo":
        assert all(abs(loss - math.log(2)) > 1e-4 for loss in watch.losses_at(0))


# --- weights sent to vLLM --------------------------------------------------------------------------------------------


def sync_of(trainer, engine, mode):
    """TRL's vLLM backend of a trainer; the engine is a transformers model, which takes the weights by name."""
    parameters, sent = dict(engine.named_parameters()), set()

    def load_weights(weights):
        for name, weight in weights:
            parameters[name].data.copy_(weight)
            sent.add(name)

    def update_named_params(metadata, weights):
        load_weights(weights)
        assert {name: tuple(shape) for name, _, shape in metadata} == {n: p.shape for n, p in parameters.items()}

    made = VLLMGeneration.__new__(VLLMGeneration)  # its constructor starts vLLM
    made.model, made.mode, made.enable_sleep_mode, made._weight_metadata = trainer.model, mode, False, None
    made.accelerator, made._dist = trainer.accelerator, DistributedBackend(trainer.accelerator)
    worker = SimpleNamespace(model_runner=SimpleNamespace(model=SimpleNamespace(load_weights=load_weights)))
    executor = SimpleNamespace(driver_worker=worker)
    engine = SimpleNamespace(model_executor=executor)
    made.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    made.vllm_client = SimpleNamespace(update_named_params=update_named_params, reset_prefix_cache=lambda: None)
    return made, sent


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_gets_the_live_model(kind, mode, tmp_path):
    reg, engine = regularized(kind), base_of(kind)
    model, base = reg.model, logits(engine)
    for number, task in enumerate(TASKS):
        sync, sent = sync_of(trainer_of("grpo", model, tmp_path), engine, mode)
        randomise(model, number)
        want, state = logits(model), {name: value.clone() for name, value in model.state_dict().items()}
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in engine.parameters():
                parameter.fill_(math.nan)
        sync.sync_weights()

        assert sent == {name for name, _ in engine.named_parameters()}
        assert difference(logits(engine), want) < 1e-5
        with model.disable_adapter():
            previous = logits(model)
        assert difference(previous, want) > 1e-2
        assert number == 0 or difference(previous, base) > 1e-2

        assert difference(logits(model), want) < 1e-6
        assert model.active_adapters == [reg.adapter]
        assert trained == {name for name, p in model.named_parameters() if p.requires_grad}
        for name, value in model.state_dict().items():
            assert torch.equal(value, state[name]) if "lora_" in name else difference(value, state[name]) < 1e-6, name
        reg.end_task(task)
        assert difference(logits(model), want) < 1e-6


# --- resuming --------------------------------------------------------------------------------------------------------


def train_on(reg, folder, resume_from_checkpoint=None):
    """Four steps of DPO; all weights and the logged losses by step."""
    trainer = trainer_of("dpo", reg.model, folder, max_steps=4, save_strategy="steps", save_steps=2)
    attach(trainer, reg)
    trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    state = {name: value.detach().clone() for name, value in reg.model.state_dict().items()}
    return state, {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def resume_all(folder):
    """In a process that knows nothing: the second task of each kind of model, from the middle."""
    for kind in KINDS:
        reg = regularized(kind)
        found = train_on(reg, Path(folder, kind, "again"), str(Path(folder, kind, "second", "checkpoint-2")))
        assert reg.tasks == ["first"]
        torch.save(found, Path(folder, f"{kind}.pt"))


def test_dpo_resumes_in_a_fresh_process(tmp_path):
    wanted = {}
    for kind in KINDS:
        reg = regularized(kind)
        trainer = trainer_of("dpo", reg.model, tmp_path / kind / "first")
        attach(trainer, reg)
        trainer.train()
        reg.end_task("first")
        wanted[kind] = train_on(reg, tmp_path / kind / "second")
    called(tmp_path / "log", resume_all, tmp_path)
    for kind, (want, losses) in wanted.items():
        found, again = torch.load(tmp_path / f"{kind}.pt")
        assert found.keys() == want.keys()
        for name, value in want.items():
            assert difference(found[name], value) < 1e-6, (kind, name)
        # Steps 3 and 4 are its own; their losses are measured from the reference.
        assert again == pytest.approx(losses, rel=1e-6)
        assert all(abs(loss - math.log(2)) > 1e-3 for loss in list(again.values())[2:])
