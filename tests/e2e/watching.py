"""What the end-to-end tests share: a world to watch, patience, and an oracle that knows what is true.

The oracle, and the fault suite's, reads the engine's own inspections and knows the documents' rules by heart; it
shares no code with eventwatch, so that one mistake cannot be made twice. Waiting is always for something, with a
deadline.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiodocker import Docker, DockerError
from aiohttp import web
from loguru import logger
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.asynchronous.database import AsyncDatabase

from eventwatch import Settings, watch
from eventwatch.app import Application
from eventwatch.core.errors import EngineError
from eventwatch.core.facts import Change, Event, Observation
from eventwatch.engine.docker import DockerEngine
from eventwatch.pipeline.reconciler import Reconciler
from eventwatch.store.base import ENGINES, checker_id
from tests.conftest import end
from tests.nodes import NODE_PORT, SLOW, Node, Nodes

Document = dict[str, Any]

ROOT = Path(__file__).parents[2]
#: Far above what a healthy run needs: it bounds a failure, it is no measurement.
PATIENCE = 10.0
#: A sweep or a settle that a test wants to rule out as the cause comes later than any test lasts.
NEVER = 600.0


# -- waiting ------------------------------------------------------------------------------------------------


async def eventually(probe: Callable[[], Any], within: float = PATIENCE) -> Any:
    """Wait until `probe` (plain or async) gives something true, and return that."""
    try:
        async with asyncio.timeout(within * SLOW):
            while True:
                found = probe()
                if inspect.isawaitable(found):
                    found = await found
                if found:
                    return found
                await asyncio.sleep(0.01)
    except TimeoutError:
        source = inspect.getsource(getattr(probe, "func", probe)).strip()
        raise AssertionError(f"not within {within} s: {source}") from None


# -- what is true -------------------------------------------------------------------------------------------


def true_fields(container: Mapping[str, Any], *, network: str, port: int = NODE_PORT) -> Document:
    """What a node's document must say of this inspection; `port` is missing where it is left as it is."""
    state = container["State"]
    status, health = state["Status"], (state.get("Health") or {}).get("Status") or "none"
    if status != "running" and health == "healthy":
        health = "unhealthy"
    ip = ""
    if status in ("running", "paused"):
        networks = container["NetworkSettings"]["Networks"] or {}
        ip = (networks.get(network) or {}).get("IPAddress", "")
    fields: Document = {"status": status, "health": health, "ip": ip}
    exposed = [
        int(spec.split("/")[0]) for spec in container["Config"].get("ExposedPorts") or () if "/udp" not in spec
    ]
    if not exposed or port in exposed:
        fields["port"] = port
    elif len(exposed) == 1:
        fields["port"] = exposed[0]
    return fields


async def wrong_documents(docker: Docker, database: AsyncDatabase[Document], network: str) -> dict[str, str]:
    """For each document that is not true, what is wrong with it."""
    wrong: dict[str, str] = {}
    for document in await database["ToolServerNode"].find().to_list():
        short_id = document["_id"][:12]
        try:
            async with asyncio.timeout(PATIENCE * SLOW):
                container = await docker.containers.container(document["_id"]).show()
        except DockerError as error:
            if error.status != 404:
                raise
            wrong[short_id] = "its container is gone"
            continue
        truth = true_fields(container, network=network)
        said = {name: document.get(name) for name in truth}
        if said != truth:
            wrong[short_id] = f"says {said}, true is {truth}"
    return wrong


async def assert_documents_true(
    docker: Docker, database: AsyncDatabase[Document], network: str, *, within: float = PATIENCE
) -> None:
    """Wait until every document says what an inspection says."""
    wrong: dict[str, str] = {"all": "nothing was compared"}
    with suppress(TimeoutError):
        async with asyncio.timeout(within * SLOW):
            while wrong:
                wrong = await wrong_documents(docker, database, network)
                await asyncio.sleep(0.01)
    assert not wrong, f"not true within {within} s: {wrong}"


# -- what was seen ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A document as it was at one moment, and what was written to make it so; None once deleted."""

    node_id: str
    operation: str
    document: Document | None
    updated: Document

    def says(self, **fields: Any) -> bool:
        return self.document is not None and all(
            self.document.get(name) == value for name, value in fields.items()
        )


@dataclass
class Film:
    """Every state of every document in order, from a change stream (which shows each write by itself)."""

    images: list[Image] = field(default_factory=list)
    _now: dict[str, Document] = field(default_factory=dict)

    def of(self, node: Node) -> list[Image]:
        return [image for image in self.images if image.node_id == node.id]

    def begin(self, documents: list[Document]) -> None:
        self._now = {document["_id"]: document for document in documents}

    def take(self, change: Mapping[str, Any]) -> None:
        node_id, operation = change["documentKey"]["_id"], change["operationType"]
        updated: Document = {}
        if operation == "delete":
            self._now.pop(node_id, None)
        elif operation == "update":
            updated = change["updateDescription"]["updatedFields"]
            self._now[node_id] = {**self._now.get(node_id, {"_id": node_id}), **updated}
        else:
            self._now[node_id] = change["fullDocument"]
        document = self._now.get(node_id)
        self.images.append(Image(node_id, operation, dict(document) if document else None, updated))


