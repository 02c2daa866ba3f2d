"""Configuration of the suite, apart from the tests: options, machine, row sink, replay into pytest-benchmark."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from . import measure
from .measure import Samples
from .report import Sink, write_reports
from .rows import Limits, Row, measure_case


class Replay:
    """A clock that has already run: hands measured samples to pytest-benchmark through its public ``timer`` option.

    pytest-benchmark times one function at a time; ours are timed interleaved, all providers of a case together.
    """

    def __init__(self):
        self.now, self.pending = 0.0, []

    def __call__(self) -> float:
        return self.now

    def advance(self) -> None:
        if self.pending:
            self.now += self.pending.pop(0)


REPLAY = Replay()


def pytest_addoption(parser):
    group = parser.getgroup("ella bench")
    group.addoption("--full", action="store_true", help="all cases, long budgets (make bench-full)")
    group.addoption("--out", default="bench_out", help="folder of results.json, results.csv, report.md and plots")
    group.addoption("--threads", type=int, default=measure.THREADS, help="CPU threads, pinned (default 2)")
    group.addoption("--device", choices=("auto", "cpu", "cuda"), default="auto")


def pytest_configure(config):
    measure.pin_threads(config.getoption("--threads"))
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    config.ella_device = device


def pytest_report_header(config):
    return f"ella bench: device {config.ella_device}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}"


def pytest_collection_modifyitems(config, items):
    long = [item for item in items if _is_long(item) and not config.getoption("--full")]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in set(long)]
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=REPLAY, group=_group(item)))


def _is_long(item) -> bool:
    """Whether the item's case belongs to ``make bench-full`` alone."""
    params = getattr(item, "callspec", None)
    return params is not None and not getattr(params.params.get("case"), "short", True)


def _group(item) -> str:
    params = getattr(item, "callspec", None)
    if params is None:
        return item.originalname
    case, mode = params.params.get("case"), params.params.get("mode", "")
    return f"{item.originalname}: {getattr(case, 'name', case)} {mode}".rstrip()


@pytest.fixture(scope="session")
def device(request) -> str:
    return request.config.ella_device


@pytest.fixture(scope="session")
def full(request) -> bool:
    return request.config.getoption("--full")


@pytest.fixture(scope="session")
def sink(request, device):
    """Where rows go: kept on disk one by one, made into reports at the end, whatever stopped the run."""
    out = Path(request.config.getoption("--out"))
    sink = Sink(out, measure.machine(device) | {"full": request.config.getoption("--full")})
    yield sink
    for path in write_reports(sink.results(), out):
        print(f"\nwrote {path}", end="")
    print()


@pytest.fixture(scope="session")
def limits(sink, full) -> Limits:
    rates = sink.machine["copy_bytes_per_s"], sink.machine["matmul_flops_per_s"]
    return Limits(30.0, 120.0, *rates) if full else Limits(2.5, 2.0, *rates)


@pytest.fixture(scope="session")
def measured(request, limits, device):
    """Measures a case once for all the providers selected for it, and remembers it while they are reported."""
    last: dict = {}

    def measured(bench, case, mode, **options):
        key = (bench, case.name, mode)
        if last.get("key") != key:
            last.clear()
            names = [
                item.callspec.params["provider"]
                for item in request.session.items
                if item.originalname == f"bench_{bench}"
                and (item.callspec.params["case"], item.callspec.params["mode"]) == (case, mode)
            ]
            last.update(key=key, rows=measure_case(bench, case, mode, names, limits, device, **options))
        return last["rows"]

    return measured


@pytest.fixture
def report(sink, benchmark):
    """Records one row: to disk, to pytest-benchmark; skips with the row's reason, fails where the row is red."""

    def report(row: Row, samples=None):
        sink.add(row)
        benchmark.extra_info.update({k: v for k, v in row.as_dict().items() if v is not None})
        if row.failed:
            pytest.fail(f"{row.case}, {row.mode}, {row.provider}: {row.reason}", pytrace=False)
        if row.reason:
            pytest.skip(row.reason)
        REPLAY.pending = list(samples.seconds) if samples else []
        benchmark.pedantic(REPLAY.advance, rounds=max(1, len(REPLAY.pending)))

    return report


@pytest.fixture
def report_all(sink, request):
    """Records all rows of a case as one test; pytest-benchmark shows the last timed one of ours. Fails on a red row."""

    def report_all(found: Mapping[str, tuple[Row, Samples | None]]):
        for row, _ in found.values():
            sink.add(row)
        failed = [f"{row.case}, {row.provider}: {row.reason}" for row, _ in found.values() if row.failed]
        if failed:
            pytest.fail("; ".join(failed), pytrace=False)
        timed = [(row, samples) for row, samples in found.values() if samples and row.provider.startswith("ours")]
        if timed:
            row, samples = timed[-1]
            benchmark = request.getfixturevalue("benchmark")
            benchmark.extra_info.update(provider=row.provider, case=row.case)
            REPLAY.pending = list(samples.seconds)
            benchmark.pedantic(REPLAY.advance, rounds=len(REPLAY.pending))

    return report_all
