"""`python -m tests.bench`: every figure beside its floor and its budget, as a table, JSON and a plot.

Each figure is measured in turn with its floor, in one run; `--only` measures some. A figure that cannot be
measured on this machine is named with the reason and ends the run with 1; one that misses its budget does not.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.bench import cost, fleet, freshness, recovery, scale, stack
from tests.bench.effort import TINY, Effort
from tests.bench.lab import Lab, opened_lab
from tests.bench.plot import draw_staleness
from tests.bench.programs import ROOT, BenchError
from tests.bench.report import Report

Measure = Callable[[Lab, Report, Effort, Console], Awaitable[None]]

#: In the order of measuring: what loads the machine with health checks comes last.
FIGURES: Final[dict[str, Measure]] = {
    "staleness": freshness.staleness,
    "burst": freshness.burst,
    "scale": scale.scale,
    "fleet": fleet.fleet,
    "flood": scale.flood,
    "replay": scale.replay,
    "startup": cost.startup,
    "recovery": recovery.recovery,
    "stack": stack.stack,
    "work": cost.engine_work,
    "idle": cost.idle,
}
#: Those that need real containers; the others make do with fake engines.
REAL_ENGINE: Final = frozenset({"staleness", "burst", "idle"})
RESULTS: Final = ROOT / ".cache" / "bench"


async def measure(
    names: Sequence[str],
    effort: Effort,
    console: Console,
    *,
    eventwatch_from: Path = ROOT,
    engine_url: str | None = None,
) -> Report:
    """Measure the named figures; what fails is on record in the report."""
    report = Report()
    try:
        async with opened_lab(
            eventwatch_from=eventwatch_from, engine_url=engine_url, real_engine=not REAL_ENGINE.isdisjoint(names)
        ) as lab:
            await measure_in(lab, names, report, effort, console)
    except Exception as error:
        if not report.figures:
            raise
        report.failed["cleaning up"] = repr(error)
    return report


async def measure_in(lab: Lab, names: Sequence[str], report: Report, effort: Effort, console: Console) -> None:
    for name in names:
        began = time.monotonic()
        console.print(f"==> {name}", style="bold")
        try:
            await FIGURES[name](lab, report, effort, console)
        except (BenchError, TimeoutError) as error:
            report.failed[name] = str(error) or "something took too long"
        except Exception as error:  # noqa: BLE001 - the other figures are worth having all the same
            console.print(traceback.format_exc(), style="dim", highlight=False, markup=False)
            report.failed[name] = repr(error)
        console.print(f"  {time.monotonic() - began:.0f} s", style="dim")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help=f"rounds of each figure (default: {Effort.rounds})")
    parser.add_argument(
        "--only", action="append", choices=FIGURES, metavar="NAME", help=f"one of {', '.join(FIGURES)}; repeatable"
    )
    parser.add_argument("--json", type=Path, default=RESULTS / "bench.json", metavar="FILE")
    parser.add_argument("--plot", type=Path, default=RESULTS / "staleness.png", metavar="FILE")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see whether the benchmark works")
    parser.add_argument(
        "--eventwatch", type=Path, default=ROOT, metavar="FOLDER", help="measure the eventwatch package found here"
    )
    parser.add_argument("--engine", metavar="URL", help="measure on this engine (default: one of the run's own)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    effort = TINY if options.tiny else Effort()
    if options.rounds:
        effort = dataclasses.replace(effort, rounds=options.rounds)
    began = time.monotonic()
    names = options.only or list(FIGURES)
    report = asyncio.run(
        measure(names, effort, console, eventwatch_from=options.eventwatch.resolve(), engine_url=options.engine)
    )
    report.print(console)
    report.write_json(options.json)
    console.print(f"JSON: {options.json}", highlight=False)
    if report.staleness:
        draw_staleness(report.staleness, options.plot)
        console.print(f"plot: {options.plot}", highlight=False)
    console.print(f"measured in {time.monotonic() - began:.0f} s")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
