"""What every fault test is made of: eventwatch as a process, a busy world around it, and an oracle.

`World` holds nodes on a real engine and their documents in a real MongoDB. While it is `busy`, nodes live at
random and a manager writes `last_req_time`, also by replacing whole documents with an older model, and, if
`stale_s` says so, with what it read a while ago. `Oracle` compares every document with an inspection, by the
end-to-end tests' own copy of the documents' rules, so that a mistake in eventwatch's rules cannot hide itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import secrets
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import aiohttp
from aiodocker import Docker, DockerError
from pymongo import AsyncMongoClient
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from tests.kit.engines import PrivateEngine
from tests.kit.eventwatch import Eventwatch
from tests.kit.mongod import PrivateMongo
from tests.kit.nodes import Node, Nodes
from tests.kit.processes import ROOT
from tests.kit.truth import Document, ago, differences, manager_document, true_fields
from tests.kit.waiting import SLOW, end

TABLE: Final = ROOT / ".cache" / "faults.json"
#: Seconds that a document may stay wrong after the engine and the database are back.
RECOVERY: Final = 2.0 * SLOW
#: Seconds without a wrong document after which the world counts as right.
QUIET: Final = 0.7
CALL: Final = 4.0
#: What the manager's older model knows; a replace with it drops everything else.
OLDER_MODEL: Final = ("_id", "short_id", "status", "health", "ip", "port", "last_req_time")
OBSERVED: Final = ("status", "health", "ip", "port")
#: The share of the manager's writes that replace a whole document.
REPLACES: Final = 0.3
EXPECTED_ERRORS: Final = (DockerError, aiohttp.ClientError, OSError, TimeoutError, RuntimeError)

Documents = AsyncCollection[Document]


def times() -> int:
    """How often each fault is injected: once in CI, `EVENTWATCH_TEST_FAULT_TIMES` for the table."""
    return int(os.environ.get("EVENTWATCH_TEST_FAULT_TIMES", "1"))


Test = TypeVar("Test", bound=Callable[..., Any])


def long(test: Test) -> Test:
    """Mark a test that takes over 30 s: it is run with `EVENTWATCH_TEST_FAULTS=all` only (see conftest.py)."""
    test.long_fault = True  # type: ignore[attr-defined]
    return test


# -- the world ----------------------------------------------------------------------------------------------


async def freeze_for(seconds: float, what: Eventwatch | PrivateEngine | PrivateMongo) -> None:
    """Stop its process so long, whatever happens meanwhile."""
    what.freeze()
    try:
        await asyncio.sleep(seconds)
    finally:
        what.thaw()


@dataclass
class Requests:
    """The `last_req_time` that the manager wrote to one node: what was acknowledged, and what may have arrived."""

    acknowledged: datetime | None = None
    unsure: set[datetime] = field(default_factory=set)


@dataclass
class PutBack:
    """What a stale replace of the manager has put into a document, and when at the latest, as Docker writes it."""

    fields: Document
    at: str

    def explains(self, document: Document, container: Document, network: str) -> bool:
        """Whether the document is wrong because of it, and not because of what befell the container since."""
        truth = true_fields(container, network=network)
        wrong = [name for name, value in truth.items() if document.get(name) != value]
        changed = max(container["State"][name] for name in ("StartedAt", "FinishedAt"))
        return changed <= self.at and all(document.get(name) == self.fields[name] for name in wrong)


class World:
    """Nodes on one engine, at most `most`, and a manager that knows them.

    The manager replaces a document with what it read up to `stale_s` before.
    """

    def __init__(
        self,
        docker_url: str,
        mongo_url: str,
        *,
        seed: int = 0,
        database: str = "",
        most: int = 16,
        stale_s: float = 0.0,
    ) -> None:
        self.docker_url = docker_url
        self.mongo_url = mongo_url
        self.database = database or f"ew_faults_{secrets.token_hex(4)}"
        self.random = random.Random(seed)
        self.nodes: dict[str, Node] = {}
        self.requests: dict[str, Requests] = {}
        #: Containers whose document the database has acknowledged, and all that it was asked to insert.
        self.inserted: set[str] = set()
        self.offered: set[str] = set()
        #: Containers that were told to go.
        self.removed: set[str] = set()
        self.put_back: dict[str, PutBack] = {}
        self._one_at_a_time: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self.most = most
        self.stale_s = stale_s
        self.replace_share = REPLACES
        self.operations = 0
        self.network = f"ewf-{secrets.token_hex(3)}"
        self._stack = contextlib.AsyncExitStack()
        self._made = 0

    async def __aenter__(self) -> Self:
        await self.connect_engine()
        self.client = await self._stack.enter_async_context(
            AsyncMongoClient[Document](
                self.mongo_url,
                serverSelectionTimeoutMS=1500,
                connectTimeoutMS=1500,
                socketTimeoutMS=4000,
                # What the manager was told is stored must survive a crash, or its loss would prove nothing.
                journal=True,
            )
        )
        return self

    async def connect_engine(self) -> None:
        self.docker = await self._stack.enter_async_context(Docker(url=self.docker_url))
        self.maker = await self._stack.enter_async_context(
            Nodes(self.docker, prefix=f"{self.network}-", network=self.network)
        )

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(PyMongoError):
            await self.client.drop_database(self.database)
        # An engine that was killed may refuse for a while to remove what it had mounted; it ends with the suite.
        with contextlib.suppress(*EXPECTED_ERRORS):
            await self._stack.aclose()

    @property
    def documents(self) -> Documents:
        return self.client[self.database]["ToolServerNode"]

    @property
    def checkers(self) -> Documents:
        return self.client[self.database]["NodeChecker"]

    def settings(self, **more: str) -> dict[str, str]:
        """The environment in which eventwatch keeps this world true."""
        return {
            "docker_host": self.docker_url,
            "mongo_url": self.mongo_url,
            "mongo_database": self.database,
            "node_network": self.network,
            "sweep_interval": "5s",
            "http_listen": "",
            "log_level": "DEBUG",
            **more,
        }

    # -- the manager -----------------------------------------------------------------------------------

    async def populate(self, count: int) -> None:
        for _ in range(count):
            await self.add()

    async def add(self) -> Node:
        """Start a node and insert its document, as a manager does it: afterwards."""
        self._made += 1
        health = self.random.choice(["ok", "flag", None])
        node = await self.maker.start(
            f"n{self._made}",
            healthcheck=health,  # type: ignore[arg-type]  # a HealthCheck or None
            interval_s=0.3,
            restart=self.random.choice(["no", "no", "on-failure"]),
        )
        await self.insert(node)
        return node

    async def insert(self, node: Node) -> None:
        """Insert the document; while the database is away, try again until it is back."""
        now = ago(0)
        document = manager_document(node.id, status="running", last_req_time=now, session="made by the manager")
        self.offered.add(node.id)
        while True:
            try:
                await self.documents.update_one({"_id": node.id}, {"$setOnInsert": document}, upsert=True)
            except PyMongoError:
                await asyncio.sleep(0.2)
                continue
            break
        self.nodes[node.id] = node
        self.requests[node.id] = Requests(acknowledged=now)
        self.inserted.add(node.id)

    async def manage(self, stop: asyncio.Event, *, replaces: bool = True) -> None:
        """Write `last_req_time` without a rest: mostly that field alone, sometimes the whole document."""
        held: list[tuple[float, Document]] = []
        while not stop.is_set():
            await asyncio.sleep(self.random.uniform(0.01, 0.05))
            if not self.requests:
                continue
            node_id = self.random.choice(list(self.requests))
            if not replaces or self.random.random() >= self.replace_share:
                await self.request(node_id)
            elif document := await self.read(node_id):
                held.append((time.monotonic() + self.random.uniform(0, self.stale_s), document))
            now = time.monotonic()
            due, held = [entry for entry in held if entry[0] <= now], [entry for entry in held if entry[0] > now]
            for _, document in due:
                await self.request(document["_id"], document)

    async def read(self, node_id: str) -> Document | None:
        """Read a document as the older model knows it."""
        with contextlib.suppress(PyMongoError):
            return await self.documents.find_one({"_id": node_id}, OLDER_MODEL)
        return None

    async def request(self, node_id: str, document: Document | None = None) -> None:
        """Note down one request to a node; with `document`, by writing all of that back."""
        async with self._one_at_a_time[node_id]:  # of two at once, nobody could say which is to stay
            await self._request(node_id, document)

    async def _request(self, node_id: str, document: Document | None) -> None:
        now = ago(0)
        requests = self.requests[node_id]
        requests.unsure.add(now)
        try:
            if document:
                arrived = await self.replace({**document, "last_req_time": now})
            else:
                change = {"$set": {"last_req_time": now}}
                arrived = (await self.documents.update_one({"_id": node_id}, change)).matched_count > 0
        except PyMongoError:
            await asyncio.sleep(0.1)
            return
        # Others stay unsure: what a frozen database was asked to write may arrive much later.
        requests.unsure.discard(now)
        if arrived:
            requests.acknowledged = now

    async def replace(self, document: Document) -> bool:
        node_id, fields = document["_id"], {name: document[name] for name in OBSERVED}
        try:
            before = await self.documents.find_one_and_replace({"_id": node_id}, document)
        except PyMongoError:
            self.put_back[node_id] = PutBack(fields, at="9999")
            raise
        if before and any(before[name] != value for name, value in fields.items()):
            self.put_back[node_id] = PutBack(fields, at=ago(0).isoformat(timespec="milliseconds"))
        return before is not None

    def was_put_back(self, document: Document, container: Document | None) -> bool:
        """Whether what is wrong in the document is the manager's doing."""
        put_back = self.put_back.get(document["_id"])
        return bool(put_back and container and put_back.explains(document, container, self.network))

    # -- node life -------------------------------------------------------------------------------------

    async def live(self, stop: asyncio.Event) -> None:
        """Let something happen to a random node again and again; what the engine refuses is no matter."""
        while not stop.is_set():
            await asyncio.sleep(self.random.uniform(0.02, 0.15))
            try:
                async with asyncio.timeout(CALL):
                    await self.happen()
                    self.operations += 1
            except EXPECTED_ERRORS:
                continue

    async def happen(self) -> None:
        operation = self.random.choices(
            ["start", "kill", "stop", "pause", "unpause", "restart", "remove", "add", "healthy", "unhealthy"],
            [6, 4, 2, 2, 4, 2, 1, 1, 2, 2],
        )[0]
        alive = list(self.nodes.values())
        if operation == "add" or not alive:
            if len(alive) < self.most:
                await self.add()
            return
        node = self.random.choice(alive)
        match operation:
            case "remove":
                if len(alive) > 4:
                    self.nodes.pop(node.id, None)
                    self.removed.add(node.id)
                    await node.remove()
            case "stop" | "restart":
                await getattr(node, operation)(grace_s=1)
            case "healthy" | "unhealthy":
                await node.set_healthy(operation == "healthy")
            case _:
                await getattr(node, operation)()

    @contextlib.asynccontextmanager
    async def busy(self, workers: int = 3, *, replaces: bool = True) -> AsyncIterator[None]:
        """Node life and a manager for as long as this is entered."""
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            work = [tasks.create_task(self.live(stop), name=f"life-{number}") for number in range(workers)]
            work.append(tasks.create_task(self.manage(stop, replaces=replaces), name="manager"))
            try:
                yield
            finally:
                stop.set()
                await asyncio.wait(work, timeout=2 * CALL)
                await end(*work)


