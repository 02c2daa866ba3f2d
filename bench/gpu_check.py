"""Everything there is to find out on a GPU, in one command and under ten minutes.

    python -m bench.gpu_check               # needs torch and triton, and no network
    python -m bench.gpu_check --dry-run     # the same stages on the CPU: kernels interpreted, nothing timed

Versions and the accumulator's rounding first, then a step on LLaMA's q and v with its errors, then dense ways beside
it, correctness of every kernel against float64, further cases, and the memory sanitizer last. Every stage is a process
of its own; every row is a line of gpu_check.jsonl as soon as it is known, so whatever ends the run loses none. What
processes print is in gpu_check.log; gpu_<device>.json, rewritten after every stage, is what the README is made from.
The folder is --output, else $OUT, else bench/results.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["collect", "emit", "main", "output_folder", "run_group", "run_stage", "run_stages", "summary"]

# The last stage is killed here; a command on a lent GPU may take 600.
SECONDS = 560.0
RESULTS = Path(__file__).parent / "results"
LAST = "sanitizer"


def output_folder(chosen: Path | None, environment: Mapping[str, str]) -> Path:
    """``--output``, else ``$OUT``, else bench/results."""
    return chosen or Path(environment.get("OUT") or RESULTS)


def emit(path: Path, row: Mapping) -> None:
    """Append a row to the file, out of this process's hands when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict]:
    """Every whole line of the file; a process that is killed may leave a part of one."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def run_group(command: Sequence[str], seconds: float, log: Path, environment: Mapping[str, str] | None = None):
    """Run a command in a process group of its own and kill the whole group after ``seconds``.

    Returns:
        Its exit status, or None if it was killed.
    """
    with log.open("a", encoding="utf-8") as output:
        # A group and not a session: who ends this program's session ends the stage too. Nothing has threads here.
        process = subprocess.Popen(
            list(command), stdout=output, stderr=subprocess.STDOUT, env=environment,
            preexec_fn=os.setpgrp,  # noqa: PLW1509
        )  # fmt: skip
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            # Also when the command itself has ended: what it left behind must not run beside the next stage.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_stage(name: str, run: Callable, path: Path, context, counts: Mapping[str, int] | None = None) -> bool:
    """In a stage's own process: write its rows as they come, and at the end one about the stage itself."""
    began = time.monotonic()
    outcome: dict = {"passed": True}
    try:
        for row in run(context):
            emit(path, {"stage": name} | row)
            outcome["passed"] &= row.get("passed") is not False
    except BaseException as error:
        lines = str(error).splitlines() or [""]
        outcome = {"passed": False, "failure": f"{type(error).__name__}: {lines[0][:300]}"}
        if not isinstance(error, Exception):
            raise
        import traceback

        traceback.print_exc()
    finally:
        row = {"stage": name, "kind": "stage", "seconds": round(time.monotonic() - began, 2)}
        emit(path, row | outcome | dict(counts or {}))
    return outcome["passed"]


def run_stages(
    stages: Mapping[str, float],
    command: Callable[[str], Sequence[str]],
    folder: Path,
    *,
    seconds: float = SECONDS,
    environment: Mapping[str, str] | None = None,
    after: Callable[[], object] = lambda: None,
) -> None:
    """Run every stage as a process; whatever happens to one is a row, and the next one runs.

    Args:
        stages: names, in order, and the seconds after which each is killed.
        command: what to run for a stage; it writes its rows itself.
        folder: holds gpu_check.jsonl and gpu_check.log.
        seconds: of the whole run; time for the sanitizer, the last stage, is set aside.
        after: called after every stage.
    """
    path, log = folder / "gpu_check.jsonl", folder / "gpu_check.log"
    deadline = time.monotonic() + seconds
    for name, limit in stages.items():
        left = deadline - time.monotonic() - (stages[LAST] if LAST in stages and name != LAST else 0.0)
        row = {"stage": name, "kind": "stage", "passed": None}
        if left < min(10.0, limit):
            emit(path, row | {"reason": "the run's time was over"})
            continue
        arguments = command(name)
        if not arguments:
            emit(path, row | {"reason": "compute-sanitizer is not installed"})
            continue
        with log.open("a", encoding="utf-8") as output:
            output.write(f"===== {name}\n")
        start, began = log.stat().st_size, time.monotonic()
        status = run_group(arguments, min(limit, left), log, environment)
        taken = round(time.monotonic() - began, 1)
        said = any(r["kind"] == "stage" for r in read_rows(path) if r.get("stage") == name)
        if status is None or (status != 0 and not said) or (name == LAST and status != 0):
            how = f"killed after {taken} s" if status is None else f"exit status {status}"
            tail = log.read_bytes()[start:].decode("utf-8", "replace")[-1500:]
            emit(path, row | {"passed": False, "failure": how, "seconds": taken, "output": tail})
        after()


