"""What it costs to watch: at the start, when nothing happens, and for the engine.

CPU time and context switches are the kernel's own counts for the process. Idle is measured beside real containers
whose health checks run each second, over whole default sweep intervals, so that sweeps are in it. The engine's
work is what a fake engine with quiet nodes is asked, and the CPU time it spends on that.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from typing import Final

from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.lab import PATIENCE, Lab, in_turn
from tests.bench.programs import BenchError, Usage
from tests.bench.report import Budget, Figure, Report, Series

OURS: Final = "eventwatch"
POLL: Final = 0.005


async def startup(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """From the start of the process to a document that says what the first event said."""
    took: dict[str, list[float]] = defaultdict(list)

    async def measure(name: str) -> None:
        async with lab.fake_engine(10) as fake:
            place = lab.place(name, engine=fake)
            await lab.fill(place, await fake.truth())
            await fake.ask("POST", "greet", action="pause")
            began = time.monotonic()
            arguments = ("-m", "tests.bench.floor", "events")
            launch = (
                lab.launcher.eventwatch(place)
                if name == OURS
                else lab.launcher.python("floor", *arguments, environment=place.environment)
            )
            async with launch as program, lab.collection(place) as collection:
                while not await collection.count_documents({"status": "paused"}):
                    if program.process.returncode is not None or time.monotonic() > began + PATIENCE:
                        raise BenchError(f"{name} did not see the first event: {program.last_words()}")
                    await asyncio.sleep(POLL)
                took[name].append(time.monotonic() - began)

    await in_turn((OURS, "floor"), effort.rounds, measure, console, "start")
    report.figures.append(Figure("start to first event written", "s", Series(took[OURS]), Series(took["floor"])))


async def engine_work(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """What eventwatch and the poller ask of an engine whose nodes are quiet."""
    asked: dict[str, float] = {}
    busy: dict[str, float] = {}
    async with AsyncExitStack() as stack:
        fakes, before = {}, {}
        for name in (OURS, "poller"):
            fake = fakes[name] = await stack.enter_async_context(lab.fake_engine(effort.nodes))
            place = lab.place(name, engine=fake)
            await lab.fill(place, await fake.truth())
            await stack.enter_async_context(lab.running(name, place))
        await asyncio.sleep(2.0)
        for name, fake in fakes.items():
            before[name] = sum((await fake.requests()).values()), fake.program.usage()
        console.print(f"  quiet for {effort.idle_window:.0f} s", style="dim")
        await asyncio.sleep(effort.idle_window)
        for name, fake in fakes.items():
            requests, cpu = before[name]
            per_minute = 60 / effort.idle_window
            asked[name] = (sum((await fake.requests()).values()) - requests) * per_minute
            busy[name] = (fake.program.usage().cpu - cpu.cpu) * per_minute
    for what, unit, values, budget in (
        ("requests to the engine", "/min", asked, Budget("ratio", at_least=50)),
        ("CPU of the engine", "s/min", busy, None),
    ):
        report.figures.append(
            Figure(
                f"{what}, {effort.nodes} quiet nodes",
                unit,
                Series([values[OURS]]),
                Series([values["poller"]]),
                compared_with="poller",
                inverse=True,
                budget=budget,
                note="the default sweep interval is in the window once" if budget else "",
            )
        )


async def idle(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Beside containers with health checks that change nothing."""
    nodes = await lab.start_nodes(effort.idle_nodes, healthcheck="ok")
    await asyncio.gather(*(node.wait_health("healthy", within_s=PATIENCE) for node in nodes))
    spent: dict[str, list[tuple[Usage, Usage]]] = defaultdict(list)
    async with AsyncExitStack() as stack:
        programs = {}
        for name in (OURS, "floor"):
            place = lab.place(name)
            await lab.fill(place, await lab.truth(nodes))
            programs[name] = await stack.enter_async_context(lab.running(name, place))
        events = await stack.enter_async_context(lab.engine_events())
        await asyncio.sleep(2.0)
        for number in range(effort.long_rounds):
            console.print(f"  idle: round {number + 1} of {effort.long_rounds}", style="dim")
            before = {name: program.usage() for name, program in programs.items()}
            await asyncio.sleep(effort.idle_window)
            for name, program in programs.items():
                spent[name].append((before[name], program.usage()))
        changes = len(events)
    await lab.remove(nodes)
    note = f"{changes} changes of health came in between" if changes else ""

    def series(name: str, what: str) -> Series:
        return Series(
            [
                {
                    "cpu": 100 * (end.cpu - start.cpu) / (end.at - start.at),
                    "switches": 60 * (end.switches - start.switches) / (end.at - start.at),
                    "memory": end.resident,
                }[what]
                for start, end in spent[name]
            ]
        )

    beside = f"beside {len(nodes)} health-checked containers"
    for what, unit, title, budget in (
        ("cpu", "% of a core", f"idle CPU {beside}", Budget("value", at_most=0.5)),
        ("switches", "/min", "context switches, idle", None),
        ("memory", "MB", "resident memory, idle", Budget("value", at_most=90)),
    ):
        report.figures.append(
            Figure(
                title,
                unit,
                series(OURS, what),
                series("floor", what),
                budget=budget,
                note=note if what == "cpu" else "",
            )
        )