# -- the oracle ---------------------------------------------------------------------------------------------


class StillWrongError(AssertionError):
    """Documents that did not become right in time, one line each in `wrong`."""

    def __init__(self, within: float, wrong: list[str]) -> None:
        super().__init__(f"still wrong after {within:.0f} s:\n" + "\n".join(wrong))
        self.wrong = wrong


class Oracle:
    """Says which documents are wrong, and how long it took until none was."""

    def __init__(
        self,
        world: World,
        *,
        only_ours: bool = False,
        excuse: Callable[[Document, Document | None], bool] = lambda _document, _container: False,
    ) -> None:
        self._world = world
        #: Other worlds have documents in the same collection, which are not looked at.
        self._only_ours = only_ours
        #: What the last look found wrong and `excuse` knew a reason for: the containers, if they are there.
        self.excused: dict[str, Document | None] = {}
        self._excuse = excuse
        self._truths: dict[str, tuple[object, float]] = {}
        self._last_look = float("-inf")

    @property
    def _query(self) -> Document:
        return {"_id": {"$in": list(self._world.offered)}} if self._only_ours else {}

    async def inspect(self, node_id: str) -> Document | None:
        try:
            async with asyncio.timeout(CALL):
                return await self._world.docker.containers.container(node_id).show()
        except DockerError as error:
            if error.status == 404:
                return None
            raise

    async def wrong(self) -> dict[str, float]:
        """Every document that does not say what its container is, in words, and since when that has been true."""
        world, look = self._world, time.monotonic()
        documents = {row["_id"]: row async for row in world.documents.find(self._query)}
        found: dict[str, float] = {}
        self.excused.clear()
        for node_id in documents.keys() | world.inserted:
            container, document = await self.inspect(node_id), documents.get(node_id)
            since = self._true_since(node_id, container)
            if container and document and any(differences(document, container, world.network)):
                # An engine may have kept us waiting: the document is to be no older than the inspection.
                document = await world.documents.find_one({"_id": node_id})
            if container is None:
                texts = ["has a document, but no container"] if document else []
            elif document is None:
                texts = ["has a container, but no document"]
            else:
                texts = [*differences(document, container, world.network)]
            if texts and document and self._excuse(document, container):
                self.excused[node_id] = container
            else:
                found |= {f"{node_id[:12]}: {text}": since for text in texts}
        self._last_look = look
        return found

    def _true_since(self, node_id: str, container: Document | None) -> float:
        """When the container changed to what it is now, at the earliest: after the look before."""
        life = [container["State"][name] for name in ("StartedAt", "FinishedAt")] if container else None
        now_true = (life, true_fields(container, network=self._world.network) if container else None)
        known, since = self._truths.get(node_id, (None, self._last_look))
        if known != now_true:
            since = self._last_look
            self._truths[node_id] = (now_true, since)
        return since

    async def recovered(self, *, since: float | None = None, within: float = 30.0) -> float:
        """Wait until all is right and stays so.

        Returns how long (s) a document was wrong, counted from `since` (default: now), or from the last change of
        its container if that came later: an engine may end what it was told to do after everything fell silent.
        """
        began = time.monotonic() if since is None else since
        took, last_wrong, wrong = 0.0, began, {"": began}
        while True:
            now = time.monotonic()
            try:
                wrong = await self.wrong()
            except (*EXPECTED_ERRORS, PyMongoError) as error:
                wrong = {repr(error): began}
            if wrong:
                last_wrong = time.monotonic()
                took = max(took, last_wrong - max(began, min(wrong.values())))
            elif now - last_wrong > QUIET:
                return took
            if now - began > within * SLOW:
                raise StillWrongError(within, list(wrong))
            await asyncio.sleep(0.02)

    async def lost_requests(self) -> list[str]:
        """Nodes whose document has lost a `last_req_time` that the manager was told is stored."""
        lost = []
        async for row in self._world.documents.find(self._query):
            requests = self._world.requests.get(row["_id"])
            if requests and row["last_req_time"] not in {requests.acknowledged, *requests.unsure}:
                lost.append(f"{row['_id'][:12]}: {row['last_req_time']}, not {requests.acknowledged}")
        return lost


