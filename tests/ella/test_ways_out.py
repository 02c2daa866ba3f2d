"""Whatever PEFT does with a model after some tasks, nothing learned is lost: the right output, or an error."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora.layer import LoraVariant
from torch import nn
from transformers import LlamaForCausalLM

from ella import EllaConfig, EllaRegularizer
from ella.acting import TASK, TogetherVariant
from ella.knowledge import Marker
from tests.ella.models import (
    EXPERTS,
    TARGETS,
    TOKENS,
    Tiny,
    bert,
    deltas,
    ids,
    llama,
    logits,
    lora,
    randomise,
    tiny,
    train_rest,
)  # fmt: skip
from tests.kernels.cases import relative_error

KINDS = {
    "all": {},
    "experts": EXPERTS,
    "lora_bias": {"targets": ["up", "point"], "lora_bias": True},
    "patterns": {"rank_pattern": {"up": 6, "image": 2}, "alpha_pattern": {"up": 3}, "use_rslora": True},
}


def after(tasks=2, base=llama, config=None, lora_config=None, **options):
    """A model with finished ``tasks``, its trained adapter fresh."""
    model = get_peft_model(base(**options), lora_config or lora())
    reg = EllaRegularizer(model, config)
    for task in range(tasks):
        randomise(model, task)
        train_rest(model, task)
        reg.end_task(f"task {task}")
    return model, reg


def within_task(**options):
    """The same in the middle of the next task: what the finished tasks gave, and what the model gives now."""
    model, reg = after(**options)
    previous = logits(model)
    randomise(model, 9)
    train_rest(model, 9)
    assert relative_error(logits(model), previous) > 1e-2
    return model, reg, previous, logits(model)


def tiny_within_task(kind):
    model = tiny(**KINDS[kind])
    reg = EllaRegularizer(model)
    for task in range(2):
        randomise(model, task)
        reg.end_task(f"task {task}")
    previous = model(ids()).detach()
    randomise(model, 9)
    assert relative_error(model(ids()).detach(), previous) > 1e-2
    return model, reg, previous


def tiny_base():
    torch.manual_seed(0)
    return Tiny()


# --- live ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_previous_model_is_a_switch_away(kind):
    model, _, previous = tiny_within_task(kind)
    live = model(ids()).detach()
    with model.disable_adapter():
        assert relative_error(model(ids()).detach(), previous) < 1e-6
    assert relative_error(model(ids()).detach(), live) < 1e-6
    model.set_adapter("default")
    assert relative_error(model(ids()).detach(), previous) < 1e-6
    assert not any(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    model.set_adapter(TASK)
    assert relative_error(model(ids()).detach(), live) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_another_adapter_switched_off_is_the_base(kind):
    model, _, previous = tiny_within_task(kind)
    model.add_adapter("other", copy.deepcopy(model.peft_config[TASK]))
    model.set_adapter("other")
    randomise(model, 12, "other")
    assert relative_error(model(ids()).detach(), previous) > 1e-2
    with model.disable_adapter():
        assert relative_error(model(ids()).detach(), tiny_base().eval()(ids()).detach()) < 1e-6
    model.set_adapter(TASK)
    with model.disable_adapter():
        assert relative_error(model(ids()).detach(), previous) < 1e-6


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_merging_and_unmerging_is_as_live(kind, safe):
    model, _, previous = tiny_within_task(kind)
    live = model(ids()).detach()
    for adapters in (None, ["default", TASK], [TASK, "default"]):
        model.merge_adapter(adapters, safe_merge=safe)
        assert relative_error(model(ids()).detach(), live) < 1e-5
        model.unmerge_adapter()
        assert relative_error(model(ids()).detach(), live) < 1e-5
    model.merge_adapter(["default"])
    assert relative_error(model(ids()).detach(), previous) < 1e-5
    model.unmerge_adapter()
    assert relative_error(model.merge_and_unload(safe_merge=safe)(ids()).detach(), live) < 1e-5


def test_merged_weights_saved_and_loaded_are_as_live(tmp_path):
    model, _, _, live = within_task()
    model.merge_and_unload().save_pretrained(tmp_path)
    assert relative_error(logits(LlamaForCausalLM.from_pretrained(tmp_path)), live) < 1e-6
    assert relative_error(logits(llama()), live) > 1e-2


def test_both_adapters_active_count_the_knowledge_once_and_leave_it_frozen():
    model, _, _, live = within_task()
    model.base_model.set_adapter(["default", TASK])
    assert relative_error(logits(model), live) < 1e-6
    assert all(TASK in n for n, p in model.named_parameters() if p.requires_grad)
    combined = copy.deepcopy(model)
    combined.add_weighted_adapter(["default", TASK], [1.0, 1.0], "all", combination_type="cat")
    combined.set_adapter("all")
    assert relative_error(logits(combined), live) < 1e-6


def test_a_mixed_batch_names_its_adapters():
    model, _, previous, live = within_task()
    with torch.no_grad():
        found = model.eval()(input_ids=TOKENS, adapter_names=[TASK, "default"]).logits
    assert relative_error(found[0], live[0]) < 1e-6 and relative_error(found[1], previous[1]) < 1e-6


def test_an_unrelated_adapter_is_untouched_and_not_folded():
    model = get_peft_model(llama(), lora())
    model.add_adapter("style", lora())
    randomise(model, 3, "style")
    model.set_adapter("style")
    style = logits(model)
    model.set_adapter("default")
    reg = EllaRegularizer(model)
    randomise(model, 1)
    reg.end_task("one")
    model.set_adapter("style")
    assert torch.equal(logits(model), style)
    for call in (reg.penalty, reg.add_gradient_, lambda: reg.end_task("two")):
        with pytest.raises(
            ValueError, match=r"'ella_task' is not active \(\['style'\] is\).*set_adapter\('ella_task'\)"
        ):
            call()
    assert reg.tasks == ["one"]


def test_copies_are_models_of_their_own():
    model, reg, previous, live = within_task()
    twin = copy.deepcopy(model)
    pickled = pickle.loads(pickle.dumps(model))
    randomise(model, 5, "default")
    for copied in (twin, pickled):
        assert torch.equal(logits(copied), live) and not torch.equal(logits(model), live)
        with copied.disable_adapter():
            assert relative_error(logits(copied), previous) < 1e-6
        own = EllaRegularizer(copied, reg.config)
        assert own.tasks == reg.tasks and own.values() != reg.values()
        own.end_task("more")
        assert own.tasks == ["task 0", "task 1", "more"] and reg.tasks == ["task 0", "task 1"]


def test_a_second_regularizer_shares_the_past():
    model, reg, _, _ = within_task()
    second = EllaRegularizer(model, EllaConfig(ella_lambda=3.0))
    assert second.values() == reg.values() and second.tasks == reg.tasks
    reg.end_task("next")
    randomise(model, 11)
    assert second.values() == reg.values() and second.tasks == ["task 0", "task 1", "next"]
    second.end_task("last")
    assert reg.tasks[-1] == "last" and set(reg.values().values()) == {0.0}
    with pytest.raises(ValueError, match=r"keeps its past with keep_past='adapter', the config says 'merge'"):
        EllaRegularizer(model, EllaConfig(keep_past="merge"))


def test_two_regularizers_from_the_first_task_on():
    model = get_peft_model(llama(), lora())
    first, second = EllaRegularizer(model), EllaRegularizer(model)
    randomise(model, 0)
    first.end_task("one")
    randomise(model, 1)
    assert second.values() == first.values() and second.tasks == ["one"] and second.adapter == TASK


# --- out of PEFT -----------------------------------------------------------------------------------------------------


def hooks(model):
    return [hook for module in model.modules() for hook in module._forward_hooks.values()]


def ella_in(model):
    """Whatever of this package hangs in a model."""
    found = [type(module).__module__ for module in model.modules()] + [type(hook).__module__ for hook in hooks(model)]
    found += [type(v).__module__ for m in model.modules() for v in getattr(m, "lora_variant", {}).values()]
    found += [m.ella_knowledge for m in model.modules() if "ella_knowledge" in m.__dict__]
    return [name for name in found if name.startswith("ella") or name == "default"]


@pytest.mark.parametrize("kind", KINDS)
def test_unloading_leaves_nothing(kind):
    model, reg, _ = tiny_within_task(kind)
    plain = model.unload()
    assert relative_error(plain(ids()).detach(), tiny_base()(ids()).detach()) < 1e-6 and ella_in(plain) == []
    for call in (reg.penalty, reg.add_gradient_, reg.values, reg.state, lambda: reg.end_task("x")):
        with pytest.raises(
            ValueError, match=r"lost its model, and with it its past of the tasks \['task 0', 'task 1'\]"
        ):
            call()


def test_merge_and_unload_is_noticed_in_the_first_task_too():
    model = get_peft_model(llama(), lora())
    reg = EllaRegularizer(model)
    model.merge_and_unload()
    with pytest.raises(
        ValueError, match=r"lost its model, and with it its penalty: the LoRA layer .*q_proj is no longer"
    ):
        reg.penalty()


@pytest.mark.parametrize("kind", KINDS)
def test_deleting_the_trained_adapter_leaves_the_finished_tasks(kind):
    model, reg, previous = tiny_within_task(kind)
    model.delete_adapter(TASK)
    assert relative_error(model(ids()).detach(), previous) < 1e-6
    with model.disable_adapter():
        assert relative_error(model(ids()).detach(), tiny_base()(ids()).detach()) < 1e-6
    with pytest.raises(ValueError, match="adapter 'ella_task' was deleted"):
        reg.penalty()
    assert ella_in(model) == []
    model.set_adapter("default")
    assert any(p.requires_grad for n, p in model.named_parameters() if ".default" in n), "nobody's frozen past any more"


def test_deleting_the_knowledge_is_noticed():
    model, reg, _, _ = within_task()
    model.delete_adapter("default")
    with pytest.raises(ValueError, match="adapter 'default', which holds them, was deleted"):
        reg.add_gradient_()
    assert ella_in(model) == []


# --- on disk ---------------------------------------------------------------------------------------------------------

ALONE = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from tests.ella.models import Tiny, bert, ids, llama, logits
found = {}
for name in ("done", "within"):
    found[name] = logits(PeftModel.from_pretrained(llama(), sys.argv[1] + "/" + name))
    found[name + " auto"] = logits(AutoPeftModelForCausalLM.from_pretrained(sys.argv[1] + "/auto-" + name))
    native = llama()
    native.load_adapter(sys.argv[1] + "/" + name)
    found[name + " native"] = logits(native)
    found[name + " bert"] = logits(PeftModel.from_pretrained(bert(), sys.argv[1] + "/bert-" + name))
    for kind in sys.argv[2:]:
        torch.manual_seed(0)
        found[f"{name} {kind}"] = PeftModel.from_pretrained(Tiny(), f"{sys.argv[1]}/{kind}-{name}")(ids()).detach()
assert not any(name.partition(".")[0] in ("ella", "ella_kernels") for name in sys.modules), "this process knows ella"
torch.save(found, sys.argv[1] + "/found.pt")
"""


