"""``ella plan``: its bytes against real models, its operations against counted ones, its shapes against known ones."""

from __future__ import annotations

import json
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from bench import plan_check, plan_table
from ella import EllaConfig, EllaRegularizer
from ella.cli import main
from ella.planning import GPUS, PRESETS, Gpu, make_plan, model_shapes
from ella.planning.memory import memory, penalty_sizes, ranks_of
from ella.planning.plan import with_results
from ella.planning.shapes import load_config
from ella.planning.work import operations
from ella.terms import KEPT
from ella_kernels.layer import Layer
from ella_kernels.torch_backend.gram import hadamard_gram
from ella_kernels.workspace import Size, work_bytes

CPU = Gpu("interpreter", "cpu", 0, 1.0, 1.0, 1, 1.0, 1.0)
ALL = LoraConfig(r=16, target_modules="all-linear")


@pytest.fixture(scope="module")
def llama_8b():
    return model_shapes("llama-3.1-8b", ALL, EllaConfig())


# --- bytes, against what is allocated ---------------------------------------------------------------------------------


def over_a_per_cent(rows):
    assert rows
    return [f"{row}: {100 * row.error:.2f} %" for row in rows if row.error > plan_check.TOLERANCE]


@pytest.mark.parametrize("name", plan_check.CASES)
def test_one_process_allocates_what_the_plan_says(name):
    case = plan_check.CASES[name]
    rows = plan_check.compared(case, "one", 1, plan_check.measure(case, "one", 1))
    assert over_a_per_cent(rows) == []
    assert {"adapter", "base", "gradients", "host", "optimizer", "past", "penalty", "work"} == {r.what for r in rows}
    assert all(row.measured > 0 for row in rows if row.what not in ("host", "penalty"))


@pytest.mark.slow
@pytest.mark.parametrize("world", plan_check.WORLDS)
def test_processes_allocate_what_the_plan_says(world):
    rows = plan_check.rows_in_processes(world)
    assert over_a_per_cent(rows) == []
    found = {(row.case, row.engine, row.what) for row in rows}
    kinds = ("adapter", "base", "gradients", "optimizer", "past")
    assert {(c, e, w) for c in plan_check.SPREAD for e in plan_check.ENGINES for w in kinds} <= found
    assert all(row.measured > 0 for row in rows if row.what in kinds)


def test_the_committed_check_is_of_these_formulae():
    rows = [plan_check.Row(*row) for row in plan_check.committed()["rows"]]
    assert over_a_per_cent(rows) == []
    assert {(row.engine, row.gpus) for row in rows} == {("one", 1)} | {
        (engine, world) for engine in plan_check.ENGINES for world in plan_check.WORLDS
    }
    for case, engine, gpus in sorted({row[:3] for row in rows}):
        now = plan_check.estimates(plan_check.CASES[case], engine, gpus)
        committed = {row.what: row.estimate for row in rows if row[:3] == (case, engine, gpus)}
        assert committed == {what: now[what] for what in committed}, "run: python -m bench.plan_check"


def test_an_estimate_that_is_off_shows():
    case = plan_check.CASES["T5, q and v"]
    right = plan_check.estimates(case, "one", 1)
    (row,) = plan_check.compared(case, "one", 1, {"past": round(1.02 * right["past"])})
    assert row.error > plan_check.TOLERANCE
    (row,) = plan_check.compared(case, "one", 1, {"host": 1})
    assert row.error == 1, "one of nothing"


# --- what a plan says of known models ---------------------------------------------------------------------------------


