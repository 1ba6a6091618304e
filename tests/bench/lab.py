"""Where it is measured: a real engine, a private mongod, real and fake nodes, and eyes on the documents.

The engine is a dockerd of the run's own, unless another is named: nobody else's containers are in the figures, and
an engine that a hundred kills at once have brought to a standstill is nobody else's either (20.10 can lock up
in its network code). All that a run makes is gone at its end.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, TypeVar

import aiohttp
from aiodocker import Docker
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from rich.console import Console

from tests.bench.fake_engine import STATUS_AFTER
from tests.bench.programs import ROOT, BenchError, FakeControl, Launcher, Place, Program, fake_engine
from tests.kit.engines import PrivateEngine
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import Node, NodeOptions, Nodes

Document = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")

PATIENCE: Final = 60.0
#: Containers seen to at once: more only queue up in the engine, and a hundred would outlast any deadline.
AT_ONCE: Final = 6
#: Longer than any run: what must not sweep by itself is told to sweep this seldom.
NEVER: Final = "1d"
TOLD: Final = ("start", "die", "pause", "unpause", "health_status")


@dataclass(frozen=True)
class Change:
    """A document as seen in the change stream, at a moment (ns)."""

    at: int
    node_id: str
    fields: Mapping[str, str]


@dataclass
class Seen:
    """What an observer has seen so far."""

    changes: list[Change] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def clear(self) -> None:
        self.changes.clear()

    def add(self, change: Change) -> None:
        self.changes.append(change)
        self._more.set()

    async def until(self, done: Callable[[], bool], *, within: float = PATIENCE) -> bool:
        """Wait until `done` after some change; False when it did not come to that."""
        deadline = time.monotonic() + within
        while not done():
            self._more.clear()
            try:
                async with asyncio.timeout(deadline - time.monotonic()):
                    await self._more.wait()
            except TimeoutError:
                return done()
        return True

    def first(self, event: EngineEvent) -> int | None:
        """When the document first said what the event said, at or after it (ns)."""
        for change in self.changes:
            if change.node_id == event.node_id and change.at >= event.time_nano and event.is_told_by(change):
                return change.at
        return None


@dataclass(frozen=True)
class EngineEvent:
    """What the engine said: the action, with what stands behind its colon in `health`."""

    node_id: str
    action: str
    time_nano: int
    health: str = ""

    @property
    def field(self) -> str:
        """The field of the document that it changes."""
        return "health" if self.health else "status"

    def is_told_by(self, change: Change) -> bool:
        return change.fields.get(self.field) == (self.health or STATUS_AFTER[self.action])


@dataclass(frozen=True)
class RealEngine:
    """An engine that runs real containers."""

    url: str
    docker: Docker
    nodes: Nodes


async def match(events: Iterable[EngineEvent], seen: Seen, *, within: float) -> dict[EngineEvent, int | None]:
    """When each event was first seen in the documents (ns), or a later one about the same field of its node.

    A program may leave out a state that lasted for less time than it takes to write it; from the moment when the
    document says something newer it is not stale any more. None: not seen within that many seconds.
    """
    groups: dict[tuple[str, str], list[EngineEvent]] = defaultdict(list)
    for event in sorted(events, key=lambda event: event.time_nano):
        groups[event.node_id, event.field].append(event)
    newest = [group[-1] for group in groups.values()]
    await seen.until(lambda: all(seen.first(event) for event in newest), within=within)
    found: dict[EngineEvent, int | None] = {}
    for group in groups.values():
        at: int | None = None
        for event in reversed(group):
            own = seen.first(event)
            at = min((moment for moment in (own, at) if moment is not None), default=None)
            found[event] = at
    return found


async def few_at_once(see_to: Callable[[T], Awaitable[R]], things: Iterable[T]) -> list[R]:
    slots = asyncio.Semaphore(AT_ONCE)

    async def wait_and_see_to(thing: T) -> R:
        async with slots:
            return await see_to(thing)

    return await asyncio.gather(*map(wait_and_see_to, things))


class Lab:
    """One run's surroundings."""

    def __init__(
        self, folder: Path, mongo: PrivateMongo, launcher: Launcher, real: RealEngine | None = None
    ) -> None:
        self.folder = folder
        self.mongo = mongo
        self.launcher = launcher
        self._real = real
        self._plain: list[Node] = []
        self._started: list[Node] = []
        self._numbers = itertools.count()

    @property
    def real(self) -> RealEngine:
        if self._real is None:
            raise BenchError("this run has no real engine")
        return self._real

    # -- nodes ---------------------------------------------------------------------------------------

    async def plain_nodes(self, count: int) -> list[Node]:
        """Running nodes without health check; they are kept for the whole run."""
        missing = count - len(self._plain)
        if missing > 0:
            self._plain += await self.start_nodes(missing)
        chosen = self._plain[:count]
        await self.all_running(chosen)
        return chosen

    async def start_nodes(self, count: int, **options: Any) -> list[Node]:
        chosen: NodeOptions = options  # type: ignore[assignment]
        names = [f"n{next(self._numbers)}" for _ in range(count)]
        started = await few_at_once(lambda name: self.real.nodes.start(name, **chosen), names)
        self._started += started
        return started

    async def remove(self, nodes: Iterable[Node]) -> None:
        gone = list(nodes)
        await few_at_once(Node.remove, gone)
        self._started = [node for node in self._started if node not in gone]
        self._plain = [node for node in self._plain if node not in gone]

    async def remove_all(self) -> None:
        await self.remove(self._started)

    async def all_running(self, nodes: Iterable[Node]) -> None:
        async def see_to(node: Node) -> None:
            state = (await node.inspect())["State"]
            if state["Paused"]:
                await node.unpause()
            elif not state["Running"]:
                await node.start()

        await few_at_once(see_to, nodes)

    # -- documents -----------------------------------------------------------------------------------

    def place(self, name: str, *, engine: FakeControl | None = None) -> Place:
        """A database of its own, for the real engine or a fake one."""
        database = f"bench_{name}_{secrets.token_hex(3)}"
        if engine:
            return Place(engine.url, self.mongo.url, database, "bench-network")
        return Place(self.real.url, self.mongo.url, database, self.real.nodes.network)

    @asynccontextmanager
    async def collection(self, place: Place) -> AsyncIterator[AsyncCollection[Document]]:
        async with AsyncMongoClient[Document](place.mongo_url) as client:
            yield client[place.database]["ToolServerNode"]

    async def fill(self, place: Place, truths: Mapping[str, Mapping[str, str]]) -> None:
        """Write documents, all of them true, as a manager would have inserted them."""
        other = {"port": 31942, "last_req_time": datetime.now(UTC).replace(tzinfo=None)}
        rows = [{"_id": i, "short_id": i[:12], **other, **truth} for i, truth in truths.items()]
        async with self.collection(place) as collection:
            await collection.insert_many(rows, ordered=False)

    async def truth(self, nodes: Iterable[Node]) -> dict[str, dict[str, str]]:
        truths = {}
        for node in nodes:
            seen = await node.inspect()
            state = seen["State"]
            truths[node.id] = {
                "status": state["Status"],
                "health": (state.get("Health") or {}).get("Status", "none"),
                "ip": seen["NetworkSettings"]["Networks"][self.real.nodes.network]["IPAddress"],
            }
        return truths

    @asynccontextmanager
    async def observed(self, place: Place) -> AsyncIterator[Seen]:
        """Watch the documents of a place from another process."""
        seen = Seen()
        async with self.launcher.module("observer", place.mongo_url, place.database) as observer:
            reading = asyncio.create_task(_read_changes(observer, seen), name="observer")
            try:
                yield seen
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)

    # -- programs ------------------------------------------------------------------------------------

    @asynccontextmanager
    async def running(
        self, name: str, place: Place, *, settings: Mapping[str, str] | None = None
    ) -> AsyncIterator[Program]:
        """`eventwatch`, `floor`, `merge` (its bare loop) or `poller` at a place, entered when it watches."""
        if name == "eventwatch":
            async with self.launcher.eventwatch(place, settings=settings) as program:
                await self.until_adopted(place, program)
                yield program
        elif name == "poller":
            async with self.launcher.module("poller", place=place) as program:
                yield program
        else:
            mode = {"floor": "events", "merge": "merge"}[name]
            async with self.launcher.module("floor", mode, place=place) as program:
                await asyncio.sleep(0.3)  # aiodocker does not tell when its stream is open
                yield program

    async def until_adopted(self, place: Place, program: Program) -> None:
        """eventwatch stamps every document in its first sweep, after its event stream was opened."""
        deadline = time.monotonic() + PATIENCE
        async with self.collection(place) as collection:
            while await collection.count_documents({"engine_id": None}, limit=1):
                if program.process.returncode is not None or time.monotonic() > deadline:
                    raise BenchError(f"eventwatch does not get going: {program.last_words()}")
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.3)

    @asynccontextmanager
    async def fake_engine(self, nodes: int, *options: str) -> AsyncIterator[FakeControl]:
        socket = self.folder / f"engine{next(self._numbers)}.sock"
        async with fake_engine(self.launcher, socket, nodes=nodes, options=options) as control:
            yield control

    @asynccontextmanager
    async def engine_events(self) -> AsyncIterator[list[EngineEvent]]:
        """What the real engine says while the block lasts."""
        events: list[EngineEvent] = []
        docker = self.real.docker
        await docker.version()
        filters = json.dumps({"type": ["container"], "event": TOLD})
        async with docker.session.get(
            f"{docker.docker_host}/{docker.api_version}/events",
            params={"filters": filters},
            timeout=aiohttp.ClientTimeout(total=None),
        ) as response:
            reading = asyncio.create_task(_read_events(response, events), name="engine-events")
            try:
                yield events
            finally:
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)