@asynccontextmanager
async def filmed(collection: AsyncCollection[Document]) -> AsyncIterator[Film]:
    """Film what happens to the documents from now on."""
    film = Film()
    async with await collection.watch(max_await_time_ms=100) as changes:
        film.begin(await collection.find().to_list())

        async def roll() -> None:
            async for change in changes:
                film.take(change)

        rolling = asyncio.create_task(roll(), name="film")
        try:
            yield film
        finally:
            await end(rolling)


@dataclass(frozen=True)
class Line:
    """One line of the log."""

    level: str
    text: str
    error: BaseException | None


@contextmanager
def logged(level: str = "DEBUG") -> Iterator[list[Line]]:
    """Every line that is logged in this process meanwhile."""
    lines: list[Line] = []

    def take(message: Any) -> None:
        record = message.record
        error = record["exception"].value if record["exception"] else None
        lines.append(Line(record["level"].name, record["message"], error))

    sink = logger.add(take, level=level)
    try:
        yield lines
    finally:
        logger.remove(sink)


def texts(lines: list[Line], level: str | None = None) -> list[str]:
    return [line.text for line in lines if level in (None, line.level)]


# -- the world ----------------------------------------------------------------------------------------------


@dataclass
class Watched:
    """A running `watch()` that has connected and swept once, and what it has written since."""

    app: Application
    written: list[Change] = field(default_factory=list)
    noticed: list[Event] = field(default_factory=list)

    def of(self, node: Node) -> list[Change]:
        return [change for change in self.written if change.node_id == node.id]

    def count(self, name: str, **labels: str) -> float:
        """A metric's value, by its full name."""
        return self.app.metrics.registry.get_sample_value(name, labels) or 0.0

    def events(self, node: Node, *actions: str) -> int:
        """How many events of this node (only these actions, if any are named) have arrived."""
        return sum(event.node_id == node.id and (event.action in actions or not actions) for event in self.noticed)


@asynccontextmanager
async def watching(settings: Settings) -> AsyncIterator[Watched]:
    """Run `watch(settings)`, entered once it leads, has its event stream open and has swept."""
    noticed: list[Event] = []
    real_notice = Reconciler.on_event

    def on_event(self: Reconciler, event: Event) -> None:
        noticed.append(event)
        real_notice(self, event)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reconciler, "on_event", on_event)
        async with watch(settings) as app:
            await eventually(lambda: app.pipeline and app.pipeline.sweeper.last_success is not None)
            await eventually(lambda: app.pipeline and app.pipeline.watcher.connected_at is not None)
            assert app.pipeline is not None
            watched = Watched(app, noticed=noticed)
            app.pipeline.writer.listeners.append(watched.written.append)
            yield watched


@dataclass
class World:
    """One test's nodes and documents, seen as a manager and as an operator see them."""

    docker: Docker
    nodes: Nodes
    client: AsyncMongoClient[Document]
    mongo_url: str
    database_name: str

    @property
    def database(self) -> AsyncDatabase[Document]:
        return self.client[self.database_name]

    @property
    def collection(self) -> AsyncCollection[Document]:
        return self.database["ToolServerNode"]

    @property
    def checkers(self) -> AsyncCollection[Document]:
        return self.database["NodeChecker"]

    def settings(self, **changes: Any) -> Settings:
        """Settings of a watcher that sweeps at the start and then leaves all to events, unless told otherwise."""
        base: dict[str, Any] = {
            "mongo_url": self.mongo_url,
            "mongo_database": self.database_name,
            "node_network": self.nodes.network,
            "sweep_interval": NEVER,
            "http_listen": "",
        }
        return Settings(_env_file=None, **(base | changes))

    @asynccontextmanager
    async def watching(self, **changes: Any) -> AsyncIterator[Watched]:
        async with watching(self.settings(**changes)) as watched:
            yield watched

    async def insert(self, node: Node | str, **fields: Any) -> None:
        """Insert a node's document as a manager does, right after it made the container."""
        await self.collection.insert_one(manager_document(node if isinstance(node, str) else node.id, **fields))

    async def begin_idle_stops(self) -> None:
        """Let eventwatch find that it announced idle stops long ago: a first contact's grace takes minutes."""
        engine_id = str((await self.docker.system.info())["ID"])
        row = {"_id": checker_id(engine_id), "engine_id": engine_id, "idle_stops_from": ago(1)}
        await self.database[ENGINES].insert_one(row)

    async def document(self, node: Node) -> Document | None:
        return await self.collection.find_one({"_id": node.id})

    async def says(self, node: Node, **fields: Any) -> bool:
        document = await self.document(node)
        return document is not None and all(document.get(name) == value for name, value in fields.items())

    async def becomes_true(self, *, within: float = PATIENCE) -> None:
        await assert_documents_true(self.docker, self.database, self.nodes.network, within=within)

    async def status(self, node: Node) -> str:
        """What the engine says."""
        return str((await node.inspect())["State"]["Status"])

    async def ip(self, node: Node) -> str:
        """The address on the nodes' network that the engine shows."""
        return str((await node.inspect())["NetworkSettings"]["Networks"][self.nodes.network]["IPAddress"])

    async def start(self, name: str, **options: Any) -> Node:
        """Start a node and insert its document."""
        node = await self.nodes.start(name, **options)
        await self.insert(node)
        return node


