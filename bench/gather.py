"""One report of the runs of several: ``python -m bench.gather OUT REPORT.json ... [--orders A,B] [--seeds 0,1]``.

A grid that takes longer than a machine is had for is run in parts (``ella run --seeds``, ``--only``), each with a
report of its own. A run that several of them hold, of the same order, label and seed, is taken from the last.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ella.continual.compare import share_alone
from ella.continual.report import write_report
from ella.continual.state import completed, differences
from ella.continual.stream import StreamResult

__all__ = ["gather", "main"]

Key = tuple[str, str, int]


def gather(
    out: Path, paths: Sequence[Path], orders: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> list[StreamResult]:
    """Write the report of all runs in ``paths`` into the folder ``out``; returns them, by order, seed and label.

    ``orders`` and ``seeds`` choose some of them; None takes all.
    The title, notes and versions are those of the last; commands and machines those of all. Raises ValueError for runs
    of one order over other tasks, and for runs of one order and label with other settings.
    """
    reports = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    if not reports:
        raise ValueError("no reports: expected at least one report.json")
    found: dict[Key, StreamResult] = {}
    for path, report in zip(paths, reports, strict=True):
        for run in report["runs"]:
            result = StreamResult.from_dict(run)
            if (orders and result.config["order"] not in orders) or (seeds and result.seed not in seeds):
                continue
            # Older reports say of all runs together at which commit they were made.
            commit = report["environment"].get("commit")
            result.commits = result.commits or ([commit] if commit else [])
            found[result.config["order"], result.arm, result.seed] = result
            _check(found, result, path)
    if not found:
        raise ValueError(f"no runs of orders {orders} and seeds {seeds} in {[str(path) for path in paths]}")
    results = _sorted(found)
    share_alone(results)
    environments = [report["environment"] for report in reports]
    together = {
        # Where a part was written is of no interest once it is gathered.
        "command": _joined(re.sub(r" --out ('[^']*'|\S+)", "", env["command"]) for env in environments),
        "machine": _joined(env["machine"] for env in environments),
    }
    write_report(out, results, title=reports[-1]["title"], notes=reports[-1]["notes"], env=environments[-1] | together)
    return results


def _joined(texts: Iterable[str]) -> str:
    """Each once, whatever was joined before."""
    return "; ".join(dict.fromkeys(part for text in texts for part in text.split("; ")))


def _check(found: Mapping[Key, StreamResult], result: StreamResult, path: Path) -> None:
    """Only what may stand in one table."""
    for other in found.values():
        if other.config["order"] != result.config["order"]:
            continue
        if other.matrix.tasks != result.matrix.tasks:
            raise ValueError(f"{path}: {result.arm} ran over {result.matrix.tasks}, others over {other.matrix.tasks}")
        if other.arm != result.arm:
            continue
        # A field that is newer than a run is no difference.
        one, two = (config | {"seed": None} for config in (other.config, result.config))
        differing = differences(completed(one, two), completed(two, one))
        if differing:
            raise ValueError(f"{path}: {result.arm} is not of one setting: {'; '.join(differing)}")


def _sorted(found: Mapping[Key, StreamResult]) -> list[StreamResult]:
    orders, arms = ({key[i]: None for key in found} for i in (0, 1))
    places = [{name: place for place, name in enumerate(names)} for names in (orders, arms)]
    return [found[key] for key in sorted(found, key=lambda key: (places[0][key[0]], key[2], places[1][key[1]]))]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    parser.add_argument("--orders", type=lambda text: text.split(","))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")])
    given = parser.parse_args(arguments)
    results = gather(given.out, given.reports, given.orders, given.seeds)
    print(f"{given.out}: {len(results)} runs of {len(given.reports)} reports")


if __name__ == "__main__":
    main()
