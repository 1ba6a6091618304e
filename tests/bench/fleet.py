"""What one watcher costs and how fast it is beside the documents of other engines, alive or dead.

Each number of foreign documents has a database of its own with the same nodes of a fake engine. What is examined
and sent is the server's own count around sweeps, without the benchmark's own queries; staleness is that of
scale.py.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from pymongo import AsyncMongoClient
from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.lab import NEVER, PATIENCE, Lab
from tests.bench.programs import BenchError, FakeControl, Program
from tests.bench.report import Budget, Figure, Report, Series, pooled
from tests.bench.scale import stir, wrong_documents
from tests.kit.fleet import EACH, crowd
from tests.kit.mongod import free_port

#: Foreign documents, and the share of the engines that they belong to which is alive.
CROWDS: Final = ((0, 1.0), (10_000, 1.0), (200_000, 1.0), (200_000, 0.0))
SWEEPS: Final = 5
SLEEP: Final = 0.01
WITHIN: Final = Budget("ratio", at_most=1.1)


@dataclass
class Costs:
    """Of one watcher: per sweep, and of events (ms)."""

    examined: list[float] = field(default_factory=list)
    sent_kb: list[float] = field(default_factory=list)
    sweep_ms: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    ready_s: list[float] = field(default_factory=list)
    staleness: list[list[float]] = field(default_factory=list)


async def fleet(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """A watcher's costs with none and with many documents of others in its database."""
    found: dict[tuple[int, float], Costs] = defaultdict(Costs)
    async with lab.fake_engine(effort.nodes) as fake:
        for documents, alive in CROWDS:
            if documents > effort.foreign:
                continue
            costs = found[documents, alive]
            await measure(lab, fake, effort, costs, engines=documents // EACH, alive=alive)
            console.print(f"  {described(documents, alive)}: {costs.sweep_ms}", style="dim")
    alone = found[0, 1.0]
    for (documents, alive), costs in found.items():
        if not documents:
            continue
        name = described(documents, alive)
        report.figures += [
            Figure(f"{what}, {name}", unit, Series(ours), Series(theirs), compared_with="alone", budget=WITHIN)
            for what, unit, ours, theirs in (
                ("documents examined by a sweep", "", costs.examined, alone.examined),
                ("sent by the database in a sweep", "kB", costs.sent_kb, alone.sent_kb),
                ("sweep", "ms", costs.sweep_ms, alone.sweep_ms),
                ("resident memory after sweeps", "MB", costs.resident_mb, alone.resident_mb),
                ("start to ready", "s", costs.ready_s, alone.ready_s),
            )
        ]
        report.figures += [
            Figure(
                f"staleness p{100 * share:.0f}, {name}",
                "ms",
                pooled(costs.staleness, share),
                pooled(alone.staleness, share),
                compared_with="alone",
                budget=WITHIN if share < 0.9 else None,
            )
            for share in (0.5, 0.99)
        ]


def described(documents: int, alive: float) -> str:
    """Foreign documents in words."""
    return f"{documents:,} documents of {'live' if alive else 'dead'} engines beside it" if documents else "alone"


async def measure(
    lab: Lab, fake: FakeControl, effort: Effort, costs: Costs, *, engines: int, alive: float
) -> None:
    """Start a watcher some times, let it sweep, and stir its nodes."""
    place = lab.place("fleet", engine=fake)
    await lab.fill(place, await fake.truth())
    port = free_port()
    settings = {"EVENTWATCH_SWEEP_INTERVAL": NEVER, "EVENTWATCH_HTTP_LISTEN": f"127.0.0.1:{port}"}
    async with AsyncMongoClient[dict[str, Any]](place.mongo_url) as client:
        await crowd(client[place.database], engines, alive=alive)
        # The first one creates the indexes.
        async with lab.launcher.eventwatch(place, settings=settings) as program:
            await until_ready(port, program)
        for _ in range(effort.rounds):
            began = time.monotonic()
            async with lab.observed(place) as seen, lab.launcher.eventwatch(place, settings=settings) as program:
                await until_ready(port, program)
                costs.ready_s.append(time.monotonic() - began)
                await asyncio.sleep(1.0)
                await sweeps(client, port, program, costs)
                costs.staleness.append(await stir(fake, seen, effort))
                costs.resident_mb.append(program.usage().resident)
        if await wrong_documents(lab, fake, place, within=PATIENCE):
            raise BenchError("documents are wrong")


async def sweeps(client: AsyncMongoClient[dict[str, Any]], port: int, program: Program, costs: Costs) -> None:
    """What some sweeps cost each, on average."""
    count, seconds = await swept(port)
    before = await client.admin.command("serverStatus")
    for number in range(SWEEPS):
        program.hang_up()

        async def done(wanted: int = number + 1) -> bool:
            return (await swept(port))[0] >= count + wanted

        await until(done)
    after = await client.admin.command("serverStatus")
    costs.sweep_ms.append(1000 * ((await swept(port))[1] - seconds) / SWEEPS)
    for values, name, part in ((costs.examined, "metrics", 1.0), (costs.sent_kb, "network", 1000.0)):
        counts = [
            row["metrics"]["queryExecutor"]["scannedObjects"] if name == "metrics" else row["network"]["bytesOut"]
            for row in (before, after)
        ]
        values.append((counts[1] - counts[0]) / part / SWEEPS)


async def swept(port: int) -> tuple[int, float]:
    """How many sweeps there were, and how many seconds they took together."""
    text = await page(port, "/metrics")
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    name = "eventwatch_sweep_duration_seconds"
    return int(float(values[f"{name}_count"])), float(values[f"{name}_sum"])


async def page(port: int, path: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{path}") as answer:
        answer.raise_for_status()
        return await answer.text()


async def until_ready(port: int, program: Program) -> None:
    async def ready() -> bool:
        if program.process.returncode is not None:
            raise BenchError(f"eventwatch does not get going: {program.last_words()}")
        try:
            await page(port, "/readyz")
        except aiohttp.ClientError:
            return False
        return True

    await until(ready)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110 - what is waited for is in other processes
            await asyncio.sleep(SLEEP)
