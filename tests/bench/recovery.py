"""How soon every document is right again after the engine or the database was away.

The engine is a fake one that is killed and comes back with other states behind the same socket; the database is
the private mongod, killed and started again, while events went on. The clock starts when the one that was away
answers again (the fake accepts connections, mongod is primary), and stops when every document says the truth,
looked at every few milliseconds from outside.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from rich.console import Console

from tests.bench.effort import Effort
from tests.bench.lab import Lab
from tests.bench.programs import FakeControl, Place, fake_engine
from tests.bench.report import Budget, Figure, Report, Series
from tests.bench.scale import wrong_documents

#: Seconds away: long enough for retries to be at their slowest.
ENGINE_AWAY: Final = 3.0
DATABASE_AWAY: Final = 3.0
GIVE_UP: Final = 30.0


async def recovery(lab: Lab, report: Report, effort: Effort, console: Console) -> None:
    """Engine and database, each killed and brought back."""
    after_engine, after_database = [], []
    for number in range(effort.rounds):
        console.print(f"  recovery: round {number + 1} of {effort.rounds}", style="dim")
        after_engine.append(await engine_returns(lab, effort))
        after_database.append(await database_returns(lab, effort))
    for what, took in (("engine", after_engine), ("database", after_database)):
        report.figures.append(
            Figure(
                f"all {effort.nodes} documents right after the {what} is back",
                "s",
                Series(took),
                budget=Budget("value", at_most=2),
            )
        )


async def engine_returns(lab: Lab, effort: Effort) -> float:
    socket = lab.folder / "returning.sock"
    changed = max(1, effort.nodes // 4)
    # The first engine is left behind by the second, at whose end both are gone.
    async with fake_engine(lab.launcher, socket, nodes=effort.nodes) as first:
        place = lab.place("recovery", engine=first)
        await lab.fill(place, await first.truth())
        async with lab.running("eventwatch", place):
            first.program.process.kill()
            await first.program.process.wait()
            await asyncio.sleep(ENGINE_AWAY)
            options = ("--exited", str(changed))
            async with fake_engine(lab.launcher, socket, nodes=effort.nodes, options=options) as second:
                return await until_right(lab, second, place)


async def database_returns(lab: Lab, effort: Effort) -> float:
    async with lab.fake_engine(effort.nodes) as fake:
        place = lab.place("recovery", engine=fake)
        await lab.fill(place, await fake.truth())
        async with lab.running("eventwatch", place):
            await lab.mongo.kill()
            for node in range(max(1, effort.nodes // 4)):
                await fake.emit(node, "die")
            await asyncio.sleep(DATABASE_AWAY)
            await lab.mongo.start()
            return await until_right(lab, fake, place)


async def until_right(lab: Lab, fake: FakeControl, place: Place) -> float:
    """Seconds from now until no document is wrong."""
    began = time.monotonic()
    while await wrong_documents(lab, fake, place, within=GIVE_UP):
        if time.monotonic() > began + GIVE_UP:
            return float("inf")
    return time.monotonic() - began
