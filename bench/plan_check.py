"""What ``ella plan`` says of small models against what they allocate: ``python -m bench.plan_check [--check]``.

Each row is a number of bytes on one GPU (the one with the most): parameters, gradients and optimizer states are the
memory behind the tensors that the engine keeps, the penalty's work memory is every allocation of the kernels under
Triton's interpreter. One process of each engine per GPU, on CPUs, over gloo. The rows are committed as
``bench/results/plan_check.json``, from where docs/scaling.md has its table.
"""

from __future__ import annotations

import contextlib
import gc
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tables import table

__all__ = ["CASES", "TOLERANCE", "Row", "committed", "compared", "measure", "rows_in_processes", "section"]

RESULTS = Path(__file__).with_name("results") / "plan_check.json"
TOLERANCE = 0.01
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
WORLDS = (2, 4)
TASKS = 2

_LLAMA = {
    "model_type": "llama", "vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip
_T5 = {
    "model_type": "t5",
    "vocab_size": 384,
    "d_model": 96,
    "d_kv": 16,
    "d_ff": 160,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_MOE = {
    "model_type": "qwen3_moe", "vocab_size": 256, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16,
    "moe_intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_experts": 4, "num_experts_per_tok": 2,
}  # fmt: skip


class Case(NamedTuple):
    """A small model, its adapter and its past. Ranks that no number of GPUs divides."""

    name: str
    config: dict[str, Any]
    lora: dict[str, Any]
    ella: dict[str, Any]
    base: str = "float32"


_ALL = {"r": 6, "target_modules": "all-linear"}
CASES = {
    case.name: case
    for case in (
        Case("LLaMA, all linear", _LLAMA, _ALL, {"past_rank": 10, "penalty_rank": 4}),
        Case("LLaMA, all linear, bf16", _LLAMA, _ALL, {"past_rank": 10}, "bfloat16"),
        Case("T5, q and v", _T5, {"r": 5, "target_modules": ["q", "v"]}, {"past_rank": 64}),
        Case("LLaMA, merged past", _LLAMA, _ALL, {"keep_past": "merge"}),
        Case("LLaMA, external past", _LLAMA, _ALL, {"keep_past": "external"}),
        Case("LLaMA, 4 bits", _LLAMA, _ALL, {}, "nf4"),
        Case("Qwen3-MoE, all linear", _MOE, _ALL | {"r": 4}, {"past_rank": 6, "penalty_rank": 4}),
    )
}
# Run by every engine, the others by one process.
SPREAD = ("LLaMA, all linear", "LLaMA, all linear, bf16", "T5, q and v")


class Row(NamedTuple):
    """``what`` is a field of :class:`ella.planning.Memory`; bytes of one GPU."""

    case: str
    engine: str
    gpus: int
    what: str
    estimate: int
    measured: int

    @property
    def error(self) -> float:
        """Relative; one of nothing where the other is something is 1."""
        return abs(self.estimate - self.measured) / max(self.measured, self.estimate, 1)


# ------------------------------------------------------------------------------------------- what is estimated


def estimates(case: Case, engine: str, gpus: int) -> dict[str, int]:
    """The plan's bytes, its kernels being those of the interpreter."""
    from peft import LoraConfig

    from ella import EllaConfig
    from ella.planning import Gpu, make_plan

    here = Gpu("interpreter", "cpu", 0, 1.0, 1.0, 1, 1.0, 1.0)
    plan = make_plan(
        case.config, LoraConfig(**case.lora), EllaConfig(**case.ella), base=case.base, engine=engine, gpus=gpus,
        gpu=here, tasks=TASKS,
    )  # fmt: skip
    return {name: value for name, value in vars(plan.memory).items() if isinstance(value, int)}


# --------------------------------------------------------------------------------------------- what is measured


def held(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the memory behind tensors, each piece once; of a DTensor this rank's part."""
    found = {}
    for tensor in tensors:
        if tensor is not None:
            local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
            storage = local.detach().untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


class Model:
    """The model of a case in the middle of its third task."""

    def __init__(self, case: Case) -> None:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig

        from ella import EllaConfig, EllaRegularizer
        from ella.planning.shapes import auto_class

        torch.manual_seed(0)
        fields = dict(case.config)
        config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        dtype = torch.bfloat16 if case.base in ("bfloat16", "nf4") else torch.float32
        base = auto_class(config).from_config(config, dtype=dtype)
        if case.base == "nf4":
            base = in_four_bits(base)
        self.case, self.vocabulary = case, base.config.vocab_size
        self.model = get_peft_model(base, LoraConfig(**case.lora)).train()
        self.reg = EllaRegularizer(self.model, EllaConfig(**case.ella))
        for task in range(TASKS):
            self._fill(task)
            self.reg.end_task(str(task))
        self._fill(TASKS)
        trained, known = ({id(p) for layer in self.reg.layers for p in layer.all_parameters(name)}
                          for name in (self.reg.adapter, self.reg.config.adapter_name))  # fmt: skip
        known -= trained
        named = list(self.model.named_parameters())
        self.groups = {
            "adapter": [name for name, p in named if id(p) in trained],
            "past": [name for name, p in named if id(p) in known],
            "base": [name for name, p in named if id(p) not in trained | known],
        }

    def _fill(self, task: int) -> None:
        generator = torch.Generator().manual_seed(task)
        for layer in self.reg.layers:
            for parameter in layer.parameters():
                parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))

    @property
    def trainable(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def parameters(self, group: str) -> list[nn.Parameter]:
        named = dict(self.model.named_parameters())
        return [named[name] for name in self.groups[group]]

    def loss(self, model: Callable | None = None) -> Tensor:
        ids = torch.randint(3, self.vocabulary, (2, 8), generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.case.base != "float32"):
            return (model or self.model)(input_ids=ids, labels=ids).loss

    def weights(self) -> dict[str, int]:
        found = {group: held(self.parameters(group)) for group in self.groups}
        if self.case.base == "nf4":
            found["base"] += held(_quantised_states(self.model))
        past = self.reg._finished.past
        if past.is_external:
            found["past"] = held(t for stored in past._held.values() for part in stored.parts for t in part[:2])
        return found

    def penalty(self) -> dict[str, int]:
        """What the penalty holds beside the stored past, and on the CPU."""
        past = self.reg._finished.past
        terms = self.reg._operands().terms
        used = [t for term in terms if term.past is not None for t in term.past]
        stored = {t.untyped_storage().data_ptr() for layer in self.reg.layers
                  for pair in past.factors(layer) or () for t in pair}  # fmt: skip
        own = [t for t in used if t is not None and t.untyped_storage().data_ptr() not in stored]
        host = held(t for pairs in past._energies.values() for pair in pairs for t in pair)
        if past.base is not None:
            host += held(past.base._weights.values())
        return {"penalty": held(own), "host": host}

    def work(self) -> int:
        """Most bytes that the Triton kernels hold at once, in a first call, without the values."""
        import ella_kernels as ek

        from .measure import peak_bytes

        operands = self.reg._operands()
        factors = [layer.factors(*(p.detach().float() for p in layer.parameters())) for layer in self.reg.layers]
        pairs = [factors[term.layer][term.part] for term in operands.terms]
        a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        grads_a, grads_b = ([torch.zeros_like(t) for t in factor] for factor in (a, b))

        def call() -> object:
            return ek.add_hadamard_grad_(
                a, b, operands.pasts, operands.scalings, grads_a, grads_b, weight=1.0, backend="triton"
            )

        with as_a_first_call():
            return peak_bytes(call) - 4 * len(pairs)


@contextlib.contextmanager
def as_a_first_call() -> Iterator[None]:
    """Nothing of other calls is freed within, and this one's memory as soon as on a GPU.

    Triton's interpreter leaves a launch's arguments in reference cycles, where a compiled one drops them.
    """
    from ella_kernels import functional, ops

    functional._MEMORY.clear()
    ops._MEMORY.clear()
    plain = torch.empty

    def allocate(*args: Any, **kwargs: Any) -> Tensor:
        gc.collect()
        return plain(*args, **kwargs)

    gc.collect()
    torch.empty = allocate  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty = plain


def in_four_bits(model: nn.Module) -> nn.Module:
    """Every linear map but the output head in NF4, with doubly quantised scales."""
    import bitsandbytes as bnb

    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            made = bnb.nn.Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None, compute_dtype=torch.bfloat16,
                quant_type="nf4", compress_statistics=True,
            )  # fmt: skip
            made.weight = bnb.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to("cpu")
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
    return model


def _quantised_states(model: nn.Module) -> Iterator[Tensor]:
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            yield from (t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor))
            state = state.state2


