"""The command line: ``ella demo | run | inspect | fold | export | plan | bench``."""

from __future__ import annotations

import argparse
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

__all__ = ["build_parser", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; exit status: 0 done, 1 refused input or a failed run (said on stderr), 2 wrong usage, 130 ^C."""
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    # Where bitsandbytes is installed, importing PEFT makes it report an optional CPU kernel as missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # A file name may hold bytes that the terminal's encoding has no character for.
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return arguments.command(arguments) or 0
    except (ValueError, TypeError, OSError, ImportError, SafetensorError) as error:
        if arguments.traceback:
            raise
        print(f"ella: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("ella: stopped; --resume (demo) or the same command (run) continues", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; heavy imports happen only when one runs."""
    parser = argparse.ArgumentParser(prog="ella", description="Continual learning with LoRA that forgets less.")
    parser.add_argument("--traceback", action="store_true", help="show the whole traceback of an error")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="learn real text tasks one after another, three ways, and report")
    demo.add_argument("--data", metavar="DIR", help="benchmark folder <group>/<task>/*.json (default: installed code)")
    demo.add_argument("--order", type=_names, help="task names, comma-separated (with --data)")
    demo.add_argument("--seeds", type=_integers, default=(0,), help="comma-separated, or a-b (default 0)")
    demo.add_argument("--train-examples", type=_positive, metavar="N", help="per task (1000 with --data, else 280)")
    demo.add_argument("--test-examples", type=_positive, metavar="N", help="per task (300 with --data, else 40)")
    demo.add_argument(
        "--ella-lambda", type=_strength, default="auto", metavar="X", help="of the penalty (default auto)"
    )
    demo.add_argument(
        "--arms",
        type=_names,
        default=("seqlora", "inclora", "ella"),
        help="see docs/continual.md (default seqlora,inclora,ella)",
    )
    demo.add_argument("--resume", action="store_true", help="continue an interrupted demo in --out")
    demo.set_defaults(command=_demo)

    run = commands.add_parser("run", help="continual runs described by a yaml file: arms, orders and seeds")
    run.add_argument("stream", metavar="STREAM.yaml")
    run.add_argument(
        "--jobs", type=_positive, default=1, metavar="N", help="runs at a time, each a process (default 1)"
    )
    run.add_argument("--only", type=_names, metavar="ARMS", help="run and report these arms only, comma-separated")
    run.add_argument("--seeds", type=_integers, help="instead of the file's: comma-separated, or a-b")
    run.add_argument("--orders", type=_names, help="of the file's orders these only, comma-separated")
    run.add_argument("--data", metavar="DIR", help="benchmark folder, instead of the file's")
    run.set_defaults(command=_run)

    for sub, out in ((demo, "demo_out"), (run, None)):
        sub.add_argument("--out", metavar="DIR", default=out, help=f"output folder (default {out or 'from the file'})")
        sub.add_argument("--threads", type=_positive, metavar="N", help="CPU threads (default: PyTorch's)")
        sub.add_argument("--quiet", action="store_true", help="no progress bars")

    inspect = commands.add_parser("inspect", help="show a saved state: layers, rank, energy kept, bytes, tasks")
    inspect.add_argument("state", metavar="DIR", help="a saved regularizer, or a run's output folder")
    inspect.set_defaults(command=_inspect)

    fold = commands.add_parser("fold", help="fold saved LoRA adapters into one past, without a model")
    fold.add_argument("adapters", nargs="+", metavar="DIR", help="PEFT adapter folders, in task order")
    fold.add_argument("-o", "--out", required=True, metavar="DIR")
    fold.add_argument("--past-rank", type=_positive, default=128, metavar="N", help="cap of the rank (default 128)")
    fold.set_defaults(command=_fold)

    export = commands.add_parser("export", help="finished and current tasks of a saved state as one plain LoRA adapter")
    export.add_argument("state", metavar="DIR", help="what a regularizer, PEFT, a trainer or `ella fold` saved")
    export.add_argument("-o", "--out", required=True, metavar="OUT")
    export.add_argument("--rank", type=_positive, metavar="N", help="cap of the rank (default: all that is needed)")
    export.set_defaults(command=_export)

    _add_plan(commands)

    bench = commands.add_parser("bench", help="the microbenchmark suite (from a source checkout)")
    bench.add_argument(
        "--compare", nargs=2, metavar=("BEFORE.json", "AFTER.json"), help="ratio per row of two results files"
    )
    bench.set_defaults(command=_bench)
    return parser


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser("plan", help="bytes, operations, collectives and time of a step, from a config alone")
    plan.add_argument("model", metavar="MODEL_CONFIG", help="a preset, a folder with config.json, a json, a hub name")
    plan.add_argument("--targets", default="all-linear", metavar="T", help="names, comma-separated, or a regex")
    plan.add_argument("--target-parameters", type=_names, metavar="P", help="expert parameters, comma-separated")
    plan.add_argument("--rank", type=_positive, default=16, metavar="R")
    plan.add_argument("--past-rank", type=_positive, default=128, metavar="N", help="cap of the stored past")
    plan.add_argument("--penalty-rank", type=_count, metavar="N", help="components the penalty uses (default: all)")
    plan.add_argument("--penalty", choices=("hadamard", "spectral", "importance"), default="hadamard")
    plan.add_argument("--keep-past", choices=("adapter", "merge", "external"), default="adapter")
    plan.add_argument("--tasks", type=_count, metavar="N", help="finished ones (default: as many as fill the past)")
    plan.add_argument("--base", choices=("bfloat16", "float16", "float32", "nf4"), default="bfloat16")
    plan.add_argument("--engine", choices=("one", "ddp", "fsdp2", "zero2", "zero3"), help="default: fsdp2, or one")
    plan.add_argument("--gpus", type=_positive, default=1, metavar="N")
    plan.add_argument("--gpu", default="H100", help="A100, H100, H200, B200 or MI300X (default H100)")
    plan.add_argument("--tokens", type=_positive, default=4096, metavar="N", help="a step, on one GPU (default 4096)")
    plan.add_argument("--no-recomputation", action="store_true", help="no activation checkpointing")
    plan.add_argument("--json", action="store_true", help="everything as json")
    plan.set_defaults(command=_plan)