def test_peft_alone_in_a_new_process_sees_every_finished_task(tmp_path):
    want = {}
    llama().save_pretrained(tmp_path / "base")
    model, _ = after(lora_config=lora(task_type="CAUSAL_LM"))
    classifier, _ = after(base=bert, lora_config=LoraConfig(task_type=TaskType.SEQ_CLS, r=4, target_modules=["query"]))
    kinds = {kind: tiny_within_task(kind)[::2] for kind in KINDS}
    for name in ("done", "within"):
        for kind, (own, previous) in kinds.items():
            if name == "done":
                for layer in EllaRegularizer(own).layers:
                    layer.reset(True)
            else:
                randomise(own, 9)
            own.save_pretrained(tmp_path / f"{kind}-{name}")
            want[f"{name} {kind}"] = previous
        if name == "done":
            want |= {
                f"{which}{form}": logits(model) for which in ("done", "within") for form in ("", " auto", " native")
            }
            want |= {f"{which} bert": logits(classifier) for which in ("done", "within")}
        else:
            for own in (model, classifier):
                randomise(own, 9)
                train_rest(own, 9)
        model.save_pretrained(tmp_path / name)
        classifier.save_pretrained(tmp_path / f"bert-{name}")
        model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        model.save_pretrained(tmp_path / f"auto-{name}")
        model.peft_config["default"].base_model_name_or_path = None
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", ALONE, str(tmp_path), *KINDS], check=True, env=environment)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == want.keys()
    for name, output in found.items():
        assert relative_error(output, want[name]) < 1e-6, name
    assert relative_error(found["done"], logits(llama())) > 1e-2
    assert (tmp_path / "within" / TASK / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("past_rank", [128, 6])
@pytest.mark.parametrize("when", ["done", "within"])
def test_the_folder_that_peft_saved_goes_on(tmp_path, when, past_rank):
    model, reg = after(tasks=3, config=EllaConfig(ella_lambda=3.0, past_rank=past_rank))
    if when == "within":
        randomise(model, 9)
    live = logits(model)
    model.save_pretrained(tmp_path)

    by_peft = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    both = PeftModel.from_pretrained(llama(), tmp_path, is_trainable=True)
    both.load_adapter(tmp_path / TASK, TASK, is_trainable=True)
    fresh = get_peft_model(llama(), lora())
    for loaded in (by_peft, both, fresh):
        again = EllaRegularizer.from_pretrained(loaded, tmp_path)
        assert again.tasks == reg.tasks and again.config == reg.config and again.adapter == TASK
        if loaded is not fresh:
            assert relative_error(logits(loaded), live) < 1e-6
        randomise(loaded, 11)
        loaded_values = again.values()
        twin = copy.deepcopy(model)
        randomise(twin, 11)
        assert loaded_values == EllaRegularizer(twin, reg.config).values()
        assert relative_error(logits(loaded), logits(twin)) < 1e-6
        assert again.end_task("next").ranks == EllaRegularizer(twin, reg.config).end_task("next").ranks


def test_a_knowledge_adapter_without_its_state_is_taken_up_whole_or_refused(tmp_path):
    for past_rank, kind in ((128, "exact"), (6, "cut")):
        model, reg = after(tasks=3, config=EllaConfig(past_rank=past_rank))
        model.save_pretrained(tmp_path / kind)
        (tmp_path / kind / "ella_past.safetensors").unlink()
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "cut", is_trainable=True)
    with pytest.raises(ValueError, match=r"holds the finished tasks \['task 0', .*but not what truncation dropped"):
        EllaRegularizer(loaded)
    for trainable in (True, False):
        loaded = PeftModel.from_pretrained(llama(), tmp_path / "exact", is_trainable=trainable)
        want = logits(loaded)
        again = EllaRegularizer(loaded)
        assert again.tasks == reg.tasks and torch.equal(logits(loaded), want)
        assert loaded.peft_config[TASK].r == 4 and loaded.peft_config[TASK].lora_alpha == 8
        trained = [n for n, p in loaded.named_parameters() if p.requires_grad]
        assert trained and all(TASK in n for n in trained)


