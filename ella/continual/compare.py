"""Several arms and seeds over the same tasks, printed side by side and written as one report."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .arms import arm_class
from .models import TextClassifier
from .report import environment, format_bytes, format_matrix, summarise, title_of, write_report
from .running import one_run
from .state import StreamState
from .stream import StreamConfig, StreamResult, run_stream
from .tasks import Task

__all__ = ["check_arms", "compare_arms", "run_folder"]


def compare_arms(
    build: Callable[[], TextClassifier],
    tasks_of_seed: Callable[[int], Sequence[Task]],
    config: StreamConfig,
    *,
    arms: Sequence[str],
    seeds: Sequence[int],
    out_dir: str | Path,
    title: str,
    notes: Mapping[str, str],
    resume: bool = True,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> list[StreamResult]:
    """Run every arm with every seed and write ``report.html`` and ``report.json`` into ``out_dir``.

    Args:
        build: makes a fresh classifier; called once per run.
        tasks_of_seed: the tasks of a seed, the same for all arms.
        config: what the arms share; ``arm`` and ``seed`` are replaced.
        arms, seeds: what to run, in this order.
        out_dir: the runs' states go to ``out_dir/runs/<arm>-<seed>``; a finished one is not run again.
        title, notes: shown in the report.
        resume: False forgets earlier states of these arms and seeds first.
        progress, echo: tqdm bars; where text goes.

    Returns one result per arm and seed. Raises ValueError for no, unknown or repeated arms and seeds, OSError when
    another process is running in ``out_dir`` or nothing can be written there.
    """
    check_arms(arms, seeds)
    with one_run(out_dir):
        if not resume:
            for arm in arms:
                for seed in seeds:
                    StreamState(run_folder(out_dir, arm, seed), {}).clear()
        return _compare(build, tasks_of_seed, config, arms, seeds, out_dir, title, notes, progress, echo)


def _compare(
    build: Callable[[], TextClassifier],
    tasks_of_seed: Callable[[int], Sequence[Task]],
    config: StreamConfig,
    arms: Sequence[str],
    seeds: Sequence[int],
    out_dir: str | Path,
    title: str,
    notes: Mapping[str, str],
    progress: bool,
    echo: Callable[[str], None],
) -> list[StreamResult]:
    results: list[StreamResult] = []
    started = time.perf_counter()
    for seed in seeds:
        tasks = list(tasks_of_seed(seed))
        untrained: list[float] | None = None
        of_seed = []
        for arm in arms:
            result = run_stream(
                build(),
                tasks,
                replace(config, arm=arm, seed=seed),
                run_folder(out_dir, arm, seed),
                untrained=untrained,
                progress=progress,
            )
            untrained = result.matrix.untrained
            of_seed.append(result)
            clock = time.perf_counter() - started
            echo(f"[{clock:4.0f} s] {title_of(arm)}, seed {seed}: {_scores(result)}")
        alone = next((r for r in of_seed if r.arm == "alone"), None)
        if alone is not None:
            scores = [row[j] for j, row in enumerate(alone.matrix.rows)]
            for result in of_seed:
                result.matrix.alone = scores
        results += of_seed
        # After every seed: what is done is on disk should a later one be stopped.
        paths = write_report(out_dir, results, title=title, notes=notes, env=environment())
    echo("\n" + render_text(results))
    echo(f"report: {paths[1]}\n        {paths[0]}")
    return results


def run_folder(out_dir: str | Path, arm: str, seed: int) -> Path:
    """Where the state of one run is kept."""
    return Path(out_dir) / "runs" / f"{arm}-{seed}"


def check_arms(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError for no, unknown or repeated arms, and for no or repeated seeds."""
    for arm in arms:
        arm_class(arm)
    for name, values in (("arms", arms), ("seeds", seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f"{name} must be at least one and distinct, found {list(values)}")


def _scores(result: StreamResult) -> str:
    matrix = result.matrix
    if result.arm == "alone":
        own = [row[j] for j, row in enumerate(matrix.rows)]
        return f"mean accuracy {math.fsum(own) / len(own):.1f}"
    bwt = "" if len(matrix.tasks) == 1 else f", BWT {matrix.backward_transfer():+.1f}"
    return f"OA {matrix.overall_accuracy():.1f}{bwt}"


def render_text(results: Sequence[StreamResult]) -> str:
    """The matrices and the summary of all arms as text for a terminal."""
    summary = summarise(results)
    blocks = [f"{title_of(arm)}\n{format_matrix(s['matrix'])}\n" for arm, s in summary.items() if arm != "alone"]
    if not blocks:
        return ""
    lines = [f"{'':24}{'OA':>8}{'BWT':>8}{'FWT*':>8}{'FWT**':>8}"]
    for arm, s in summary.items():
        if arm != "alone":
            cells = "".join(f"{'–' if math.isnan(v) else format(v, '.1f'):>8}" for v in s["mean"].values())
            lines.append(f"{title_of(arm):24}{cells}")
    lines.append("FWT*: against the untrained model; FWT**: against training on the task alone")
    if "ella" in summary:
        ella = summary["ella"]
        lines.append("")
        if not math.isnan(ella["penalty_share"]):
            lines.append(
                f"the penalty takes {100 * ella['penalty_share']:.1f} % of a {ella['step_milliseconds']:.0f} ms step"
            )
        lines.append(
            f"its state: {format_bytes(ella['state_bytes'])} for {ella['layers']} layers; "
            f"as dense float32 matrices {format_bytes(ella['dense_bytes'])}"
        )
    return "\n".join(blocks + lines) + "\n"
