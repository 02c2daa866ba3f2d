"""The cases of all tests here, run once per number of processes."""

from __future__ import annotations

import pytest

from tests.distributed.launch import run

KINDS, ACCUMULATIONS = ("llama", "t5"), ("1", "4")
LOOPS, TRAINERS = ("ddp", "fsdp2"), ("ddp", "fsdp2", "zero2", "zero3")


def tasks(module, engines, strength="1.0", kinds=KINDS):
    return [f"{module}:two_tasks:{k}:{e}:{n}:{strength}" for k in kinds for e in engines for n in ACCUMULATIONS]


def trainers(kind):
    """Engines of the Trainer. accelerate gives T5's tied embeddings to two FSDP2 groups, which torch refuses."""
    return [engine for engine in TRAINERS if (kind, engine) != ("t5", "fsdp2")]


PENALTIES = [
    "penalty=hadamard", "penalty=hadamard:past_rank=5:ella_lambda=auto",
    "penalty=hadamard:penalty_rank=2:normalize=rms",
    "penalty=hadamard:reduction=mean:r=1", "penalty=spectral", "penalty=spectral:past_rank=3:r=1",
]  # fmt: skip
PENALTIES = [f"options:penalty_of:{settings}" for settings in PENALTIES]
STEPS = [
    "options:gathered_past", "options:every_kind", "options:offloaded", "options:checkpointed:False",
    "options:checkpointed:True", "options:half", "options:evaluated", "options:unused:ddp", "options:unused:fsdp2",
]  # fmt: skip
MEASURED = ["options:measured:ddp", "options:measured:fsdp2"]
# With the penalty and without.
LAYERS = ["loops:every_layer:0.5", "loops:every_layer:0.0"]
COUNTS = ["options:collectives:4", "options:collectives:32"]


@pytest.fixture(scope="session")
def alone(tmp_path_factory):
    """What one process gives, without a process group, and without the penalty."""
    cases = [*PENALTIES, *STEPS, *LAYERS, *MEASURED, "options:hsdp"]
    for module in ("loops", "trainers"):
        cases += tasks(module, ["alone"]) + tasks(module, ["alone"], "0.0")
    return run(1, cases, tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="session")
def two(tmp_path_factory):
    cases = [
        *tasks("loops", LOOPS), *PENALTIES, *STEPS, LAYERS[0], *MEASURED, *COUNTS, "options:work",
        "options:refusals", "options:exact",
    ]  # fmt: skip
    return run(2, cases, tmp_path_factory.mktemp("two") / "run")


@pytest.fixture(scope="session")
def two_trainers(tmp_path_factory):
    cases = [case for kind in KINDS for case in tasks("trainers", trainers(kind), kinds=[kind])]
    return run(2, cases, tmp_path_factory.mktemp("trainers") / "run")


@pytest.fixture(scope="session")
def four(tmp_path_factory):
    cases = [
        *tasks("loops", LOOPS, kinds=["llama"]), *PENALTIES, "options:hsdp", "options:work",
        "options:sharded_memory", *tasks("trainers", TRAINERS, kinds=["llama"]),
    ]  # fmt: skip
    return run(4, cases, tmp_path_factory.mktemp("four") / "run")
