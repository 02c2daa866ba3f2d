"""keep_past="merge": weights are always the base plus the whole past; and "external": the forward is the caller's."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from ella import EllaConfig, EllaRegularizer
from ella.acting import TASK
from tests.ella.models import add_deltas, deltas, ids, llama, logits, lora, randomise, tiny, train_rest
from tests.kernels.cases import relative_error

MERGE, EXTERNAL = EllaConfig(keep_past="merge"), EllaConfig(keep_past="external")
MERGEABLE = {"targets": ["up", "down", "tokens", "image", "point"]}
# What rounding to each dtype leaves of a layer's output.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def finished(dtype=torch.float32, tasks=2, config=MERGE, **options):
    model = get_peft_model(llama(**options).to(dtype), lora())
    reg = EllaRegularizer(model, config)
    for task in range(tasks):
        small(model, task)
        reg.end_task(f"task {task}")
    return model, reg


def small(model, seed):
    """An update of the size that training leaves."""
    gen = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_" in name and p.requires_grad:
            p.data.copy_(0.05 * torch.randn(p.shape, generator=gen))


def base_weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


@pytest.mark.parametrize("options", [MERGEABLE, {"targets": ["up", "point"], "lora_bias": True}], ids=["all", "bias"])
def test_merging_keeps_the_output_and_the_penalty(options):
    model = tiny(**options)
    reg = EllaRegularizer(model, MERGE)
    total = {}
    for task in range(2):
        randomise(model, task)
        total = add_deltas(total, deltas(reg))
        before = model(ids()).detach()
        report = reg.end_task(f"task {task}")
        assert relative_error(model(ids()).detach(), before) < 1e-6
        assert report.merge_error.keys() == total.keys() and 0 < report.max_merge_error < 1e-7
    with model.disable_adapter():
        assert relative_error(model(ids()).detach(), before) < 1e-6
    model.set_adapter("default")
    assert relative_error(model(ids()).detach(), before) < 1e-6, "the base holds it already"
    model.set_adapter(TASK)
    randomise(model, 5)
    new = deltas(reg)
    for name, value in reg.values().items():
        assert abs(value / (new[name][0] * total[name][0]).square().sum() - 1) < 1e-5


@pytest.mark.parametrize("dtype", ROUNDING)
def test_weights_are_always_made_from_the_total(dtype):
    """Five folds round once, not five times; the loss is reported as it is."""
    before = base_weights(get_peft_model(llama().to(dtype), lora()))
    model, reg = finished(dtype, tasks=4)
    small(model, 7)
    output = logits(model)
    report = reg.end_task("last")
    assert relative_error(logits(model), output) < ROUNDING[dtype]
    for layer in reg.layers:
        exact = before[f"base_model.model.{layer.name}.base_layer.weight"].double()
        exact = exact + layer.module.get_delta_weight("default").double()
        weight = layer.module.base_layer.weight
        assert torch.equal(weight, exact.to(dtype))
        assert report.merge_error[layer.name] == pytest.approx(relative_error(weight, exact), rel=1e-6)


def test_a_step_costs_what_plain_lora_costs():
    """The trained adapter has no variant and no hook: PEFT's own forward runs."""
    model, _ = finished()
    for module in model.modules():
        assert TASK not in getattr(module, "lora_variant", {}) and not module._forward_hooks


@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_ways_out_of_a_merged_model(tmp_path, dtype):
    model, _ = finished(dtype)
    done = logits(model)
    # On the original base the saved adapter is all that was learned.
    model.save_pretrained(tmp_path)
    assert relative_error(logits(PeftModel.from_pretrained(llama().to(dtype), tmp_path)), done) < ROUNDING[dtype]
    small(model, 9)
    live = logits(model)
    model.merge_adapter()
    assert relative_error(logits(model), live) < ROUNDING[dtype]
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    assert relative_error(logits(model), live) > ROUNDING[dtype], "merged alone: the model before the task"
    assert relative_error(logits(model), done) < ROUNDING[dtype]
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert relative_error(logits(plain), live) < ROUNDING[dtype]


@pytest.mark.parametrize("dtype", ROUNDING)
def test_a_merged_state_knows_its_base(tmp_path, dtype):
    original = base_weights(get_peft_model(llama().to(dtype), lora()))
    model, reg = finished(dtype)
    want = logits(model)
    reg.save_pretrained(tmp_path)

    def restored(base):
        fresh = get_peft_model(llama().to(dtype), lora())
        for name, p in fresh.named_parameters():
            if name in base:
                p.data.copy_(base[name])
        return fresh

    for base in (base_weights(model), original):
        fresh = restored(base)
        again = EllaRegularizer.from_pretrained(fresh, tmp_path)
        assert torch.equal(logits(fresh), want) and again.tasks == reg.tasks
        small(fresh, 11)
        live = logits(fresh)
        assert again.end_task("next").max_merge_error < ROUNDING[dtype]
        assert relative_error(logits(fresh), live) < ROUNDING[dtype]
    with pytest.raises(ValueError, match=r"merged into other base weights than this model's: \['model\.layers\.0"):
        EllaRegularizer.from_pretrained(restored({n: p + 1 for n, p in original.items()}), tmp_path)
    with pytest.raises(ValueError, match="the base already holds the past"):
        EllaRegularizer.from_pretrained(restored(base_weights(model)), tmp_path, EllaConfig())
    beside = restored(original)
    EllaRegularizer.from_pretrained(beside, tmp_path, EllaConfig())
    assert relative_error(logits(beside), want) < ROUNDING[dtype]