def test_presets_are_the_models_they_name(llama_8b):
    one = LoraConfig(r=1, target_modules=["q_proj"], layers_to_transform=[0])
    of_t5 = LoraConfig(r=1, target_modules=["q"])
    expected = {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496,
        "llama-3.1-405b": 405_853_388_800,
        "t5-large": 737_668_096,
        "qwen3-30b-a3b": 30_532_122_624,
    }
    assert expected.keys() == PRESETS.keys()
    for name, parameters in expected.items():
        shapes = model_shapes(name, of_t5 if name == "t5-large" else one, EllaConfig())
        assert sum(weight.numel for weight in shapes.base if weight.itemsize) == parameters
        active = sum(weight.numel * weight.active for weight in shapes.base)
        if name == "qwen3-30b-a3b":
            assert 2.9e9 < active < 3.4e9  # its name says three billion
        else:
            assert 0.9 * parameters < active < parameters


def test_the_dense_form_of_known_models(llama_8b):
    # GB of past state: all linear layers of 8B 28, q and v of it 2.7, all of 70B 274.
    dense = [4 * sum(layer.out * layer.in_ for layer in llama_8b.layers)]
    for name, targets in (("llama-3.1-8b", ["q_proj", "v_proj"]), ("llama-3.1-70b", "all-linear")):
        plan = make_plan(name, LoraConfig(r=8, target_modules=targets))
        assert plan.memory.dense_past == plan.memory.dense_work
        dense.append(plan.memory.dense_past)
    assert [round(n / 1e9, 1) for n in dense] == [27.9, 2.7, 273.8]


def test_shapes_are_pefts(llama_8b):
    assert len(llama_8b.layers) == 224 and {layer.r for layer in llama_8b.layers} == {16}
    lora = LoraConfig(r=4, target_modules=r".*\.(q_proj|down_proj)", rank_pattern={"down_proj": 6}, use_rslora=True)
    shapes = model_shapes(plan_check.CASES["LLaMA, all linear"].config, lora, EllaConfig(), "float32")
    found = {(layer.name.split(".")[-1], layer.out, layer.in_, layer.r) for layer in shapes.layers}
    assert found == {("q_proj", 128, 128, 4), ("down_proj", 128, 344, 6)}
    # PEFT doubles the rank where gate and up share a parameter.
    moe = model_shapes(plan_check.CASES["Qwen3-MoE, all linear"].config, LoraConfig(r=4, target_modules="all-linear"),
                       EllaConfig())  # fmt: skip
    experts = {
        (layer.name.split(".")[-1], layer.parts, layer.r, layer.active) for layer in moe.layers if layer.parts > 1
    }
    assert experts == {("gate_up_proj", 4, 8, 2.0), ("down_proj", 4, 4, 2.0)}


def test_tied_and_trained_weights_count_once():
    config = plan_check.CASES["LLaMA, all linear"].config
    tied = model_shapes(config | {"tie_word_embeddings": True}, ALL, EllaConfig())
    apart = model_shapes(config, ALL, EllaConfig())
    head = 512 * 128
    numels = [sum(w.numel for w in shapes.base if w.itemsize) for shapes in (tied, apart)]
    assert numels[1] - numels[0] == head
    actives = [sum(w.numel * w.active for w in shapes.base) for shapes in (tied, apart)]
    assert actives[0] == actives[1], "a tied head multiplies too"
    saved = model_shapes(config, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]), EllaConfig())
    assert sum(w.numel for w in saved.base if w.is_trained) == head


def test_ranks_of_the_past():
    (layer,) = {layer for layer in model_shapes(
        plan_check.CASES["LLaMA, all linear"].config, LoraConfig(r=16, target_modules=["v_proj"],
        layers_to_transform=[0]), EllaConfig()).layers}  # fmt: skip
    assert (layer.out, layer.in_) == (64, 128)

    def ranks(tasks, **options):
        own = ranks_of(layer, EllaConfig(**options), tasks)
        return own.stored, own.is_truncated, own.used, own.has_energy

    assert ranks(0) == (0, False, 0, False)
    assert ranks(1) == (16, False, 16, False)
    assert ranks(9) == (64, False, 64, False), "no more than the smaller side has"
    assert ranks(9, past_rank=40) == (40, True, 40, True)
    assert ranks(None, past_rank=40) == (40, True, 40, True)
    assert ranks(2, past_rank=40, penalty_rank=8) == (32, False, 8, True)
    assert ranks(2, penalty_rank=0) == (32, False, 0, True)
    assert ranks(9, past_rank=40, penalty="spectral") == (40, True, 40, False)
    assert ranks(2, penalty="importance") == (32, False, 0, True)