def test_special_layers_go_on_from_peft(tmp_path):
    """What PEFT's own loading ties, replicates or copies must be so in the trained adapter that is added."""
    for name, options, config in (
        (
            "tied",
            {"tie_word_embeddings": True},
            {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
        ),
        ("replicated", {}, {"layer_replication": [[0, 2], [1, 2]]}),
        ("head", {}, {"modules_to_save": ["lm_head"]}),
        (
            "tied modules",
            {"tie_word_embeddings": True},
            {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        ),
    ):
        model, reg, previous, _ = within_task(lora_config=lora(**config), **options)
        with model.disable_adapter():
            assert relative_error(logits(model), previous) < 1e-6, name
        model.save_pretrained(tmp_path / name)
        loaded = PeftModel.from_pretrained(llama(**options), tmp_path / name, is_trainable=True)
        assert relative_error(logits(loaded), previous) < 1e-6, name
        again = EllaRegularizer(loaded, reg.config)
        assert relative_error(logits(loaded), previous) < 1e-6, name
        assert [(layer.name, layer.tied_to) for layer in again.layers] == [
            (layer.name, layer.tied_to) for layer in reg.layers
        ], name
        for own in (model, loaded):
            randomise(own, 21)
            for n, p in own.named_parameters():
                if "modules_to_save" in n and TASK in n:
                    p.data.fill_(0.01)
        assert relative_error(logits(loaded), logits(model)) < 1e-6, name
        assert again.values() == reg.values(), name


def test_another_adapter_name(tmp_path):
    model = get_peft_model(llama(), lora(), adapter_name="mine")
    config = EllaConfig(adapter_name="mine")
    reg = EllaRegularizer(model, config)
    randomise(model, 1, "mine")
    reg.end_task("one")
    want = logits(model)
    model.save_pretrained(tmp_path)
    assert relative_error(logits(PeftModel.from_pretrained(llama(), tmp_path / "mine")), want) < 1e-6
    fresh = get_peft_model(llama(), lora(), adapter_name="mine")
    assert EllaRegularizer.from_pretrained(fresh, tmp_path, config).tasks == ["one"]
    assert relative_error(logits(fresh), want) < 1e-6


def test_pickled_adapters_are_refused(tmp_path):
    model, _ = after()
    with pytest.raises(ValueError, match="safe_serialization=True"):
        model.save_pretrained(tmp_path, safe_serialization=False)


def test_the_form_of_version_0_1_loads():
    """The past in an adapter ella_past beside the trained one, as PEFT loaded both."""
    model = get_peft_model(llama(), lora())
    model.add_adapter("ella_past", lora(r=6, lora_alpha=6))
    randomise(model, 1, "ella_past")
    randomise(model, 2, "default")
    model.base_model.set_adapter(["default", "ella_past"])
    live = logits(model)
    model.set_adapter("ella_past")
    previous = logits(model)
    model.set_adapter("default")
    reg = EllaRegularizer(model)
    assert sorted(model.peft_config) == ["default", TASK] and reg.adapter == TASK
    assert relative_error(logits(model), live) < 1e-6 and sum(reg.values().values()) > 0
    with model.disable_adapter():
        assert relative_error(logits(model), previous) < 1e-6


def test_the_marker_survives_peft(tmp_path):
    model, reg = after(tasks=1)
    reg.end_task("ein (zweiter), [dritter] \N{SNOWMAN}")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path)
    marker = Marker.of(loaded.peft_config["default"])
    assert marker.tasks == tuple(reg.tasks) and marker.exact and marker.trained["r"] == 4
    assert Marker.of(lora()) is None and Marker.of(lora(rank_pattern={"q_proj": 3})) is None


# --- refused at construction -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, base, match",
    [
        ({"bias": "all"}, {}, "bias='all' trains biases of the base model"),
        ({"bias": "lora_only"}, {"attention_bias": True}, "bias='lora_only' trains biases"),
        (
            {"trainable_token_indices": {"embed_tokens": [3, 4]}},
            {},
            "trainable_token_indices: trained token embeddings",
        ),
    ],
    ids=["bias all", "bias lora_only", "trainable tokens"],
)
def test_what_no_factor_holds_is_refused(options, base, match):
    with pytest.raises(ValueError, match=match):
        EllaRegularizer(get_peft_model(llama(**base), lora(**options)))


