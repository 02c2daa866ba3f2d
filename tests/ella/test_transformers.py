"""Real transformers architectures from small configurations: grouped attention, mixture of experts, GPT-2, T5."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM, T5Config
from transformers import T5ForConditionalGeneration as T5Model

from ella import EllaConfig, EllaRegularizer
from tests.ella.models import add_deltas, deltas, randomise
from tests.kernels.cases import relative_error


def qwen_moe(**options):
    settings = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8, num_attention_heads=4,
        num_key_value_heads=2, **settings | options,
    )  # fmt: skip
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]  # two parameters of one module: nested wrappers
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], target_parameters=experts)
    return Qwen3MoeForCausalLM(config), lora, {"input_ids": _ids(64)}


def gpt2():
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    return GPT2LMHeadModel(config), lora, {"input_ids": _ids(64)}


def t5():
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["q", "v", "wo"])
    return T5Model(config), lora, {"input_ids": _ids(64), "labels": _ids(64)}


def _ids(vocabulary):
    return torch.randint(1, vocabulary, (2, 9), generator=torch.Generator().manual_seed(0))


def check_values(reg, total):
    """Every layer's ``P`` against dense matrices in float64."""
    new = deltas(reg)
    for name, value in reg.values().items():
        want = sum((d * w).square().sum() for d, w in zip(new[name], total[name], strict=True))
        assert abs(value / want - 1) < 1e-5


@pytest.mark.parametrize("build", [qwen_moe, gpt2, t5], ids=["Qwen3-MoE", "GPT-2", "T5"])
def test_fold_penalty_and_training_step(build):
    torch.manual_seed(0)
    base, lora, batch = build()
    model = get_peft_model(base, lora).eval()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1e-2))
    total = {}
    for task in range(2):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        before = model(**batch).logits.detach()
        reg.end_task(f"task {task}")
        assert relative_error(model(**batch).logits.detach(), before) < 1e-6
    randomise(model, 9)
    check_values(reg, total)
    labels = {"labels": batch["input_ids"]} | batch
    (model(**labels).loss + reg.penalty()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert not any(p.grad is not None for name, p in model.named_parameters() if ".default" in name)


def test_experts_whose_ranks_reach_their_caps_at_different_tasks(tmp_path):
    """down_proj is narrower than gate_up_proj: each parameter's rank is saved under its own name."""
    base, lora, batch = qwen_moe(moe_intermediate_size=4)
    lora.r = 3
    state = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, lora).eval()
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
    total = {}
    for task in range(3):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        before = model(**batch).logits.detach()
        reg.end_task(f"task {task}")
        assert relative_error(model(**batch).logits.detach(), before) < 1e-6
        model.save_pretrained(tmp_path / str(task))
        plain, _, _ = qwen_moe(moe_intermediate_size=4)
        plain.load_state_dict(state)
        loaded = PeftModel.from_pretrained(plain, tmp_path / str(task), is_trainable=True).eval()
        assert relative_error(loaded(**batch).logits.detach(), before) < 1e-6
        again = EllaRegularizer(loaded, reg.config)
        randomise(loaded, 9)
        check_values(again, total)
