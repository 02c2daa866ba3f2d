"""Plans of named models and of doublings, for docs/scaling.md: ``python -m bench.plan_table`` writes results/plan.json.

Nothing here is measured: these are the numbers that ``ella plan`` prints.
"""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from .tables import bytes_text, seconds_text, table

__all__ = ["CASES", "DOUBLINGS", "computed", "section"]

RESULTS = Path(__file__).with_name("results") / "plan.json"


class Case(NamedTuple):
    """Arguments of ``ella plan``; the rest are its defaults. ``changes`` are fields of the preset's configuration."""

    model: str
    gpus: int = 1
    engine: str | None = None
    targets: str | tuple[str, ...] = "all-linear"
    rank: int = 16
    past_rank: int = 128
    penalty_rank: int | None = 16
    tasks: int | None = None
    base: str = "bfloat16"
    changes: tuple[tuple[str, int], ...] = ()


CASES = {
    "T5-large, q and v": Case("t5-large", targets=("q", "v"), rank=8, base="float32"),
    "LLaMA-3.1-8B, q and v": Case("llama-3.1-8b", targets=("q_proj", "v_proj")),
    "LLaMA-3.1-8B": Case("llama-3.1-8b"),
    "LLaMA-3.1-8B in 4 bits": Case("llama-3.1-8b", base="nf4"),
    "LLaMA-3.1-8B, 8 GPUs, DDP": Case("llama-3.1-8b", 8, "ddp"),
    "LLaMA-3.1-8B, 8 GPUs, FSDP2": Case("llama-3.1-8b", 8),
    "LLaMA-3.1-8B, 8 GPUs, ZeRO-3": Case("llama-3.1-8b", 8, "zero3"),
    "Qwen3-30B-A3B, 8 GPUs, FSDP2": Case("qwen3-30b-a3b", 8),
    "LLaMA-3.1-70B, 16 GPUs, FSDP2": Case("llama-3.1-70b", 16),
    "LLaMA-3.1-70B, 64 GPUs, FSDP2": Case("llama-3.1-70b", 64),
    "LLaMA-3.1-405B, 512 GPUs, sharded over 16": Case("llama-3.1-405b", 16),
    "LLaMA-3.1-405B, 512 GPUs, sharded over 64": Case("llama-3.1-405b", 64),
    "LLaMA-3.1-405B, 512 GPUs, sharded over all": Case("llama-3.1-405b", 512),
}
# One thing of the first row doubled at a time.
_START = Case("llama-3.1-8b", 8, tasks=4)
DOUBLINGS = {
    "LLaMA-3.1-8B, 8 GPUs, r 16, 4 tasks": _START,
    "width": _START._replace(
        changes=(("hidden_size", 8192), ("intermediate_size", 28672), ("num_attention_heads", 64),
                 ("num_key_value_heads", 16)),
    ),
    "layers": _START._replace(changes=(("num_hidden_layers", 64),)),
    "rank of the adapter": _START._replace(rank=32),
    "penalty's rank": _START._replace(penalty_rank=32),
    "tasks (8: the past is full)": _START._replace(tasks=8),
    "tasks twice (16)": _START._replace(tasks=16),
    "GPUs (16: a row of A each)": _START._replace(gpus=16),
    "GPUs twice (32)": _START._replace(gpus=32),
}  # fmt: skip


@cache
def _shapes(model: str, changes: tuple, targets: str | tuple[str, ...], rank: int, base: str) -> Any:
    from peft import LoraConfig

    from ella import EllaConfig
    from ella.planning import PRESETS, model_shapes

    lora = LoraConfig(r=rank, target_modules=targets if isinstance(targets, str) else list(targets))
    return model_shapes(PRESETS[model] | dict(changes), lora, EllaConfig(), base)


def computed(case: Case) -> dict[str, Any]:
    """What the tables show of a plan."""
    from ella import EllaConfig
    from ella.planning import plan_shapes

    plan = plan_shapes(
        _shapes(case.model, case.changes, case.targets, case.rank, case.base),
        EllaConfig(past_rank=case.past_rank, penalty_rank=case.penalty_rank),
        case.base, engine=case.engine, gpus=case.gpus, tasks=case.tasks,
    ).to_dict()  # fmt: skip
    sent = sum(one["bytes"] for one in plan["collectives"] if one["owner"] == "penalty")
    calls = sum(one["count"] for one in plan["collectives"] if one["owner"] == "penalty")
    with_past = sum(one["bytes"] for one in plan["collectives"] if one["owner"] == "past")
    keys = ("parameters", "trained", "parts", "memory", "operations", "times")
    return {key: plan[key] for key in keys} | {
        "sent": sent, "calls": calls, "sent_with_past": with_past, "source": plan["gpu"]["source"],
    }  # fmt: skip


def section(results: dict[str, Any]) -> str:
    """Both tables, from the committed file."""
    source = next(iter(results["cases"].values()))["source"]
    return "\n".join(
        [
            f"Computed by `ella plan`, not measured. Rates: {source}; times are bounds.",
            "",
            *_bytes(results["cases"]),
            "",
            *_step(results["cases"]),
            "",
            "One thing doubled at a time:",
            "",
            *_doublings(results["doublings"]),
            "",
        ]
    )


def _bytes(cases: dict[str, Any]) -> list[str]:
    lines = []
    for name, case in cases.items():
        m = case["memory"]
        trained = m["adapter"] + m["gradients"] + m["optimizer"] + m["buckets"]
        shown = (m["base"], trained, m["past"], m["penalty"], m["work"], m["dense_past"] + m["dense_work"])
        lines.append((name, *map(bytes_text, shown)))
    training = "adapter, gradients, AdamW"
    header = ("bytes on one GPU", "base", training, "past", "held for the penalty", "work", "dense form")
    return table(header, lines)


def _step(cases: dict[str, Any]) -> list[str]:
    lines = []
    for name, case in cases.items():
        done, took = case["operations"], case["times"]
        share = 100 * (done["past"] + done["penalty"]) / (done["base"] + done["adapter"])
        lines.append(
            (name, seconds_text(took["training"]), seconds_text(took["past"]), seconds_text(took["penalty"]),
             f"{share:.2f} %", f"{case['calls']}, {bytes_text(case['sent'])}", bytes_text(case["sent_with_past"]))
        )  # fmt: skip
    header = ("a step of 4096 tokens a GPU", "base and adapter", "finished tasks", "penalty",
              "operations of ELLA over the others", "penalty's collectives", "past in the engine's")  # fmt: skip
    return table(header, lines)


def _doublings(cases: dict[str, Any]) -> list[str]:
    (_, start), *others = cases.items()

    def shown(case: dict[str, Any]) -> list[float]:
        m, done = case["memory"], case["operations"]
        return [m["past"] + m["penalty"], m["work"], done["past"], done["penalty"], case["sent"], m["dense_past"]]

    first = shown(start)
    lines = []
    for name, case in others:
        pairs = zip(shown(case), first, strict=True)
        lines.append((name, *(f"{value / base:.2f}×" for value, base in pairs)))
    operations = "operations of the past"
    header = ("doubled", "past, held", "work", operations, "of the penalty", "penalty sends", "dense form")
    return table(header, lines)


def main() -> int:
    found = {
        "cases": {name: computed(case) for name, case in CASES.items()},
        "doublings": {name: computed(case) for name, case in DOUBLINGS.items()},
    }
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


def committed() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    sys.exit(main())