def test_adalora_is_refused_by_name():
    model = get_peft_model(llama(), AdaLoraConfig(r=4, target_modules=["q_proj"], total_step=9))
    with pytest.raises(ValueError, match="q_proj: ADALORA is not plain LoRA"):
        EllaRegularizer(model)


def test_a_field_that_peft_may_add_is_refused_when_set():
    model = get_peft_model(llama(), lora())
    EllaRegularizer(model)

    later = dataclasses.make_dataclass(
        "Later", [("use_wonder", bool, dataclasses.field(default=False))], bases=(LoraConfig,)
    )
    for value in (False, True):
        model.peft_config["default"] = later(use_wonder=value, target_modules=["q_proj", "v_proj"])
        if value:
            with pytest.raises(ValueError, match="use_wonder=True is a LoraConfig field this version does not know"):
                EllaRegularizer(model)
        else:
            EllaRegularizer(model)


def test_a_frozen_adapter_is_refused(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter 'default' is frozen: nothing would be trained.*is_trainable=True"):
        EllaRegularizer(PeftModel.from_pretrained(llama(), tmp_path))


def test_offloaded_factors_are_refused():
    from accelerate import cpu_offload

    model = get_peft_model(llama(), lora())
    reg = EllaRegularizer(model)
    cpu_offload(model.base_model.model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"lora_A of .*q_proj is offloaded \(on meta\): 'one' not folded"):
        reg.end_task("one")
    with pytest.raises(ValueError, match=r"q_proj: its LoRA weights are offloaded"):
        EllaRegularizer(model)


def test_shared_base_weights_are_not_merged_for_several_layers():
    model, _, _, live = within_task(lora_config=lora(layer_replication=[[0, 2], [1, 2]]))
    with pytest.raises(ValueError, match=r"is another module's too .*merging would change both; use export_adapter"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert relative_error(logits(model), live) < 1e-6
    tied = lora(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    model, _, _, live = within_task(lora_config=tied, tie_word_embeddings=True)
    model.merge_adapter()
    assert relative_error(logits(model), live) < 1e-6
    model.unmerge_adapter()
    assert relative_error(logits(model), live) < 1e-6


# --- a forward that goes past the layer ------------------------------------------------------------------------------


def test_a_replaced_forward_is_refused_at_the_fold():
    model = get_peft_model(llama(), lora())
    reg = EllaRegularizer(model)
    module = reg.layers[1].module
    module.forward = module.base_layer.forward
    with pytest.raises(ValueError, match=r"the forward of .*v_proj was replaced on the module"):
        reg.end_task("one")
    assert reg.tasks == [] and list(model.peft_config) == ["default"]


class FusedMlp(nn.Module):
    """Reads its LoRA layer's weights and never calls it, as fused kernels do."""

    def __init__(self, fused):
        super().__init__()
        self.up, self.down, self.fused = nn.Linear(8, 8), nn.Linear(8, 8), fused

    def forward(self, x):
        if not self.fused:
            return self.down(torch.tanh(self.up(x)))
        name = self.up.active_adapters[0]
        a, b = self.up.lora_A[name].weight, self.up.lora_B[name].weight
        return self.down(torch.tanh(self.up.base_layer(x) + self.up.scaling[name] * x @ a.T @ b.T))


@pytest.mark.parametrize("with_penalty", [False, True])
def test_a_fused_forward_is_an_error_in_the_first_step(with_penalty):
    for fused in (False, True):
        model = get_peft_model(FusedMlp(fused), LoraConfig(r=2, target_modules=["up", "down"]))
        reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
        randomise(model, 1)
        reg.end_task("one")
        randomise(model, 2)
        loss = model(torch.randn(3, 8)).square().mean() + (reg.penalty() if with_penalty else 0.0)
        if fused:
            with pytest.raises(RuntimeError, match=r"went past the LoRA layer up: .*keep_past='merge'"):
                loss.backward()
        else:
            loss.backward()
            assert not any(p._backward_hooks for p in model.parameters() if p._backward_hooks is not None)


def test_a_layer_that_the_forward_leaves_out_is_no_error():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.up(x)

    model = get_peft_model(Sometimes(), LoraConfig(r=2, target_modules=["up", "unused"]))
    reg = EllaRegularizer(model, EllaConfig(ella_lambda=1.0))
    randomise(model, 1)
    reg.end_task("one")
    randomise(model, 2)
    for _ in range(2):
        (model(torch.randn(3, 8)).square().mean() + reg.penalty()).backward()
        (sum(p.square().sum() for p in model.parameters() if p.requires_grad) * 0).detach()


# --- PEFT's extension point ------------------------------------------------------------------------------------------


def test_the_four_methods_of_a_variant_are_peft_s():
    """LoraVariant is marked private: a version that calls it differently must be noticed here."""
    names = ("forward", "merge_safe", "merge_unsafe", "unmerge")
    for name in names:
        theirs = list(inspect.signature(getattr(LoraVariant, name)).parameters)
        ours = list(inspect.signature(getattr(TogetherVariant("x"), name)).parameters)
        assert ours == theirs, name
    public = {name for name in vars(LoraVariant) if not name.startswith("_")}
    assert public == {*names, "init", "supports_lora_conversion"}


def test_every_kind_of_layer_is_in_these_tests():
    assert {layer.name.split(".")[0] for layer in EllaRegularizer(tiny()).layers} == set(TARGETS)
    assert deltas(EllaRegularizer(tiny(**EXPERTS)))["experts.up"]