# --- operations -------------------------------------------------------------------------------------------------------


# Products that are added in place, which PyTorch's counter does not know.
IN_PLACE = {
    torch.ops.aten.addmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * b[1],
    torch.ops.aten.baddbmm_: lambda _, a, b, **__: 2 * a[0] * a[1] * a[2] * b[2],
}


def counted(model, ids):
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if "mm" in str(op))


def test_operations_are_those_of_a_step():
    """Products of a real step: the base, the trained factors and, against no task, what finished tasks add."""
    torch.manual_seed(0)
    fields = {key: value for key, value in plan_check.CASES["LLaMA, all linear"].config.items() if key != "model_type"}
    config, lora, ella = LlamaConfig(**fields), LoraConfig(r=8, target_modules="all-linear"), EllaConfig()
    model = get_peft_model(LlamaForCausalLM(config), lora)
    model.enable_input_require_grads()
    ids = torch.randint(0, 512, (2, 16))
    reg, counts = EllaRegularizer(model, ella), {}
    for tasks in range(3):
        counts[tasks] = counted(model, ids)
        for layer in reg.layers:
            layer.parameters()[1].data.normal_()
        reg.end_task(str(tasks))
    shapes = model_shapes(config, lora, ella, "float32")
    for tasks in range(3):
        ranks = [ranks_of(layer, ella, tasks) for layer in shapes.layers]
        done = operations(shapes, ella, ranks, [], ids.numel(), "cpu", is_recomputed=False)
        expected = done.base + done.adapter + done.past
        # RoPE's angles are a product too.
        assert abs(counts[tasks] - expected) / expected < 1e-3, tasks
    assert counts[2] - counts[1] == counts[1] - counts[0] > 0


