"""`python -m tests.faults.stale_race`: a manager that writes back whole documents which it read long before.

It replaces a document 50 times a second with what it read 0 to 3 s ago, while nodes die and start on a real
engine, for a minute (`--seconds`). Prints for how long documents were wrong at a time (p50, p99, longest, by the
database's clock), and whether a `last_req_time` was lost. No sweep helps after the first: what is put right is so
by events and by looks.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from tests.bench.report import percentile
from tests.faults.harness import OBSERVED, Oracle, World
from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.truth import Document
from tests.kit.waiting import end, eventually

STALE: Final = 3.0
RATE: Final = 50.0


async def replace_all_the_time(world: World) -> None:
    """Read a document, and write all of it back later, `RATE` times a second; until cancelled."""

    async def later(document: Document) -> None:
        await asyncio.sleep(world.random.uniform(0, STALE))
        await world.request(document["_id"], document)

    async with asyncio.TaskGroup() as tasks:
        while True:
            await asyncio.sleep(1 / RATE)
            if document := await world.read(world.random.choice(list(world.requests))):
                tasks.create_task(later(document), name="stale-write")


@dataclass
class Wrongs:
    """For how long (s) documents said what the manager had put back, each time, by the database's clock."""

    took: list[float] = field(default_factory=list)
    _right: dict[str, Document] = field(default_factory=dict)
    _since: dict[str, datetime] = field(default_factory=dict)

    def take(self, change: Mapping[str, Any]) -> None:
        node_id, at = change["documentKey"]["_id"], change["wallTime"]
        if change["operationType"] == "update":
            ours = change["updateDescription"]["updatedFields"].keys() - {"last_req_time"}
            wrong = node_id in self._since and not ours
        else:
            # Right is what it said before the manager's write: eventwatch had the last word then.
            said = {name: (change.get("fullDocument") or {}).get(name) for name in OBSERVED}
            before = change.get("fullDocumentBeforeChange")
            if node_id not in self._since:
                self._right[node_id] = {name: before[name] for name in OBSERVED} if before else said
            wrong = change["operationType"] == "replace" and said != self._right[node_id]
        if wrong:
            self._since.setdefault(node_id, at)
        elif since := self._since.pop(node_id, None):
            self.took.append((at - since).total_seconds())

    @property
    def unended(self) -> int:
        return len(self._since)


@asynccontextmanager
async def followed(world: World) -> AsyncIterator[Wrongs]:
    """Take in what happens to the documents, until 1 s after the block."""
    wrongs = Wrongs()

    async def follow() -> None:
        async for change in changes:
            wrongs.take(change)

    await world.client[world.database].command(
        "collMod", "ToolServerNode", changeStreamPreAndPostImages={"enabled": True}
    )
    pipeline = await world.documents.watch(max_await_time_ms=100, full_document_before_change="whenAvailable")
    async with pipeline as changes:
        following = asyncio.create_task(follow(), name="wrongs")
        try:
            yield wrongs
            await asyncio.sleep(1)
        finally:
            await end(following)


async def race(world: World, seconds: float) -> list[float]:
    """Nodes die and start beside such a manager for so long; for how long documents were wrong (s), each time."""
    oracle, stop = Oracle(world), asyncio.Event()
    await oracle.recovered()
    async with followed(world) as wrongs:
        work = [
            asyncio.create_task(world.live(stop), name="life"),
            asyncio.create_task(replace_all_the_time(world), name="manager"),
        ]
        try:
            await asyncio.sleep(seconds)
        finally:
            stop.set()
            await end(*work)
        await oracle.recovered()
        await eventually(lambda: not wrongs.unended)
    return wrongs.took


async def measure(seconds: float) -> None:
    async with PrivateEngine() as engine, PrivateMongo() as mongo, World(engine.url, mongo.url) as world:
        await world.populate(8)
        with tempfile.TemporaryDirectory() as folder:
            settings = world.settings(sweep_interval="10m", log_level="INFO")
            with closing(Eventwatch(Path(folder), settings)) as eventwatch:
                eventwatch.start()
                took = await race(world, seconds)
                lost = await Oracle(world).lost_requests()
    print(  # noqa: T201 - a command
        f"{len(world.put_back)} of {len(world.requests)} nodes were put back, {len(took)} times wrong: "
        f"p50 {percentile(took, 0.5):.2f} s, p99 {percentile(took, 0.99):.2f} s, longest {max(took):.2f} s; "
        f"{len(lost)} last_req_time lost"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    asyncio.run(measure(parser.parse_args().seconds))


if __name__ == "__main__":
    main()
