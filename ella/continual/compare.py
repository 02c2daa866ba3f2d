"""A grid of runs, arms by orders by seeds: each run once, wherever it was stopped, and one report of them all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from tqdm.auto import tqdm

from ella.atomic import make_folder, write_text_atomically

from .arms import arm_class
from .classifier import TextClassifier
from .environment import environment
from .general import General, check_general
from .report import render_text, title_of, write_report
from .running import one_run
from .state import StreamState, completed
from .stream import StreamConfig, StreamResult, run_stream, training_settings
from .tasks import AnyTask
from .tracking import Tracker, check_integrations, make_stores
from .workers import Failure, in_processes, prepare_process

__all__ = ["Cell", "CellsFailed", "Source", "check_arms", "check_cells", "compare_arms", "run_cells", "share_alone"]

#: What is wrong with a whole file system: no other run could be written either.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
TRACEBACK = "traceback.txt"
FIRST = "first"


@dataclass(frozen=True)
class Cell:
    """One run of a grid: ``config`` says method, label, settings, order and seed; ``tasks`` are names, in order."""

    config: StreamConfig
    tasks: tuple[str, ...]

    @property
    def name(self) -> str:
        """``<order>-<label>-<seed>``, without an order that has no name, fit to be a folder's."""
        parts = (self.config.order, self.config.name, str(self.config.seed))
        return "-".join(_file_name(part) for part in parts if part)

    def folder(self, out_dir: str | Path) -> Path:
        """Where the state of the run is kept."""
        return Path(out_dir) / "runs" / self.name


class Source(Protocol):
    """What cells are run with; picklable where several processes are asked for."""

    def build(self) -> TextClassifier:
        """A fresh classifier."""

    def tasks_of(self, cell: Cell) -> Sequence[AnyTask]:
        """The tasks of a cell with their examples, in order."""


class CellsFailed(ValueError):
    """Some runs of a grid failed, all others are done; the message names them."""


@dataclass(frozen=True)
class _Given:
    """A :class:`Source` made of functions."""

    make: Callable[[], TextClassifier]
    of_seed: Mapping[int, list[AnyTask]]

    def build(self) -> TextClassifier:
        return self.make()

    def tasks_of(self, cell: Cell) -> Sequence[AnyTask]:
        return self.of_seed[cell.config.seed]