def test_operations_of_gram_are_counted_ones():
    out, in_, r, k = 40, 56, 3, 5
    a, b, left, right = (torch.randn(size) for size in ((r, in_), (out, r), (out, k), (k, in_)))
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        hadamard_gram([Layer(a, b, left, right, None, None, 1.0, "gram", torch.zeros_like(a), torch.zeros_like(b))])
    assert counter.get_total_flops() == 4 * (out + in_) * (r * (r + 1) // 2) * (k * (k + 1) // 2) > 0


def test_recomputation_and_keep_past(llama_8b):
    plans = {
        keep: make_plan("t5-large", LoraConfig(r=8, target_modules=["q"]), EllaConfig(keep_past=keep), tokens=7)
        for keep in ("adapter", "merge", "external")
    }
    assert plans["adapter"].operations.past > 0
    assert plans["merge"].operations.past == plans["external"].operations.past == 0
    once = make_plan("t5-large", LoraConfig(r=8, target_modules=["q"]), tokens=7, is_recomputed=False)
    assert 4 * plans["adapter"].operations.base == 6 * once.operations.base
    assert plans["merge"].memory.host == 2 * 72 * 1024**2 + plans["adapter"].memory.host


# --- many GPUs --------------------------------------------------------------------------------------------------------


def test_fsdp2_falls_with_the_gpus(llama_8b):
    ella = EllaConfig(penalty_rank=16)
    found = [memory(llama_8b, ella, "fsdp2", gpus, None, "sm_90") for gpus in (8, 64)]
    for what in ("base", "past"):
        assert getattr(found[0], what) / getattr(found[1], what) == pytest.approx(8, rel=0.01), what
    # Of 16 rows of A 64 GPUs hold one or none.
    assert 2 < found[0].adapter / found[1].adapter < 8
    assert found[1].work > 3 * found[0].work, "A is filled up to 64 rows"
    # A smaller past's R is whole everywhere, and does not fall.
    ella = EllaConfig(past_rank=32, penalty_rank=16)
    assert 4 * 32 * sum(layer.in_ for layer in llama_8b.layers) < KEPT
    found = [memory(llama_8b, ella, "fsdp2", gpus, None, "sm_90") for gpus in (8, 64)]
    assert 1 < found[0].penalty / found[1].penalty < 1.3


def test_a_large_right_is_gathered():
    plan = make_plan("llama-3.1-70b", ALL, EllaConfig(), engine="fsdp2", gpus=16)
    mine = {one.kind: one for one in plan.collectives if one.owner == "penalty"}
    assert {kind: one.count for kind, one in mine.items()} == {"all-gather": 1, "reduce-scatter": 1}
    columns = sum(layer.in_ for layer in model_shapes("llama-3.1-70b", ALL, EllaConfig()).layers)
    assert 4 * 128 * columns > KEPT
    assert mine["all-gather"].bytes == round(15 / 16 * 4 * columns * (16 + 128))
    assert mine["reduce-scatter"].bytes == round(15 / 16 * 4 * columns * 16)


def test_collectives_of_engines():
    def owners(engine, **options):
        plan = make_plan(
            "t5-large", LoraConfig(r=8, target_modules=["q"]), EllaConfig(**options), engine=engine, gpus=4
        )
        return {one.owner for one in plan.collectives}

    assert owners("ddp") == owners("zero2") == {"engine"}, "every rank computes its own penalty"
    assert owners("fsdp2") == owners("zero3") == {"engine", "past", "penalty"}
    assert owners("fsdp2", keep_past="external") == {"engine", "penalty"}
    assert make_plan("t5-large", LoraConfig(r=8, target_modules=["q"])).collectives == []
    lora, ella = LoraConfig(r=8, target_modules=["q"]), EllaConfig(penalty="spectral", past_rank=4)
    plan = make_plan("t5-large", lora, ella, engine="fsdp2", gpus=4)
    mine = {one.kind: one.bytes for one in plan.collectives if one.owner == "penalty"}
    # 72 layers of 1024x1024: all of A, and a sum of (k, r) products.
    assert mine == {"all-gather": 72 * 3 * 8 * 1024, "all-reduce": 72 * 2 * 3 * 4 * 8}


# --- work memory ------------------------------------------------------------------------------------------------------


def test_work_memory_is_bounded_but_for_tables(llama_8b):
    ranks = [ranks_of(layer, EllaConfig(penalty_rank=16), None) for layer in llama_8b.layers]
    sizes = penalty_sizes(llama_8b.layers, ranks, "one", 1)
    assert 8 * 2**20 < work_bytes(sizes, "sm_90") < 14 * 2**20
    assert work_bytes([], "sm_90") == work_bytes([Size(8, 8, 4, 0)], "sm_90") == 0
    assert 0 < work_bytes(sizes, "sm_90", "spectral") < work_bytes(sizes, "sm_90")
    with pytest.raises(ValueError, match="r up to 64, found r = 65"):
        work_bytes([Size(99, 99, 65, 4)], "sm_90", "spectral")


# --- rates ------------------------------------------------------------------------------------------------------------


def test_rates_are_the_data_sheets_until_measured():
    plan = make_plan("t5-large", LoraConfig(r=8, target_modules=["q"]), gpu="a100")
    assert plan.gpu is GPUS["A100"] and not plan.gpu.is_measured and "data sheet" in plan.gpu.source
    with pytest.raises(ValueError, match="gpu must be one of A100, H100, H200, B200, MI300X, found 'V100'"):
        make_plan("t5-large", LoraConfig(r=8, target_modules=["q"]), gpu="V100")


def test_a_committed_run_replaces_them():
    case = {"case": "LLaMA-3.1-8B, q and v (64 layers) r8 k8", "provider": "ours auto, triton"}
    machine = {"name": "NVIDIA H100 80GB HBM3", "date": "2026-01-01", "commit": "abc", "copy_bytes_per_s": 2.9e12}
    gpu = with_results(GPUS["H100"], {"machine": machine, "rows": [case | {"median": 1e-4}]})
    assert gpu.is_measured and gpu.bandwidth == 2.9e12 and "measured on NVIDIA H100" in gpu.source
    # The calibration's own case is predicted to take what it took.
    lora = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    plan = make_plan("llama-3.1-8b", lora, EllaConfig(past_rank=128), gpu=gpu, tasks=1)
    assert plan.times.penalty == pytest.approx(1e-4, rel=1e-6)
    with pytest.raises(ValueError, match="no time of ours auto, triton"):
        with_results(GPUS["H100"], {"machine": machine, "rows": []})


# --- the command ------------------------------------------------------------------------------------------------------


def run(capsys, *arguments):
    capsys.readouterr()
    status = main(["plan", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_the_command(capsys, tmp_path):
    config = plan_check.CASES["LLaMA, all linear"].config
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--rank", 6, "--past-rank", 10, "--penalty-rank", 4, "--gpus", 8)
    status, out, err = run(capsys, tmp_path, *options)
    assert (status, err) == (0, "")
    for text in ("FSDP2, 8 GPUs (H100)", "past: finished tasks' factors", "penalty and its gradients", "data sheet",
                 "No committed GPU results", "reduce-scatter", "time (bound)"):  # fmt: skip
        assert text in out, text
    status, out, _ = run(capsys, tmp_path / "config.json", *options, "--json")
    data = json.loads(out)
    lora = LoraConfig(r=6, target_modules="all-linear")
    plan = make_plan(config, lora, EllaConfig(past_rank=10, penalty_rank=4), gpus=8)
    assert status == 0 and data["memory"]["past"] == plan.memory.past > 0
    assert data["memory"]["total"] == plan.memory.total > data["memory"]["state"] > 0
    assert data["times"]["penalty"] > 0 and math.isfinite(data["times"]["penalty"])
    status, out, _ = run(capsys, tmp_path, "--targets", "q_proj,v_proj", "--json", "--tasks", 1)
    assert json.loads(out)["parts"] == 4 and json.loads(out)["ranks"] == [[16, 16, 16]]
    status, out, _ = run(capsys, tmp_path, "--targets", r".*layers\.1\.mlp\.\w+_proj", "--json")
    assert json.loads(out)["parts"] == 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gone",), "no model configuration 'gone': neither a preset (llama-3.1-8b"),
        (("t5-large", "--gpu", "V100"), "gpu must be one of"),
        (("t5-large", "--gpus", "2", "--engine", "one"), "engine 'one' is one process, found gpus = 2"),
        (("t5-large", "--targets", "nowhere"), "nowhere"),
        (("t5-large", "--base", "nf4", "--keep-past", "merge"), "not quantised, found base='nf4'"),
    ],
)
def test_the_command_refuses(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert status == 1 and out == "" and err.startswith("ella: ") and message in err


def test_files_that_are_no_configuration(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is no json"):
        load_config(path)
    path.write_text('{"hidden_size": 3}')
    with pytest.raises(ValueError, match="with a 'model_type', found none"):
        load_config(path)


def test_nothing_of_a_model_is_allocated(monkeypatch):
    seen = []
    plain = nn.Linear.__init__

    def spying(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        seen.append(self.weight.device.type)

    monkeypatch.setattr(nn.Linear, "__init__", spying)
    model_shapes("t5-large", LoraConfig(r=8, target_modules=["q", "v"]), EllaConfig())
    assert len(seen) > 144 and set(seen) == {"meta"}


# --- what the documents show ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["T5-large, q and v", "LLaMA-3.1-8B, 8 GPUs, FSDP2"])
def test_the_committed_tables_are_what_plan_says(name):
    found = json.loads(json.dumps(plan_table.computed(plan_table.CASES[name])))
    assert found == plan_table.committed()["cases"][name], "run: python -m bench.plan_table"