def measure(case: Case, engine: str, gpus: int) -> dict[str, int]:
    """Bytes of this process by the fields of ``Memory`` that can be measured here."""
    made = Model(case)
    if engine in ("one", "ddp"):
        return _measure_whole(made, engine)
    return _measure_fsdp2(made, gpus) if engine == "fsdp2" else _measure_zero(made, int(engine[-1]))


def _measure_whole(made: Model, engine: str) -> dict[str, int]:
    found: dict[str, int] = {}
    model: nn.Module = made.model
    if engine == "ddp":
        model = torch.nn.parallel.DistributedDataParallel(model)
        sizes = model._get_ddp_logging_data()["bucket_sizes"]
        found["buckets"] = sum(int(size) for size in str(sizes).split(",") if size.strip())
    optimizer = torch.optim.AdamW(made.trainable)
    made.reg.add_gradient_()
    made.loss(model).backward()
    optimizer.step()
    found |= made.weights() | made.penalty() | _training(made, optimizer)
    if engine == "one":
        found["work"] = made.work()
    return found


def _training(made: Model, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    # The count of steps is on the CPU, also where the states are not.
    states = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    return {"gradients": held(p.grad for p in made.trainable), "optimizer": held(states)}


def _measure_fsdp2(made: Model, gpus: int) -> dict[str, int]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh("cpu", (gpus,))
    policy = MixedPrecisionPolicy() if made.case.base == "float32" else MixedPrecisionPolicy(torch.bfloat16)
    blocks = set(made.model.base_model.model._no_split_modules)
    for module in list(made.model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(made.model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(made.trainable)
    made.loss().backward()
    for module in made.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    optimizer = torch.optim.AdamW(made.trainable)
    optimizer.step()
    return made.weights() | _training(made, optimizer)


def _measure_zero(made: Model, stage: int) -> dict[str, int]:
    import deepspeed

    # On CPUs a collective for shared memory, in C++, would be compiled first, for minutes.
    deepspeed.ops.__compatible_ops__.pop("deepspeed_shm_comm", None)
    recipe = Path(__file__).parents[1] / "recipes" / "deepspeed" / f"zero{stage}.json"
    zero = json.loads(recipe.read_text(encoding="utf-8"))["zero_optimization"]
    config = {
        # There are no streams on a CPU to overlap on.
        "zero_optimization": zero | {"overlap_comm": False},
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": made.case.base == "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(made.trainable)
    engine, zero_optimizer, *_ = deepspeed.initialize(
        model=made.model, optimizer=optimizer, config=config, dist_init_required=False
    )
    engine.backward(made.loss(engine))
    if stage == 2:
        gradients = held(g for own in zero_optimizer.averaged_gradients.values() for g in own)
        copies = zero_optimizer.single_partition_of_fp32_groups
    else:
        gradients = held([zero_optimizer.grad_partitions_flat_buffer])
        copies = zero_optimizer.fp32_partitioned_groups_flat
    engine.step()
    states = (t for state in optimizer.state.values() for name, t in state.items() if name != "step")
    found = {"gradients": gradients, "optimizer": held(copies) + held(t for t in states if isinstance(t, Tensor))}
    for group in made.groups:
        parameters = made.parameters(group)
        if stage == 2:
            found[group] = held(parameters)
        else:
            # Its part of every parameter, and those that stay whole.
            parts = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in parameters)
            found[group] = parts + held(p for p in parameters if p.numel())
    return found


# ------------------------------------------------------------------------------------------------- all of them


def worker(rank: int, world: int, folder: str, engines: Sequence[str]) -> None:
    """One of several processes: every engine in turn; rank 0 writes the largest number of all ranks."""
    import torch.distributed as dist

    # What engines print is not the check's.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ.update(RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{world}", LOCAL_SIZE="0")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    rows: list[Row] = []
    for engine in engines:
        for name in SPREAD:
            found: list[dict[str, int]] = [{}] * world
            dist.all_gather_object(found, measure(CASES[name], engine, world))
            largest = {what: max(one[what] for one in found) for what in found[0]}
            rows += compared(CASES[name], engine, world, largest)
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def compared(case: Case, engine: str, gpus: int, measured: dict[str, int]) -> list[Row]:
    """Rows of everything that was measured."""
    expected = estimates(case, engine, gpus)
    return [Row(case.name, engine, gpus, what, expected[what], bytes_) for what, bytes_ in sorted(measured.items())]


def rows_in_processes(world: int, engines: Sequence[str] = ENGINES) -> list[Row]:
    """Rows of ``world`` processes, forked once for all engines from one that has imported them.

    Raises:
        torch.multiprocessing.ProcessException: one of them failed; the others are ended.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([__name__, "peft", "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(worker, (world, folder, engines), world, start_method="forkserver")
        return [Row(*row) for row in json.loads(Path(folder, "rows.json").read_text(encoding="utf-8"))]


def committed() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


# Columns of the table.
KINDS = ("base", "adapter", "gradients", "optimizer", "buckets", "past", "penalty", "work", "host")


def section(results: dict[str, Any]) -> str:
    """The table of docs/scaling.md: a line per run, estimate and measured bytes of each kind."""
    runs: dict[tuple, dict[str, Row]] = {}
    for row in (Row(*row) for row in results["rows"]):
        runs.setdefault(row[:3], {})[row.what] = row
    lines = []
    for (case, engine, gpus), rows in runs.items():
        cells = (f"{rows[w].estimate:,} / {rows[w].measured:,}" if w in rows else "–" for w in KINDS)
        worst = max(row.error for row in rows.values())
        lines.append((f"{case}; {engine}, {gpus}", *cells, f"{100 * worst:.2f} %"))
    found = [row for rows in runs.values() for row in rows.values()]
    worst = max(row.error for row in found)
    text = [
        f"Estimate / measured bytes on one GPU: {len(found)} pairs, the largest error {100 * worst:.2f} %; "
        f"{results['versions']}.",
        "",
        *table(("model; engine, GPUs", *KINDS, "largest error"), lines),
    ]
    return "\n".join(text) + "\n"


def versions() -> str:
    """Of what allocated."""
    from importlib.metadata import version

    return ", ".join(
        f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "deepspeed", "bitsandbytes")
    )


def all_rows() -> list[Row]:
    rows = [row for case in CASES.values() for row in compared(case, "one", 1, measure(case, "one", 1))]
    for world in WORLDS:
        rows += rows_in_processes(world)
    return rows


def main(arguments: Sequence[str]) -> int:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    rows = all_rows()
    for row in rows:
        if row.error > TOLERANCE:
            print(f"over {TOLERANCE:.0%}: {row} ({100 * row.error:.2f} %)")
    if "--check" not in arguments:
        results = {"versions": versions(), "rows": [list(row) for row in rows]}
        RESULTS.write_text(json.dumps(results) + "\n", encoding="utf-8")
    return int(any(row.error > TOLERANCE for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