# -- one fault ----------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the fault table."""

    fault: str
    times: int = 0
    documents: int = 0
    divergent: int = 0
    #: Seconds from the end of node life, and at most from the return of what was broken.
    longest_recovery: float = 0.0
    longest_since_return: float = 0.0
    lost_requests: int = 0

    def save(self) -> None:
        TABLE.parent.mkdir(exist_ok=True)
        rows = json.loads(TABLE.read_text()) if TABLE.exists() else {}
        rows[self.fault] = asdict(self)
        TABLE.write_text(json.dumps(rows, indent=1, sort_keys=True))
        print(  # noqa: T201 - pytest shows it with -s, or when the test fails
            f"{self.fault}: {self.times} x, {self.documents} documents, {self.divergent} divergent, "
            f"longest recovery {self.longest_recovery:.2f} s, at most {self.longest_since_return:.2f} s since "
            "the return"
        )


async def endure(
    fault: str,
    world: World,
    eventwatch: Eventwatch,
    inject: Callable[[], Awaitable[object]],
    *,
    recovery: float = RECOVERY,
    repeat: int | None = None,
) -> Row:
    """Inject a fault into a busy world, as often as `times()` says, and demand that all is right afterwards."""
    oracle, row = Oracle(world), Row(fault)
    await eventwatch.says("Nodes status checker started.")
    await oracle.recovered()
    for _ in range(repeat or times()):
        async with world.busy():
            await asyncio.sleep(1)
            await inject()
            returned = time.monotonic()
        # Counted from the end of all life: what happens to a node meanwhile makes its document wrong for a moment.
        ended = time.monotonic()
        row.times += 1
        row.documents += len(world.inserted)
        try:
            took = await oracle.recovered(since=ended, within=max(30.0, 2 * recovery))
        except StillWrongError as error:
            row.divergent += len(error.wrong)
            row.save()
            error.add_note(eventwatch.tail(80))
            raise
        row.longest_recovery = max(row.longest_recovery, took)
        row.longest_since_return = max(row.longest_since_return, ended - returned + took)
        lost = await oracle.lost_requests()
        row.lost_requests += len(lost)
        assert not lost, "\n".join(lost)
    row.save()
    assert "Traceback" not in eventwatch.output, eventwatch.tail(80)
    assert row.longest_recovery <= recovery, f"{row.longest_recovery:.2f} s\n{eventwatch.tail()}"
    return row