def compare_arms(
    build: Callable[[], TextClassifier],
    tasks_of_seed: Callable[[int], Sequence[AnyTask]],
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
    """Run every arm with every seed and write ``report.html``, ``report.md`` and ``report.json`` into ``out_dir``.

    Args:
        build: makes a fresh classifier; called once per run.
        tasks_of_seed: the tasks of a seed, the same for all arms.
        config: what the arms share; ``arm`` and ``seed`` are replaced.
        arms, seeds: what to run, in this order.
        out_dir: the runs' states go to ``out_dir/runs/<arm>-<seed>``; a finished one is not run again.
        title, notes, resume, progress, echo: see :func:`run_cells`.

    Returns one result per arm and seed. Raises ValueError for no, unknown or repeated arms and seeds, and as
    :func:`run_cells` does.
    """
    check_arms(arms, seeds)
    source = _Given(build, {seed: list(tasks_of_seed(seed)) for seed in seeds})
    cells = [
        Cell(replace(config, arm=arm, seed=seed), tuple(task.name for task in tasks))
        for seed, tasks in source.of_seed.items()
        for arm in arms
    ]
    return run_cells(
        source, cells, out_dir=out_dir, title=title, notes=notes, resume=resume, progress=progress, echo=echo
    )


def run_cells(
    source: Source,
    cells: Sequence[Cell],
    *,
    out_dir: str | Path,
    title: str,
    notes: Mapping[str, str],
    jobs: int = 1,
    threads: int | None = None,
    report_to: Sequence[str] = (),
    resume: bool = True,
    progress: bool = True,
    echo: Callable[[str], None] = print,
) -> list[StreamResult]:
    """Run all cells and write their report into ``out_dir``, anew after each.

    Args:
        source: what they are run with.
        cells: what to run, in this order.
        out_dir: a run's state goes to ``out_dir/runs/<its name>``; a finished one is not run again. First tasks
            are kept in ``out_dir/first`` for all methods that begin alike.
        title, notes: shown in the report.
        jobs: processes; 1 runs all in this one.
        threads: of all processes together; None is what PyTorch has here.
        report_to: integrations of transformers that are told losses and scores, see :mod:`ella.continual.tracking`.
        resume: False forgets earlier states of these runs first.
        progress, echo: tqdm bars, in this process only; where text goes.

    Returns the results in the order of ``cells``.

    Raises:
        CellsFailed: at the end, when a run failed; its traceback is in its folder.
        ValueError, ImportError: no cells, two of one name, an unknown or a missing integration, no lm-eval where it is
            asked for, before anything runs.
        OSError: another process is running in ``out_dir``, or nothing can be written there; MLflow cannot be told.
    """
    check_cells(cells)
    check_integrations(report_to)
    for cell in cells:
        check_general(cell.config.general)
    make_stores(report_to)
    with one_run(out_dir):
        if not resume:
            for cell in cells:
                StreamState(cell.folder(out_dir), {}).clear()
            for folder in (Path(out_dir) / FIRST).glob("*"):
                StreamState(folder, {}).clear()
        grid = _Grid(source, cells, Path(out_dir), title, notes, list(report_to), progress, echo)
        grid.run(min(jobs, len(cells)), threads)
        return grid.finish()


class _Grid:
    """The cells of one call: what has become of each."""

    def __init__(
        self,
        source: Source,
        cells: Sequence[Cell],
        out_dir: Path,
        title: str,
        notes: Mapping[str, str],
        report_to: list[str],
        progress: bool,
        echo: Callable[[str], None],
    ) -> None:
        self.source, self.cells, self.out_dir, self.report_to = source, cells, out_dir, report_to
        self.title, self.notes, self.progress, self.echo = title, notes, progress, echo
        self.jobs = 1
        self.done: dict[int, StreamResult] = {}
        self.failed: dict[int, Failure] = {}
        self.untrained: dict[tuple[str, int], list[float] | None] = {}
        self.general: dict[General, dict[str, float]] = {}
        self.paths: Sequence[Path] = ()
        self.started = time.perf_counter()

    def run(self, jobs: int, threads: int | None) -> None:
        self.jobs = jobs
        if jobs > 1:
            import torch

            share = max(1, (threads or torch.get_num_threads()) // jobs)
            outcomes = in_processes(_worker, (self.source, share, self.report_to), self._items(), jobs)
        else:
            outcomes = self._here()
        with closing(outcomes):
            for index, outcome in outcomes:
                if isinstance(outcome, Failure):
                    self._fail(index, outcome)
                else:
                    self._finish(index, outcome)

    def _items(self) -> Iterator[_Item]:
        """Drawn one by one, each with what is known of its order and seed by then."""
        for cell in self.cells:
            config = cell.config
            # Before training every run has the same model.
            general = self.general.get(config.general) if config.general else None
            yield cell, cell.folder(self.out_dir), self.untrained.get((config.order, config.seed)), general

    def _here(self) -> Generator[tuple[int, StreamResult | Failure]]:
        # The model is that of all cells: if it cannot be made, nothing can be run.
        first = [self.source.build()]

        def build() -> TextClassifier:
            return first.pop() if first else self.source.build()

        for index, item in enumerate(self._items()):
            outcome: StreamResult | Failure
            try:
                outcome = _run_cell(self.source, item, build, self.report_to, self.progress)
            except Exception as error:
                outcome = Failure.of(error)
            yield index, outcome

    def _finish(self, index: int, result: StreamResult) -> None:
        cell = self.cells[index]
        self.done[index] = result
        self.untrained[cell.config.order, cell.config.seed] = result.matrix.untrained
        if cell.config.general and "before" in result.general:
            self.general[cell.config.general] = result.general["before"]
        (cell.folder(self.out_dir) / TRACEBACK).unlink(missing_ok=True)
        self._say(cell, _scores(result))
        self.paths = write_report(self.out_dir, self.results(), title=self.title, notes=self.notes, env=environment())

    def _fail(self, index: int, failure: Failure) -> None:
        if failure.code in FULL:
            raise OSError(failure.error)
        cell = self.cells[index]
        self.failed[index] = failure
        folder = cell.folder(self.out_dir)
        make_folder(folder)
        write_text_atomically(folder / TRACEBACK, failure.traceback or failure.error)
        self._say(cell, f"failed: {failure.error}")

    def _say(self, cell: Cell, text: str) -> None:
        clock = time.perf_counter() - self.started
        order = f", {cell.config.order}" if cell.config.order else ""
        ended, n = len(self.done) + len(self.failed), len(self.cells)
        left = f"; {ended} of {n}{self._time_left(n - ended)}" if n > 1 else ""
        self.echo(f"[{clock:4.0f} s] {title_of(cell.config.name)}{order}, seed {cell.config.seed}: {text}{left}")

    def _time_left(self, cells: int) -> str:
        if not self.done or not cells:
            return ""
        # As recorded: one that was finished before counts with the time it took then.
        mean = math.fsum(result.seconds for result in self.done.values()) / len(self.done)
        return f", about {_duration(mean * math.ceil(cells / self.jobs))} left"

    def results(self) -> list[StreamResult]:
        """What is done, in the cells' order, each with the scores of training alone where those are known."""
        share_alone(list(self.done.values()))
        return [self.done[index] for index in sorted(self.done)]

    def finish(self) -> list[StreamResult]:
        results = self.results()
        if results:
            self.echo("\n" + render_text(results))
            page, data, *others = self.paths[1], self.paths[0], *self.paths[2:]
            self.echo("\n        ".join([f"report: {page}", str(data), *map(str, others)]))
        if self.failed:
            lines = [
                f"  {self.cells[i].name}: {failure.error} (see {self.cells[i].folder(self.out_dir) / TRACEBACK})"
                for i, failure in sorted(self.failed.items())
            ]
            told = f"{len(self.failed)} of {len(self.cells)} runs failed; the same command tries them again"
            raise CellsFailed("\n".join([told, *lines]))
        return results


#: A cell, its folder, and where they are known the scores before training, of the tasks and of general ability.
_Item = tuple[Cell, Path, Sequence[float] | None, Mapping[str, float] | None]


def _run_cell(
    source: Source, item: _Item, build: Callable[[], TextClassifier], report_to: Sequence[str], progress: bool
) -> StreamResult:
    cell, folder, untrained, general_before = item
    with Tracker(report_to, folder, cell.name) if report_to else nullcontext() as tracker:
        return run_stream(
            build(),
            source.tasks_of(cell),
            cell.config,
            folder,
            untrained=untrained,
            general_before=general_before,
            first_dir=folder.parents[1] / FIRST,
            progress=progress,
            tracker=tracker,
        )


def _worker(source: Source, threads: int, report_to: Sequence[str]) -> Callable[[_Item], StreamResult]:
    """What a process of several does with a cell; no bars, which would be written over each other."""
    prepare_process(threads)
    if report_to:
        # How a stopped command ends its processes; integrations are to hear of it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    tqdm.set_lock(threading.RLock())  # its default is a semaphore, which a process that is ended leaves behind
    return lambda item: _run_cell(source, item, source.build, report_to, progress=False)


def share_alone(results: Sequence[StreamResult]) -> None:
    """Give all results the scores of training alone that one of the same order, seed and training settings has."""

    plain = StreamConfig().to_dict()  # for what a run saved earlier lacks

    def key(result: StreamResult) -> tuple[str, int, str]:
        training = json.dumps(training_settings(completed(result.config, plain)), sort_keys=True)
        return result.config["order"], result.seed, training

    alone = {
        key(result): [row[j] for j, row in enumerate(result.matrix.rows)]
        for result in results
        if result.config["arm"] == "alone"
    }
    for result in results:
        result.matrix.alone = alone.get(key(result))


def _file_name(text: str) -> str:
    """``text`` itself where any file system takes it, else what it takes of it and a hash."""
    safe = re.sub(r"^\.|[^A-Za-z0-9_.=+-]+", "_", text)[:80]
    if safe == text:
        return text
    return f"{safe}.{hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:6]}"


def check_cells(cells: Sequence[Cell]) -> None:
    """Raises ValueError for no cells, and for two whose states would lie in one folder."""
    if not cells:
        raise ValueError("no runs: expected at least one arm, order and seed")
    found: dict[str, Cell] = {}
    for cell in cells:
        # Some file systems know no case.
        other = found.setdefault(cell.name.lower(), cell)
        if other is not cell:
            told = " and ".join(f"({c.config.order!r}, {c.config.name!r}, {c.config.seed})" for c in (other, cell))
            raise ValueError(f"the runs (order, label, seed) {told} would share the folder {cell.name}; rename one")


def check_arms(arms: Sequence[str], seeds: Sequence[int]) -> None:
    """Raises ValueError for no, unknown or repeated arms, and for no or repeated seeds."""
    distinct = {"arms": len({arm_class(arm) for arm in arms}), "seeds": len(set(seeds))}
    for name, values in (("arms", arms), ("seeds", seeds)):
        if not values or distinct[name] != len(values):
            raise ValueError(f"{name} must be at least one and distinct, found {list(values)}")


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _scores(result: StreamResult) -> str:
    matrix = result.matrix
    if result.config["arm"] == "alone":
        own = [row[j] for j, row in enumerate(matrix.rows)]
        return f"mean accuracy {math.fsum(own) / len(own):.1f}"
    # One task, or all at once: there is nothing before.
    bwt = matrix.backward_transfer()
    return f"OA {matrix.overall_accuracy():.1f}" + ("" if math.isnan(bwt) else f", BWT {bwt:+.1f}")