def collect(path: Path, dry_run: bool, seconds: float) -> dict:
    """The rows as one dict, with what the README is made from: "machine" and "rows"."""
    rows = read_rows(path)
    kinds = {
        name: [r for r in rows if r["kind"] == kind]
        for name, kind in (
            ("versions", "versions"), ("machines", "machine"), ("probes", "probe"), ("rows", "time"),
            ("checks", "check"), ("kernels", "kernel"), ("stages", "stage"),
        )
    }  # fmt: skip
    machines, versions = kinds.pop("machines"), kinds.pop("versions")
    machine = {"name": "unknown", "date": time.strftime("%Y-%m-%d", time.gmtime())}
    for found in (*versions, *machines):
        machine |= {name: value for name, value in found.items() if name not in ("stage", "kind")}
    return {"dry_run": dry_run, "machine": machine, "seconds": seconds} | kinds


def failures(results: Mapping) -> list[str]:
    """What is not as it should be, a line each: checks, probes and stages that failed."""
    found = []
    for row in (*results["checks"], *results["probes"], *results["stages"]):
        if row.get("passed") is False:
            what = row.get("check") or row.get("what") or "the stage"
            why = row.get("failure") or f"error {max(row.get('value_error') or 0, row.get('grad_error') or 0):.1e}"
            found.append(f"{row['stage']}: {what}: {why}")
    return found


def _micros(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e6:.0f}"


def summary(results: Mapping) -> str:
    """A short table: how the accumulator rounds, a line for every stage, times in µs, and what failed."""
    lines = [f"{results['machine']['name']}, torch {results['machine'].get('torch')}"]
    for row in results["probes"]:
        if row["what"] == "tl.dot" and "between" in row:
            lines.append(
                f"accumulator of tl.dot {row['products']}, tile {row['tile']}: {row['between']} between steps, "
                f"{row['within']} within, bias {row['bias']:.1e}"
            )
    lines += ["", f"{'stage':<18} {'seconds':>7}  outcome"]
    for row in results["stages"]:
        outcome = {True: "passed", False: "FAILED", None: "not run"}[row["passed"]]
        built = f", {row['compiled']} kernels compiled, {row['from_cache']} cached" if "compiled" in row else ""
        lines.append(f"{row['stage']:<18} {row.get('seconds', '–'):>7}  {outcome}{built} {row.get('reason', '')}")
    times: dict[tuple, dict] = {}
    for row in results["rows"]:
        entry = times.setdefault((row["stage"], row["provider"]), {"error": row["error"], "why": row["reason"]})
        if row.get("median") is None:
            continue
        entry["graph" if row["graphed"] else "eager"] = row["median"]
        entry["host"] = row.get("host_seconds", entry.get("host"))
        for name in ("predicted", "ratio"):
            if row["graphed"] or name not in entry:
                entry[name] = row.get(name)
    lines += ["", f"{'µs a step':<18} {'way':<24} {'graph':>8} {'predicted':>11} {'eager':>8} {'host':>6} ratio error"]
    for (stage, way), entry in times.items():
        predicted = "–".join(_micros(bound) for bound in entry.get("predicted") or ())
        ratio = "" if entry.get("ratio") is None else f"{entry['ratio']:.1f}×"
        error = "" if entry["error"] is None else f"{entry['error']:.0e}"
        lines.append(
            f"{stage:<18} {way:<24} {_micros(entry.get('graph')):>8} {predicted:>11} {_micros(entry.get('eager')):>8} "
            f"{_micros(entry.get('host')):>6} {ratio:>5} {error:>5} {(entry['why'] or '')[:60]}"
        )
    for row in results["kernels"]:
        if row["seconds"] is not None:
            registers = [kernel["registers"] for kernel in row.get("compiled") or ()]
            lines.append(
                f"{row['stage']:<18} {row['kernel']:<28} {_micros(row['seconds'])} µs, registers {registers}, "
                f"predicted {row.get('registers_predicted')}"
            )
    failed = failures(results)
    lines += ["", *failed[:40], f"{len(failed)} failed" if failed else "every check passed"]
    return "\n".join(lines)