async def _read_changes(observer: Program, seen: Seen) -> None:
    while True:
        row = json.loads(await observer.line())
        seen.add(Change(row["at"], row["id"], row["fields"]))


async def _read_events(response: aiohttp.ClientResponse, events: list[EngineEvent]) -> None:
    async for line in response.content:
        raw = json.loads(line)
        action, _, health = raw["Action"].partition(": ")
        events.append(EngineEvent(raw["Actor"]["ID"], action, raw["timeNano"], health))


@asynccontextmanager
async def opened_lab(
    *, eventwatch_from: Path = ROOT, engine_url: str | None = None, real_engine: bool = True
) -> AsyncIterator[Lab]:
    """Make the run's folder, start a mongod and, unless one is named or none is needed, an engine."""
    folder = Path(tempfile.mkdtemp(prefix="ew-bench-"))
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        mongo = await stack.enter_async_context(PrivateMongo())
        real = await stack.enter_async_context(opened_engine(engine_url)) if real_engine else None
        lab = Lab(folder, mongo, Launcher(folder, eventwatch_from), real)
        try:
            yield lab
        finally:
            await lab.remove_all()


@asynccontextmanager
async def opened_engine(url: str | None) -> AsyncIterator[RealEngine]:
    run = f"ew-bench-{secrets.token_hex(3)}"
    async with AsyncExitStack() as stack:
        if url is None:
            url = (await stack.enter_async_context(PrivateEngine())).url
        docker = await stack.enter_async_context(Docker(url=url))
        nodes = await stack.enter_async_context(Nodes(docker, prefix=f"{run}-", network=run))
        yield RealEngine(url, docker, nodes)


async def in_turn(
    names: Iterable[str], rounds: int, measure: Callable[[str], Awaitable[None]], console: Console, what: str
) -> None:
    """Call `measure` for each name in each round, every other round in the opposite order."""
    order = list(names)
    for number in range(rounds):
        console.print(f"  {what}: round {number + 1} of {rounds}", style="dim")
        for name in order if number % 2 == 0 else reversed(order):
            await measure(name)