def test_a_merged_adapter_that_peft_loaded_needs_its_state(tmp_path):
    model, _ = finished()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    for config in (EllaConfig(), MERGE):
        with pytest.raises(ValueError, match="but not which base weights it belongs to: load it with"):
            EllaRegularizer(loaded, config)


def test_what_cannot_take_an_update_is_named():
    for targets, kind in ((["attention"], "attention"), (["up"], "experts")):
        options = {"target_parameters": ["experts.up"]} if kind == "experts" else {}
        with pytest.raises(ValueError, match=f"keep_past='merge' does not support {kind} layers, found {kind}"):
            EllaRegularizer(tiny(targets=targets, **options), MERGE)
    tied = lora(target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"shared weight: that of model\.embed_tokens is also another module's"):
        EllaRegularizer(get_peft_model(llama(tie_word_embeddings=True), tied), MERGE)
    replicated = lora(layer_replication=[[0, 2], [1, 2]])
    with pytest.raises(ValueError, match=r"shared weight: that of model\.layers\.1\.self_attn\.q_proj"):
        EllaRegularizer(get_peft_model(llama(), replicated), MERGE)
    model = get_peft_model(llama().double(), lora())
    with pytest.raises(ValueError, match=r"needs float32, bfloat16 or float16 base weights.*a Parameter of torch"):
        EllaRegularizer(model, MERGE)
    model, reg = finished(torch.float16, tasks=0)
    small(model, 1)
    reg.layers[1].parameters()[1].data.fill_(1e6)
    with pytest.raises(ValueError, match=r"v_proj: base and past together do not fit torch\.float16"):
        reg.end_task("too large")
    assert reg.tasks == [] and list(model.peft_config) == ["default"]


# --- external --------------------------------------------------------------------------------------------------------


def test_external_leaves_the_forward_alone_and_gives_the_penalty(tmp_path):
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    reg = EllaRegularizer(model, EXTERNAL)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    total = {}
    for task in range(2):
        randomise(model, task)
        train_rest(model, task)
        total = add_deltas(total, deltas(reg))
        with_task, base = logits(model), base_weights(model)
        reg.end_task(f"task {task}")
        # Another tool's merge: the caller's forward has the task.
        for layer in reg.layers:
            layer.module.base_layer.weight.data += deltas_of(total, layer) - merged_so_far(layer, base, total)
        assert relative_error(logits(model), with_task) < 1e-6
        assert list(model.peft_config) == ["default"] and reg.adapter == "default"
    assert {n: p for n, p in model.named_parameters() if p.requires_grad} == parameters
    randomise(model, 9)
    new = deltas(reg)
    for name, value in reg.values().items():
        assert abs(value / (new[name][0] * total[name][0]).square().sum() - 1) < 1e-5

    model.save_pretrained(tmp_path)
    again = get_peft_model(llama(), lora(modules_to_save=["lm_head"]))
    loaded = EllaRegularizer.from_pretrained(again, tmp_path)
    randomise(again, 9)
    assert loaded.values() == reg.values() and loaded.tasks == reg.tasks
    assert list(again.peft_config) == ["default"]


@pytest.mark.parametrize("options", [{}, {"rank_pattern": {"q_proj": 3}}], ids=["one rank", "ranks"])
def test_an_external_past_is_not_left_behind(tmp_path, options):
    """PEFT loads the adapter without what lies beside it: a new regularizer would begin anew, and save that."""
    model = get_peft_model(llama(), lora(**options))
    reg = EllaRegularizer(model, EXTERNAL)
    for task in range(2):
        randomise(model, task)
        reg.end_task(f"task {task}")
    randomise(model, 9)
    model.save_pretrained(tmp_path / "one")
    held = model.peft_config["default"].rank_pattern
    for folder in ("one", "two"):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / folder, is_trainable=True)
        assert relative_error(logits(loaded), logits(model)) < 1e-6
        for config in (EXTERNAL, None):
            with pytest.raises(ValueError, match=r"\['task 0', 'task 1'\] .*EllaRegularizer\.from_pretrained\(model"):
                EllaRegularizer(loaded, config)
        again = EllaRegularizer.from_pretrained(loaded, tmp_path / folder)
        assert again.tasks == reg.tasks and again.values() == reg.values()
        assert list(loaded.peft_config) == ["default"] and loaded.peft_config["default"].rank_pattern == held
        loaded.save_pretrained(tmp_path / "two")
    again.end_task("task 2")
    loaded.save_pretrained(tmp_path / "two")
    assert EllaRegularizer.from_pretrained(get_peft_model(llama(), lora(**options)), tmp_path / "two").tasks == [
        "task 0", "task 1", "task 2",
    ]  # fmt: skip


def deltas_of(total, layer):
    return total[layer.name][0].float()


def merged_so_far(layer, base, total):
    """What of the total is in the base already."""
    original = llama().get_submodule(layer.name).weight
    return base[f"base_model.model.{layer.name}.base_layer.weight"] - original


def test_external_exports_the_past_for_whatever_merges(tmp_path):
    model, reg = finished(config=EXTERNAL)
    assert torch.equal(logits(model), logits(llama()))
    beside, _ = finished(config=EllaConfig())
    reg.export_adapter(tmp_path / "all")
    assert relative_error(logits(PeftModel.from_pretrained(llama(), tmp_path / "all")), logits(beside)) < 1e-6