def _demo(arguments: argparse.Namespace) -> None:
    from ella.continual.demo import BENCHMARK_ORDER, run_demo
    from ella.continual.workers import prepare_process

    if arguments.order and not arguments.data:
        raise ValueError("--order names tasks of a benchmark folder; give it with --data DIR")
    prepare_process(arguments.threads)
    run_demo(
        data=arguments.data,
        order=arguments.order or BENCHMARK_ORDER,
        seeds=arguments.seeds,
        train_examples=arguments.train_examples,
        test_examples=arguments.test_examples,
        ella_lambda=arguments.ella_lambda,
        arms=arguments.arms,
        out_dir=arguments.out,
        resume=arguments.resume,
        progress=not arguments.quiet,
    )


def _run(arguments: argparse.Namespace) -> None:
    from ella.continual.compare import run_cells
    from ella.continual.spec import load_spec
    from ella.continual.workers import prepare_process

    spec = load_spec(arguments.stream).chosen(arguments.only, arguments.seeds, arguments.data, arguments.orders)
    prepare_process(arguments.threads)
    cells = spec.cells()
    for order, names in spec.loaded.left_out.items():
        if names:
            print(f"{order or 'tasks'}: without {', '.join(names)}, which {spec.tasks.benchmark} does not have")
    run_cells(
        spec,
        cells,
        out_dir=arguments.out or spec.out,
        title=spec.title,
        notes={"stream": str(arguments.stream), **spec.notes()},
        jobs=arguments.jobs,
        threads=arguments.threads,
        report_to=spec.report_to,
        progress=not arguments.quiet,
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from ella.inspection import describe_state

    print(describe_state(arguments.state))


def _fold(arguments: argparse.Namespace) -> None:
    from ella.offline import fold_adapters

    reports = fold_adapters(arguments.adapters, arguments.out, past_rank=arguments.past_rank)
    for report in reports:
        ranks = report.ranks.values()
        print(f"{report.task}: rank {min(ranks)} to {max(ranks)}, relative error {report.max_relative_error:.1e}")
    print(f"{len(reports)} adapters, {len(reports[-1].ranks)} layers folded into {arguments.out}")


def _export(arguments: argparse.Namespace) -> None:
    from ella.offline import export_state

    report = export_state(arguments.state, arguments.out, rank=arguments.rank)
    print(f"{arguments.out}: {report}")


def _plan(arguments: argparse.Namespace) -> None:
    import json

    from peft import LoraConfig

    from ella.config import EllaConfig
    from ella.planning import make_plan
    from ella.planning.describe import describe_plan

    targets = arguments.targets
    if targets != "all-linear" and re.fullmatch(r"[\w.,\s]+", targets):
        targets = list(_names(targets))
    lora = LoraConfig(r=arguments.rank, target_modules=targets, target_parameters=arguments.target_parameters)
    ella = EllaConfig(
        penalty=arguments.penalty,
        past_rank=arguments.past_rank,
        penalty_rank=arguments.penalty_rank,
        keep_past=arguments.keep_past,
    )
    plan = make_plan(
        arguments.model,
        lora,
        ella,
        base=arguments.base,
        engine=arguments.engine,
        gpus=arguments.gpus,
        gpu=arguments.gpu,
        tokens=arguments.tokens,
        tasks=arguments.tasks,
        is_recomputed=not arguments.no_recomputation,
    )
    print(json.dumps(plan.to_dict(), indent=2) if arguments.json else describe_plan(plan))


def _bench(arguments: argparse.Namespace) -> int:
    folder = Path(__file__).resolve().parents[1] / "bench"
    if not (folder / "compare.py").is_file():
        raise ValueError("the benchmarks are not part of the installed package; run this from a source checkout")
    if arguments.compare is None:
        print(f"the suite lives in {folder}; run `make bench` (minutes) or `make bench-full` in {folder.parent}")
        return 0
    # A process of its own: the package never imports the suite.
    files = [str(Path(name).resolve()) for name in arguments.compare]
    return subprocess.run([sys.executable, "-m", "bench.compare", *files], cwd=folder.parent, check=False).returncode


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise argparse.ArgumentTypeError(f"expected comma-separated names, found {text!r}")
    return names


def _integers(text: str) -> tuple[int, ...]:
    try:
        first, dash, last = text.partition("-")
        values: Sequence[int] = range(int(first), int(last) + 1) if dash else [int(part) for part in text.split(",")]
    except ValueError:
        values = ()
    if not values:
        raise argparse.ArgumentTypeError(f"expected integers like 0,1,2 or 0-2, found {text!r}")
    return tuple(values)


def _strength(text: str) -> float | str:
    try:
        return text if text == "auto" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number or auto, found {text!r}") from None


def _positive(text: str) -> int:
    return _count(text, least=1)


def _count(text: str, least: int = 0) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, found {text!r}")
    return value