def _write(results: Mapping, folder: Path) -> Path:
    name = "dry_run" if results["dry_run"] else str(results["machine"]["name"])
    path = folder / f"gpu_{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.json"
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def _in_stage(name: str, path: Path, dry: bool) -> int:
    facts = next((row for row in read_rows(path) if row["kind"] == "machine"), None)
    if dry:
        # Before anything imports the kernels: they are decorated once.
        os.environ["TRITON_INTERPRET"] = "1"
        import torch

        torch.set_num_threads(1)
    from .gpu_stages import STAGES, count_compilations, open_context

    counts = count_compilations()
    return 0 if run_stage(name, STAGES[name].run, path, open_context(dry, facts), counts) else 1


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0 when every check passed, 1 when one did not, 2 when there is no GPU to check."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=__doc__.split("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, interpreted, no timing")
    parser.add_argument("--output", type=Path, help="folder; default $OUT, else bench/results; none for a dry run")
    parser.add_argument("--only", action="append", help="run stages whose name starts with this; repeatable")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of the whole run (default %(default)g)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.stage:
        return _in_stage(chosen.stage, chosen.rows, chosen.dry_run)
    import torch

    if not chosen.dry_run and not torch.cuda.is_available():
        print("no GPU here: nothing is measured and nothing is written; --dry-run checks this script on the CPU")
        return 2
    if chosen.dry_run and chosen.output is None and not os.environ.get("OUT"):
        with tempfile.TemporaryDirectory() as folder:
            return _run(chosen, Path(folder))
    folder = output_folder(chosen.output, os.environ)
    folder.mkdir(parents=True, exist_ok=True)
    return _run(chosen, folder)


def _run(chosen: argparse.Namespace, folder: Path) -> int:
    from .gpu_stages import STAGES, sanitizer

    began = time.monotonic()
    path = folder / "gpu_check.jsonl"
    path.unlink(missing_ok=True)
    (folder / "gpu_check.log").unlink(missing_ok=True)
    stages = {
        name: stage.seconds * (4 if chosen.dry_run else 1)
        for name, stage in STAGES.items()
        # The first one always: floors need the card's rates.
        if not chosen.only or name.startswith(("versions", *chosen.only))
    }
    tool = sanitizer()

    def command(name: str) -> list[str]:
        own = [sys.executable, "-m", "bench.gpu_check", "--stage", name, "--rows", str(path)]
        if chosen.dry_run:
            return [*own, "--dry-run"]
        if name != LAST:
            return own
        # Without the caching allocator every tensor is an allocation that the tool knows the end of.
        uncached = ["env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1"]
        return [*uncached, tool, "--tool", "memcheck", "--error-exitcode", "9", *own] if tool else []

    def after() -> None:
        _write(collect(path, chosen.dry_run, time.monotonic() - began), folder)
        print(f"{time.monotonic() - began:5.0f} s", json.dumps(read_rows(path)[-1])[:200], flush=True)

    environment = dict(os.environ) | {"PYTHONUNBUFFERED": "1"}
    # Ended from outside: the stage that is running goes too, and its rows stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        run_stages(
            stages, command, folder, seconds=chosen.seconds * (4 if chosen.dry_run else 1), environment=environment,
            after=after,
        )  # fmt: skip
    finally:
        results = collect(path, chosen.dry_run, time.monotonic() - began)
        written = _write(results, folder)
        print(f"{summary(results)}\nwritten to {written}", flush=True)
    return 1 if failures(results) else 0


if __name__ == "__main__":
    sys.exit(main())