@asynccontextmanager
async def opened_world(docker: Docker, nodes: Nodes, mongo_url: str, database: str) -> AsyncIterator[World]:
    async with AsyncMongoClient[Document](mongo_url) as client:
        world = World(docker, nodes, client, mongo_url, database)
        await world.database.create_collection("ToolServerNode")
        await world.begin_idle_stops()
        yield world


def manager_document(node_id: str, **fields: Any) -> Document:
    return {
        "_id": node_id,
        "short_id": node_id[:12],
        "status": "created",
        "health": "starting",
        "ip": "",
        "port": NODE_PORT,
        "last_req_time": ago(0),
        **fields,
    }


def ago(seconds: float) -> datetime:
    """A moment as the manager stores it: UTC that does not say so, in whole milliseconds."""
    moment = datetime.now(UTC).replace(tzinfo=None) - timedelta(seconds=seconds)
    return moment.replace(microsecond=moment.microsecond // 1000 * 1000)


# -- in place of an engine ----------------------------------------------------------------------------------


@asynccontextmanager
async def served(
    socket: Path, answer: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> AsyncIterator[str]:
    """Let `answer` have every request to this socket; gives the URL of the engine that it passes for."""
    app = web.Application(client_max_size=0)
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
    await runner.setup()
    try:
        await web.UnixSite(runner, str(socket)).start()
        yield f"unix://{socket}"
    finally:
        await runner.cleanup()


# -- eventwatch as a program --------------------------------------------------------------------------------


class Program:
    """A running eventwatch, or another Python program that imports it; both outputs are kept."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.output = ""

    async def read(self) -> None:
        assert self.process.stdout is not None
        while chunk := await self.process.stdout.read(65536):
            self.output += chunk.decode(errors="replace")

    async def says(self, text: str, *, within: float = PATIENCE) -> None:
        try:
            await eventually(lambda: text in self.output, within)
        except AssertionError:
            raise AssertionError(f"did not say {text!r} within {within} s:\n{self.output}") from None

    async def ends(self, *, within: float = 2 * PATIENCE) -> int:
        try:
            async with asyncio.timeout(within * SLOW):
                return await self.process.wait()
        except TimeoutError:
            raise AssertionError(f"did not end within {within} s:\n{self.output}") from None


def program(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, prefix: tuple[str, ...] = ()
) -> AbstractAsyncContextManager[Program]:
    """Run Python with these arguments, and the tree to import from, in a folder of its own."""
    base = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return started(*prefix, sys.executable, *arguments, env=base | dict(env), cwd=cwd)


@asynccontextmanager
async def started(*command: str | Path, env: Mapping[str, str], cwd: Path) -> AsyncIterator[Program]:
    """Run a command with this environment and no other; it is killed at exit if it has not ended."""
    process = await asyncio.create_subprocess_exec(
        *command,
        env=env,
        cwd=cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    running = Program(process)
    reading = asyncio.create_task(running.read(), name="program-output")
    try:
        yield running
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


async def run_program(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, prefix: tuple[str, ...] = ()
) -> tuple[int, str]:
    """Run to the end; the exit code and all output."""
    async with program(*arguments, env=env, cwd=cwd, prefix=prefix) as running:
        code = await running.ends()
    return code, running.output


class Failing:
    """An engine that fails about some containers, and counts what it is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bad: set[str] = set()
        self.asked: Counter[str] = Counter()
        real = DockerEngine.inspect

        async def inspect(engine: DockerEngine, node_id: str, *, as_of: int = 0) -> Observation:
            self.asked[node_id] += 1
            if node_id in self.bad:
                raise EngineError("Engine failed while inspecting it: RWLayer is unexpectedly nil", status=500)
            return await real(engine, node_id, as_of=as_of)

        monkeypatch.setattr(DockerEngine, "inspect", inspect)
